"""The method `bellbit`: codes, block reconstruction and distillation, one after the other.

docs/method.md explains the rungs. Each can be left out; what is left stands on those before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bellbit.errors import BellbitError
from bellbit.loading import bf16_pays
from bellbit.packed.linear import PackedLinear
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.budget import choose_widths, mixes_widths
from bellbit.ptq.distill import Front, check_head, distill, teacher_states
from bellbit.ptq.effort import DISTILLED_PIECE, FIRST_BLOCKS, HELD_BACK, PIECE, TAIL, efforts, pace
from bellbit.ptq.entering import enter
from bellbit.ptq.fit import Plan, Rates, is_norm
from bellbit.ptq.latent import LatentLinear, latent_linears
from bellbit.ptq.layers import layers_of, linear_shapes, put_back
from bellbit.ptq.methods import Settings
from bellbit.ptq.reconstruct import reconstruct
from bellbit.ptq.resume import Saved
from bellbit.ptq.run import Log, Progress, Run
from bellbit.ptq.stream import BlockStream, ignore

TOGETHER = 8  # pieces that go through a block at once where nothing is trained
_TAIL_STEP = "tail"  # name of what is kept


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
    Raises BellbitError if the model's logits are not what `divergence` takes them for.
    """
    model, family = blocks.model, blocks.family
    bf16, effort, every = bf16_pays(device), efforts(settings), blocks.all
    if shapes is None:
        shapes = linear_shapes(model, family)
    if takes_whole(settings, shapes):
        check_head(model, windows)
    # in epochs of reconstruction of the demo model, 26 minutes on two cores of an Ice Lake
    costs = (
        0.2 * mixes_widths(settings, shapes),
        0.3 * (effort.distilled > 0),
        0.5 + effort.blocks,
        0.2 * effort.tail,
        0.85 * effort.distilled,
    )
    budget, teacher, blockwise, together, whole = _parts(progress, *costs)

    def measure() -> dict[str, int]:
        host_bf16 = bf16_pays("cpu")  # where it is measured
        return choose_widths(blocks, settings, shapes, windows, host_bf16, lambda done: budget(done, "bit budget"))

    def listen() -> Tensor:
        model.to(device)
        texts = whole_pieces.to(device)
        states = teacher_states(model, texts, bf16, lambda done: teacher(done, "what the model itself says"))
        model.to("cpu")
        return states.cpu()

    pieces, whole_pieces = _in_pieces(windows, PIECE), _in_pieces(windows, DISTILLED_PIECE)
    widths = saved.notes("budget", measure)
    own_pace = pace(settings.bpw)
    states = saved.tensor("teacher", listen) if effort.distilled else None
    stream = BlockStream(model, every, pieces, device, TOGETHER, bf16, offload)
    targets = stream.copy("targets")
    offset = family.norm_offset
    plan = _plan(pieces, effort.blocks, own_pace.blocks, seed * len(every) * 2 * effort.blocks, offset)
    run, front = _quantize_blocks(
        stream, targets, blocks, settings, widths, plan, blockwise, saved, most_fallbacks, log
    )
    if effort.whole:
        model.to(device)
    if effort.tail:
        plan = _plan(pieces, effort.tail, own_pace.tail, seed * effort.tail, offset)
        _train_tail(stream, front, targets, blocks, pieces.to(device), plan, together, saved)
    del stream, front, targets  # three sets of hidden states
    if states is not None:
        plan = _plan(whole_pieces, effort.distilled, own_pace.distilled, seed * effort.distilled, offset)
        told = _telling(whole, "distillation")
        distill(model, model, whole_pieces.to(device), states.to(device), plan, bf16, told, saved)
    if effort.whole:
        _pack(model)
        model.to("cpu")
    return run


def check_text(settings: Settings, windows: Tensor) -> None:
    """Raise BellbitError if a rung has but one piece of text: it could only train on it or hold it back."""
    effort = efforts(settings)
    for epochs, tokens in ((effort.blocks + effort.tail, PIECE), (effort.distilled, DISTILLED_PIECE)):
        if epochs and len(_in_pieces(windows, tokens)) < 2:
            raise BellbitError(
                f"{windows.numel()} tokens are too few to train on and to hold some back; give more --samples"
            )


def takes_whole(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the model must be in memory whole: to be trained together, or to measure what deserves more bits."""
    return efforts(settings).whole or mixes_widths(settings, shapes)


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


def _plan(pieces: Tensor, epochs: int, rates: Rates, seed: int, norm_offset: float) -> Plan:
    return Plan(len(pieces), max(1, len(pieces) // HELD_BACK), epochs, rates, seed, norm_offset)


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

    plan: of the first block; the seed counts on. targets: hidden states
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
                bias = tensors.get(f"{linear}.bias")
                block.set_submodule(linear, LatentLinear(*values, own[linear], settings.bpw, bias))
            put_back(block, tensors, layers)
            block.to(stream.device)
            done = Run(**notes)
        else:
            done = enter(block, blocks, stream, settings, name, own)
            if plan.epochs:
                epochs = plan.epochs * (2 if index < FIRST_BLOCKS else 1)
                own_plan = replace(plan, epochs=epochs, seed=plan.seed + index * 2 * plan.epochs)
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
    distill(model, tail, pieces, states, plan, stream.bf16, told, saved, f"{_TAIL_STEP}.fit", front)
    saved.keep(_TAIL_STEP, tail.state_dict())
