"""The method `bellbit`: column scales, codes, block reconstruction and distillation, one after the other.

docs/method.md explains the rungs. Each can be left out; what is left stands on those before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bellbit.packed.linear import PackedLinear
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.budget import allocate, rounding_losses
from bellbit.ptq.distill import Front, distill, teacher_states
from bellbit.ptq.entering import enter
from bellbit.ptq.fit import Plan, Rates, is_norm
from bellbit.ptq.latent import LatentLinear, latent_linears
from bellbit.ptq.loop import Log, Progress, Run, layers_of, linear_shapes, put_back
from bellbit.ptq.methods import METHODS, Settings
from bellbit.ptq.reconstruct import reconstruct
from bellbit.ptq.resume import Saved
from bellbit.ptq.stream import BlockStream, ignore

TOGETHER = 8  # pieces that go through a block at once where nothing is trained
# Tokens at most that a step of training sees. Divergence of the demo model on unseen windows of wiki-sample with five
# blocks reconstructed, 2 epochs of 120 × 1024 tokens: .751 with 1024 (106 s), .496 with 512 (97 s), .468 with 256 and
# lower rates (114 s; 512 with lower rates: .479).
PIECE = 512
# And a step of distillation, which must know long contexts: a fourth of an epoch from the same blocks leaves, on the
# four quarters of windows of 1024 tokens of test articles, 1.58, 1.66, 1.89, 2.14 with 512 tokens a step (120 steps),
# and 1.60, 1.71, 1.87, 1.87 with 1024 (60 steps, as long). The first half with 512 and then 1024: no better than 512.
DISTILLED_PIECE = 1024

_TAIL_STEP = "tail"  # name of what is kept


@dataclass(frozen=True)
class Effort:
    """How much is trained, in epochs over all windows.

    blocks: of each block, twice as many of the first ones. tail: of the last ones together. distilled: of all together.
    """

    blocks: int
    tail: int
    distilled: int

    @property
    def whole(self) -> bool:
        """Whether something is trained after the last block was."""
        return self.tail + self.distilled > 0


EFFORTS = {
    "fast": Effort(blocks=2, tail=1, distilled=1),
    "balanced": Effort(blocks=3, tail=2, distilled=1),
    "best": Effort(blocks=6, tail=4, distilled=3),
}
# Blocks that are trained twice as long, as all that follow live with what these lose: of a divergence of 1.8 in the
# end, .33 is there after two. With 8 epochs for 2: .275 and .256 for .329 and .303 (unseen wiki-sample, own text).
FIRST_BLOCKS = 2
# How many are trained together in the end. From blocks of 2 epochs on 64 + 64 windows, divergence on unseen wiki-sample
# and own text of 2.74 and 1.69: after one epoch 2.10 and 1.38 with four (95 s), 2.18 and 1.40 with eight (117 s).
TAIL = 4
HELD_BACK = 16  # one piece of so many, at least one, is kept to stop by
TRAINING_BYTES = 20  # for a weight in training: latent, gradient, two averages and the best so far, float32 each
WEIGHT_SECONDS = 6.5e-9 / PIECE  # for a weight and a token, besides products: of Adam, clipping, straight-through


@dataclass(frozen=True)
class Pace:
    """Rates of the rungs."""

    blocks: Rates
    tail: Rates
    distilled: Rates


# blocks, in the setting of PIECE: .476 with .015 and .05, .479 with .02 and .03, .496 with .03 and .03, .530 with .02
# and .01. tail, in the setting of TAIL, two epochs: 1.94 and 1.29; .01 and .015: 1.99 and 1.32; no latents and .015:
# 1.98 and 1.31. distilled, in the setting of DISTILLED_PIECE: 1.943 on unseen wiki-sample, 2.115 with .02.
SIGN_PACE = Pace(blocks=Rates(0.02, 0.03), tail=Rates(0.0025, 0.01), distilled=Rates(0.0, 0.01))
# blocks, one epoch at two bits: .251 with .005 and .02, .282 with .005 and .01 and with .01 and .02, .298 with .02 and
# .03. tail, two epochs at 2.4 bits, from .687 and .493 (unseen wiki-sample, own text): .604 and .442; .001 and .004:
# .611 and .445; .0025 and .003: .626 and .449; .0025 and .01: .629 and .452. distilled, from the last: .601 and .440
# with .003, nothing gained with .01.
FINER_PACE = Pace(blocks=Rates(0.005, 0.02), tail=Rates(0.0005, 0.004), distilled=Rates(0.0, 0.003))


def pace(widths: Iterable[int]) -> Pace:
    """Of what has linears of these bits."""
    return SIGN_PACE if min(widths) == 1 else FINER_PACE


def own_windows(settings: Settings, samples: int) -> int:
    """How many windows of its own text the model writes beside `samples` of calibration text: as many.

    Three times as many gain nothing in as many steps: .405 for .404 (docs/method.md).
    """
    return samples if METHODS[settings.method].climbs and "text" in settings.rungs else 0


@torch.no_grad()
def climb(
    blocks: Blocks,
    settings: Settings,
    windows: Tensor,
    device: str,
    seed: int,
    progress: Progress,
    saved: Saved,
    shapes: Mapping[str, Sequence[int]] | None = None,
    most_fallbacks: float = math.inf,
    offload: Path | None = None,
    log: Log = lambda block, run: None,
) -> Run:
    """Replace the linears of every decoder block by packed ones, in place.

    blocks: of a model that is in memory, if `takes_whole` says so. settings: resolved for the family. windows: token
    ids (samples, length), the last few held back from training. seed: of the order of the windows. saved: what is done
    is kept there, and not done again. shapes: (out, in) of all linears by full name; looked up if not given.
    most_fallbacks: see `Run.check`. offload: folder for hidden states. log: told of each block.
    """
    model, family = blocks.model, blocks.family
    bf16, effort, every = bf16_pays(device), efforts(settings), blocks.all
    if shapes is None:
        shapes = linear_shapes(model, family)
    # in epochs of reconstruction of the demo model
    costs = (
        0.6 * mixes_widths(settings, shapes),
        0.2 * (effort.distilled > 0),
        0.5 + effort.blocks,
        0.3 * effort.tail,
        1.3 * effort.distilled,
    )
    budget, teacher, blockwise, together, whole = _parts(progress, *costs)

    def measure() -> dict[str, int]:
        return _widths(blocks, shapes, settings, windows, bf16, lambda done: budget(done, "bit budget"))

    def listen() -> Tensor:
        return teacher_states(model, whole_pieces, bf16, lambda done: teacher(done, "what the model itself says"))

    pieces, whole_pieces = _in_pieces(windows, PIECE), _in_pieces(windows, DISTILLED_PIECE)
    widths = saved.notes("budget", measure)
    own_pace = pace(widths.values())
    states = saved.tensor("teacher", listen) if effort.distilled else None
    stream = BlockStream(model, every, pieces, device, TOGETHER, bf16, offload)
    targets = stream.copy("targets")
    plan = _plan(pieces, effort.blocks, own_pace.blocks, seed * len(every) * 2 * effort.blocks)
    run, front = _quantize_blocks(
        stream, targets, blocks, settings, widths, plan, blockwise, saved, most_fallbacks, log
    )
    if effort.whole:
        model.to(device)
    if effort.tail:
        plan = _plan(pieces, effort.tail, own_pace.tail, seed * effort.tail)
        _train_tail(stream, front, targets, blocks, pieces.to(device), plan, together, saved)
    del stream, front, targets  # three sets of hidden states
    if states is not None:
        plan = _plan(whole_pieces, effort.distilled, own_pace.distilled, seed * effort.distilled)
        told = _telling(whole, "distillation")
        distill(model, model, whole_pieces.to(device), states.to(device), plan, bf16, told, saved)
    if effort.whole:
        _pack(model)
        model.to("cpu")
    return run


def efforts(settings: Settings) -> Effort:
    """What is trained on the rungs that are climbed."""
    effort = EFFORTS[settings.effort]
    return Effort(
        effort.blocks * ("blocks" in settings.rungs),
        effort.tail * ("tail" in settings.rungs),
        effort.distilled * ("distill" in settings.rungs),
    )


def takes_whole(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the model must be in memory whole: to be trained together, or to measure what deserves more bits."""
    return efforts(settings).whole or mixes_widths(settings, shapes)


def mixes_widths(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether some linears get a bit more than others."""
    return len(set(widths_alike(settings, shapes).values())) > 1


def widths_alike(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bits of every linear if nothing is known of their losses."""
    return allocate(shapes, dict.fromkeys(shapes, 0.0), settings.bpw)


def _pack(module: nn.Module) -> None:
    """Make the layers in training what they are stored as."""
    for name, layer in latent_linears(module).items():
        module.set_submodule(name, PackedLinear.holding(layer.packed(), bias=layer.bias))


def _parts(progress: Progress, *costs: float) -> list[Progress]:
    """One progress for each of several things done in turn, by what they cost."""

    def part(before: float, cost: float) -> Progress:
        return lambda done, text: progress((before + cost * done) / sum(costs), text)

    return [part(sum(costs[:i]), cost) for i, cost in enumerate(costs)]


def _telling(progress: Progress, what: str) -> Callable[[float, float], None]:
    """What `distill` reports to, as a line of progress."""
    return lambda done, least: progress(done, f"{what}, divergence {least:.3f}")


def _plan(pieces: Tensor, epochs: int, rates: Rates, seed: int) -> Plan:
    return Plan(len(pieces), max(1, len(pieces) // HELD_BACK), epochs, rates, seed)


def _in_pieces(windows: Tensor, tokens: int) -> Tensor:
    """Windows cut into as few equal ones of at most `tokens` as can be; what is left over at the end is lost."""
    count = math.ceil(windows.shape[1] / tokens)
    length = windows.shape[1] // count
    return windows[:, : count * length].reshape(-1, length)


def _quantize_blocks(
    stream: BlockStream,
    targets: Tensor,
    blocks: Blocks,
    settings: Settings,
    widths: dict[str, int],
    plan: Plan,
    progress: Progress,
    saved: Saved,
    most_fallbacks: float,
    log: Log,
) -> tuple[Run, Tensor]:
    """The rungs that take one decoder block after the other; their linears become `LatentLinear`s, or are packed at
    once where nothing trains them any more.

    plan: of the first block; the seed counts on, and the rates are those of the block's width. targets: hidden states
    of the float model, as they come into the first block, and in the end go out of the last. Returns what comes into
    the tail, too. Neither is worth anything where the saved run has trained the tail already.
    """
    run, effort, front = Run(), efforts(settings), torch.empty(0)
    family, count = blocks.family, len(blocks.all)
    steps = [*map(blocks.name, range(count)), *([_TAIL_STEP] if effort.tail else [])]
    streaming = not all(map(saved.has, steps))
    for index in range(count):

        def report(done: float, what: str = "reconstruction", index: int = index) -> None:
            progress((index + done) / count, f"block {index + 1}/{count}: {what}")

        report(0, "codes")
        if streaming and effort.tail and index == max(0, count - TAIL):
            front = stream.copy("front")
        started = time.perf_counter()
        name, block = blocks.name(index), blocks.take_up(index).to(stream.device)
        if streaming:
            stream.run(block, targets, ignore)
        own = {linear: widths[f"{name}.{linear}"] for group in family.groups_of(block) for linear in group.linears}
        if (found := saved.load(name)) is not None:
            tensors, notes = found
            layers = notes.pop("layers")
            for linear in own if not layers else ():
                values = tensors[f"{linear}.latent"], tensors[f"{linear}.log_scales"]
                block.set_submodule(linear, LatentLinear(*values, own[linear], tensors.get(f"{linear}.bias")))
            put_back(block, tensors, layers)
            block.to(stream.device)
            done = Run(**notes)
        else:
            done = enter(block, blocks, stream, settings, name, own)
            if plan.epochs:
                epochs = plan.epochs * (2 if index < FIRST_BLOCKS else 1)
                rates = pace(own.values()).blocks
                own_plan = replace(plan, epochs=epochs, rates=rates, seed=plan.seed + index * 2 * plan.epochs)
                reconstruct(block, stream.caller(block), stream.inputs, targets, own_plan, report)
            seconds = time.perf_counter() - started
            sizes = {linear: layer.latent.numel() for linear, layer in latent_linears(block).items()}
            done.seconds = {linear: seconds * size / sum(sizes.values()) for linear, size in sizes.items()}
            if not effort.whole:
                _pack(block)
            saved.keep(name, block.state_dict(), **asdict(done), layers=layers_of(block))
        run.add(name, done)
        log(name, done)
        run.check(most_fallbacks)
        if streaming and index < count - 1:
            stream.run(block, stream.inputs, ignore)
        del block
        if not effort.whole:
            blocks.put_down(index)
    return run, front


def _train_tail(
    stream: BlockStream,
    inputs: Tensor,
    targets: Tensor,
    blocks: Blocks,
    pieces: Tensor,
    plan: Plan,
    progress: Progress,
    saved: Saved,
) -> None:
    """Train the last blocks and the norm behind them towards what the float model says, codes and all.

    inputs: what comes into them, (windows, length, width). targets: what comes out of the float model's.
    """
    model, every = blocks.model, blocks.all
    apart = [m for name, m in model.named_modules() if not name.startswith(f"{blocks.family.blocks}.") and is_norm(m)]
    tail = nn.ModuleList([*every[-TAIL:], *apart])
    if (found := saved.load(_TAIL_STEP)) is not None:
        tail.load_state_dict(found[0])
        return
    end, front = Front(every, targets, stream.in_tuple), Front(every[:-TAIL], inputs, stream.in_tuple)
    progress(0, "what the model itself says")
    states = teacher_states(model, pieces, stream.bf16, front=end)
    told = _telling(progress, f"last {len(every[-TAIL:])} blocks")
    distill(model, tail, pieces, states, plan, stream.bf16, told, front=front)
    saved.keep(_TAIL_STEP, tail.state_dict())


def bf16_pays(device: str) -> bool:
    """Whether products of bfloat16 are faster than those of float32 there."""
    return torch.cpu._is_avx512_bf16_supported() if device == "cpu" else torch.cuda.is_bf16_supported()


def _widths(
    blocks: Blocks,
    shapes: Mapping[str, Sequence[int]],
    settings: Settings,
    windows: Tensor,
    bf16: bool,
    report: Callable[[float], None],
) -> dict[str, int]:
    """Bits of every linear by name, under the budget."""
    alike = widths_alike(settings, shapes)
    if not mixes_widths(settings, shapes):
        return alike
    losses = rounding_losses(blocks, settings, windows, min(alike.values()), bf16, report)
    return allocate(shapes, losses, settings.bpw)
