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
from bellbit.loading import DTYPES, load_config, locate, quantized_by, resolve_device, window_length
from bellbit.memory import peak_memory
from bellbit.packed.linears import unfuse
from bellbit.ptq.blocks import skeleton
from bellbit.ptq.budget import allocate, stored_bits
from bellbit.ptq.families import family_of, linear_names
from bellbit.ptq.ladder import EFFORTS, TRAINING_BYTES, WEIGHT_SECONDS, bf16_pays, own_windows
from bellbit.ptq.loop import weight_of
from bellbit.ptq.methods import METHODS, Settings
from bellbit.ptq.quantize import reads_whole

TRIAL_ROWS, TRIAL_COLUMNS = 2048, 512  # of a weight that is quantized to see how long it takes and what it stores
TRIAL_PRODUCT = 2048  # width of a product that is timed
# In float32, held while the widest linear is quantized; by what a block of LLaMA-2-7B took, see docs/scaling.md.
FACTORS, COPIES = 3, 4  # arrays of its Hessian's size, and of its own
ACTIVATIONS = 3  # arrays of the widest inner size that a block's forward pass holds at once


@dataclass(frozen=True)
class Plan:
    """weights: that are quantized; rest: that are not. blocks: how many.

    whole: whether all weights are in memory at once, or those of one block. memory: bytes by what takes them, which are
    there together at the worst moment. bits_per_weight, output_bytes: of the checkpoint. seconds: by what takes them.
    """

    model: str
    method: str
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
    samples: int = 128,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    **options: Any,
) -> Plan:
    """What `quantize` with the same arguments will take; reads the config alone, and times some products here.

    Raises BellbitError as `quantize` does for what it can know now.
    """
    settings = Settings(method, **options)
    device, dtype = resolve_device(device, dtype)
    location = locate(model)
    config = load_config(location)
    if (by := quantized_by(config, location)) is not None:
        raise BellbitError(f"{model} is quantized already, by {by}; give the original model")
    family = family_of(config)
    settings = settings.resolved(family)
    length = window_length(config, seq_len)
    libraries = peak_memory()
    bare = skeleton(config)
    unfuse(bare)
    shapes = {name: weight_of(bare, name).shape for name in linear_names(bare, family)}
    parameters = sum(p.numel() for p in bare.parameters())
    weights = sum(map(math.prod, shapes.values()))
    blocks = list(bare.get_submodule(family.blocks).children())
    largest = max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
    inside = sum(p.numel() for p in largest.parameters())
    tokens = (samples + own_windows(settings, samples)) * length if METHODS[method].calibrates else 0
    whole = reads_whole(location, settings, shapes)
    item = (DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32).itemsize
    chains = 2 if METHODS[method].climbs or (METHODS[method].transforms and settings.ltdb != "off") else 1
    widest = max(max(shape) for shape in shapes.values())
    hessians = [weight_of(b, group.linears[0]).shape[1] for b in blocks for group in family.groups_of(b)]
    held = sum(weight_of(largest, group.linears[0]).shape[1] ** 2 for group in family.groups_of(largest))
    at_once = min(samples, windows_at_once(length, settings.act_bits, settings.resolved_scope)) * length
    attention = config.num_attention_heads * length * at_once
    forward = item * (ACTIVATIONS * widest * at_once + attention)
    stages = {
        "activations of a batch, all Hessians": forward + 4 * held * METHODS[method].calibrates,
        "the largest Hessian, copies of a weight": 4 * FACTORS * max(hessians) ** 2 * METHODS[method].calibrates
        + 4 * COPIES * max(map(math.prod, shapes.values())),
    }
    if METHODS[method].climbs:
        stages["training"] = TRAINING_BYTES * (weights if whole else inside) + forward
    worst = max(stages, key=lambda name: stages[name])
    bits, trial = _trials(shapes, settings)
    speed = _speed(bf16_pays(device) and METHODS[method].climbs, device)
    rest = parameters - weights
    output = int(weights * bits / 8 + rest * 2)
    return Plan(
        model=model,
        method=method,
        weights=weights,
        rest=rest,
        blocks=len(blocks),
        whole=whole,
        memory={
            "libraries": libraries,
            "embeddings and head": item * (parameters - sum(p.numel() for b in blocks for p in b.parameters())),
            "all blocks" if whole else "one block": item * (inside * len(blocks) if whole else inside),
            "hidden states": 0 if offload else chains * item * tokens * config.hidden_size,
            worst: stages[worst],
        },
        seconds=_seconds(settings, shapes, hessians, tokens, chains, speed, trial),
        bits_per_weight=bits,
        output_bytes=output,
    )


def _speed(bf16: bool, device: str) -> float:
    """Floating-point operations a second of a product, here and now."""
    a = torch.randn(TRIAL_PRODUCT, TRIAL_PRODUCT, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    a @ a
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
        widths = allocate(shapes, dict.fromkeys(shapes, 0.0), settings.bpw)
        bits = sum(stored_bits(shape[1], widths[name]) * math.prod(shape) for name, shape in shapes.items())
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
    settings: Settings,
    shapes: Mapping[str, Sequence[int]],
    hessians: list[int],
    tokens: int,
    chains: int,
    speed: float,
    trial: float,
) -> dict[str, float]:
    """By what takes them. hessians: their widths, of all blocks. trial: seconds of the method itself.

    speed: operations a second.
    """
    weights = sum(map(math.prod, shapes.values()))
    found = {"forward passes": 2 * weights * tokens * (chains + 1) / speed}
    if METHODS[settings.method].calibrates:
        found["Hessians"] = sum(tokens * width**2 + 4 / 3 * width**3 for width in hessians) / speed
    found[settings.method] = trial + sum(rows * w**2 for rows, w in shapes.values()) / speed
    if METHODS[settings.method].climbs:
        effort = EFFORTS[settings.effort]
        seen = tokens * (
            effort.epochs * ("blocks" in settings.rungs) + effort.distilled * ("distill" in settings.rungs)
        )
        found["training"] = seen * weights * (6 / speed + WEIGHT_SECONDS)
    return found
