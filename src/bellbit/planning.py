"""What a quantization will take, before anything runs: memory by what it is for, time, and the size of the result."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bellbit.core.activations import windows_at_once
from bellbit.core.grid import GROUP
from bellbit.core.hessian import accumulate, inverse_factor, new_hessian
from bellbit.core.ltdb import learn_column_scales
from bellbit.errors import BellbitError
from bellbit.loading import bf16_pays, compute_dtype, window_length
from bellbit.memory import peak_memory
from bellbit.packed.linears import unfuse
from bellbit.ptq.blocks import skeleton
from bellbit.ptq.budget import MEASURED, mixes_widths, widths_alike
from bellbit.ptq.effort import FIRST_BLOCKS, PIECE, TAIL, efforts
from bellbit.ptq.families import FAMILIES, check_foldable, family_of
from bellbit.ptq.layers import linear_shapes, weight_of
from bellbit.ptq.methods import METHODS, Settings, bits_of_levels
from bellbit.ptq.quantize import check_samples, computing, original, reads_whole, sources
from bellbit.ptq.sampling import SELF

TRIAL_ROWS, TRIAL_COLUMNS = 2048, 512  # of a weight that is quantized to see how long it takes and what it stores
TRIAL_PRODUCT = 2048  # width of a product that is timed
# In float32, held while the widest linear is quantized; by what a block of LLaMA-2-7B took, see docs/scaling.md.
FACTORS, COPIES = 3, 4  # arrays of its Hessian's size, and of its own
WRITING = 4  # a token that the model writes takes as long as so many that it reads: measured on the demo model
TRAINING_BYTES = 20  # for a weight in training: latent, gradient, two averages and the best so far, float32 each
WEIGHT_SECONDS = 6.5e-9 / PIECE  # for a weight and a token, besides products: of Adam, clipping, straight-through
ACTIVATIONS = 3  # arrays of the widest inner size that a block's forward pass holds at once


@dataclass(frozen=True)
class Plan:
    """weights: that are quantized; rest: that are not. blocks: how many.

    whole: whether all weights are in memory at once, or those of one block. memory: bytes by what takes them, which are
    there together at the worst moment, in the host's memory and the device's together. bits_per_weight, output_bytes:
    of the checkpoint. seconds: by what takes them.
    """

    model: str
    method: str
    device: str
    weights: int
    rest: int
    blocks: int
    whole: bool
    memory: dict[str, int]
    seconds: dict[str, float]
    bits_per_weight: float
    output_bytes: int


def plan(
    model: str,
    method: str = "dbellquant",
    *,
    calib: str = "wiki-sample",
    samples: int = 128,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    allow_unknown: bool = False,
    **options: Any,
) -> Plan:
    """What `quantize` with the same arguments will take; reads the config alone, and times some products here.

    Raises BellbitError as `quantize` does for what it can know now.
    """
    settings = Settings(method, **options)
    check_samples(samples)
    device, dtype = computing(settings, device, dtype)
    location, config = original(model)
    if allow_unknown and config.model_type not in FAMILIES:
        raise BellbitError(
            f"there is no plan for the unknown architecture {config.model_type!r}: its linears are found by running it"
        )
    libraries = peak_memory()
    settings = settings.resolved(family_of(config))
    if settings.folds:
        check_foldable(config)
    sizes = _sizes(config)
    length = window_length(config, seq_len if METHODS[method].calibrates else None)
    counts = sources(settings, calib, samples)
    text = _Text(length, sum(counts.values()) * length, counts.get(SELF, 0) * length)
    bf16 = METHODS[method].climbs and bf16_pays(device)
    whole = reads_whole(location, settings, sizes.shapes)
    item = compute_dtype(dtype, config).itemsize
    chains = 2 if METHODS[method].climbs or (METHODS[method].transforms and settings.ltdb != "off") else 1
    kept = chains + (METHODS[method].climbs and efforts(settings).tail > 0)
    at_once = min(samples, windows_at_once(length, settings.act_bits, settings.resolved_scope)) * length
    bits, trial = _trials(sizes.shapes, settings)
    output = int(sizes.weights * bits / 8 + (sizes.parameters - sizes.weights) * 2)
    resident = {
        "embeddings and head": item * (sizes.parameters - sum(sizes.blocks)),
        "all blocks" if whole else "one block": item * (sum if whole else max)(sizes.blocks),
        "hidden states": 0 if offload else kept * item * text.read * config.hidden_size,
    }
    if METHODS[method].climbs and efforts(settings).distilled:
        resident["the float model's last states"] = (2 if bf16 else 4) * text.read * config.hidden_size
    again = output if whole else output - int(sizes.weights * bits / 8 * (1 - 1 / len(sizes.blocks)))
    moments = {
        **_moments(sizes, settings, whole, item, at_once, config.num_attention_heads * length),
        "the checkpoint, loaded again": again,
    }
    if text.written:  # before anything else is there
        moments["the model that writes text"] = item * sizes.parameters - sum(resident.values())
    worst = max(moments, key=lambda moment: moments[moment])
    speed = _speed(bf16, device)
    host_speed = speed if device == "cpu" else _speed(bf16_pays("cpu"), "cpu")
    return Plan(
        model=model,
        method=method,
        device=device,
        weights=sizes.weights,
        rest=sizes.parameters - sizes.weights,
        blocks=len(sizes.blocks),
        whole=whole,
        memory={"libraries": libraries, **resident, worst: moments[worst]},
        seconds=_seconds(sizes, settings, text, chains, speed, host_speed, trial),
        bits_per_weight=bits,
        output_bytes=output,
    )


@dataclass(frozen=True)
class _Text:
    """Tokens: of a window; of all that calibrate; of those among them that the model writes."""

    length: int
    read: int
    written: int


@dataclass(frozen=True)
class _Sizes:
    """Of a model. shapes: of the linears that are quantized, by name. parameters: in all. blocks: of each block.

    hessians: widths of those of each block.
    """

    shapes: dict[str, torch.Size]
    parameters: int
    blocks: list[int]
    hessians: list[list[int]]

    @property
    def weights(self) -> int:
        """That are quantized."""
        return sum(map(math.prod, self.shapes.values()))


def _sizes(config: Any) -> _Sizes:
    family, bare = family_of(config), skeleton(config)
    unfuse(bare)
    blocks = list(bare.get_submodule(family.blocks).children())
    return _Sizes(
        shapes=linear_shapes(bare, family),
        parameters=sum(p.numel() for p in bare.parameters()),
        blocks=[sum(p.numel() for p in block.parameters()) for block in blocks],
        hessians=[[weight_of(b, group.linears[0]).shape[1] for group in family.groups_of(b)] for b in blocks],
    )


def _moments(sizes: _Sizes, settings: Settings, whole: bool, item: int, at_once: int, heads: int) -> dict[str, int]:
    """What takes memory beside weights and hidden states, one after the other, and its bytes.

    item: bytes of a value. at_once: tokens of a batch. heads: probabilities of attention for each of them.
    """
    method = METHODS[settings.method]
    forward = item * at_once * (ACTIVATIONS * max(map(max, sizes.shapes.values())) + heads)
    squares = [sum(width**2 for width in widths) for widths in sizes.hessians]
    widest = max(map(max, sizes.hessians))
    copies = 4 * COPIES * max(map(math.prod, sizes.shapes.values()))
    moments = {
        "activations of a batch, all Hessians": forward + 4 * max(squares) * method.calibrates,
        "the largest Hessian, copies of a weight": 4 * FACTORS * widest**2 * method.calibrates + copies,
    }
    if method.climbs:
        moments["training"] = TRAINING_BYTES * (sizes.weights if whole else max(sizes.blocks)) + forward
    return moments


def _speed(bf16: bool, device: str) -> float:
    """Floating-point operations a second of a product, here and now."""
    a = torch.randn(TRIAL_PRODUCT, TRIAL_PRODUCT, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    float((a @ a).sum())
    started = time.perf_counter()
    float((a @ a).sum())
    return 2 * TRIAL_PRODUCT**3 / (time.perf_counter() - started)


def _trials(shapes: Mapping[str, Sequence[int]], settings: Settings) -> tuple[float, float]:
    """Stored bits per weight, and seconds of the method itself, from one smaller weight for each shape."""
    sizes = Counter(tuple(shape) for shape in shapes.values())
    bits, seconds = 0.0, 0.0
    for shape, count in sizes.items():
        weights = count * math.prod(shape)
        stored, each = _trial(shape, settings)
        bits += stored * weights
        seconds += each * weights
    whole = sum(map(math.prod, shapes.values()))
    if METHODS[settings.method].climbs:
        widths, bpw = widths_alike(settings, shapes), settings.bpw
        bits = sum(bits_of_levels(shape, widths[name], bpw) * math.prod(shape) for name, shape in shapes.items())
    return bits / whole, seconds


def _trial(shape: tuple[int, ...], settings: Settings) -> tuple[float, float]:
    """Stored bits and seconds for a weight of that shape, from one with as many rows and columns as are quick."""
    rows, columns = min(shape[0], TRIAL_ROWS), shape[1]
    if columns > TRIAL_COLUMNS:
        columns = TRIAL_COLUMNS + columns % GROUP  # with a short last group, if there is one
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs *= torch.randn(columns, generator=generator).exp()  # as in a model some channels are much larger
    hessian = new_hessian(columns)
    accumulate(hessian, inputs, 1)
    factor = inverse_factor(hessian)
    method = METHODS[settings.method]
    started = time.perf_counter()
    if method.transforms and settings.ltdb != "off":
        steps = settings.ltdb_steps if settings.ltdb == "learn" else 0
        learn_column_scales([weight], inputs.abs().amax(dim=0), settings.epsilon, steps, settings.block_size)
    packed = method.quantize(weight, factor, settings)
    return packed.bits_per_weight, (time.perf_counter() - started) / weight.numel()


def _seconds(
    sizes: _Sizes,
    settings: Settings,
    text: _Text,
    chains: int,
    speed: float,
    host_speed: float,
    trial: float,
) -> dict[str, float]:
    """By what takes them. chains: of hidden states, float and quantized. trial: of the method itself.

    speed, host_speed: operations a second on the device, and on the CPU, where text is written and bits are budgeted.
    """
    method = METHODS[settings.method]
    widths = [width for block in sizes.hessians for width in block]
    found = {"forward passes": 2 * sizes.weights * text.read * (chains + 1) / speed}
    if text.written:
        found["text of its own"] = WRITING * 2 * sizes.parameters * text.written / host_speed
    if method.calibrates:
        found["Hessians"] = sum(text.read * width**2 + 4 / 3 * width**3 for width in widths) / speed
    codes = trial + sum(rows * width**2 for rows, width in sizes.shapes.values()) / speed
    found[settings.method] = codes
    if method.climbs:
        if mixes_widths(settings, sizes.shapes):  # one linear after the other, and what follows
            after = sizes.parameters - sizes.weights / 2
            found["bit budget"] = codes + len(sizes.shapes) * 2 * after * min(text.length, MEASURED) / host_speed
        effort, share = efforts(settings), min(1.0, TAIL / len(sizes.blocks))
        alone = effort.blocks * (1 + min(1.0, FIRST_BLOCKS / len(sizes.blocks)))
        blockwise = (alone + share * effort.tail + effort.distilled) * sizes.weights
        head = (effort.tail + effort.distilled) * (sizes.parameters - sizes.weights)
        found["training"] = text.read * (blockwise * (6 / speed + WEIGHT_SECONDS) + head * 6 / speed)
    return found
