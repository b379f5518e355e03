"""The bit budget: how many bits each weight gets under a limit of stored bits per weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.grid import ERRORS, WIDEST, first_codes, spread
from bellbit.core.hessian import inverse_factor
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.collect import group_hessians
from bellbit.ptq.distill import Front, divergence, logit_cap, teacher_states
from bellbit.ptq.families import InputGroup
from bellbit.ptq.methods import ALL_SIGNS, Settings, bits_of_levels, group_of
from bellbit.ptq.stream import BlockStream, ignore

# Times the median norm of a window's tokens, of those that attention rests on: 6 to 11 in blocks 3 to 10 of the demo
# model (norm 800), 170 after them.
LARGE = 4
# Tokens at most that losses are measured on. What 512 choose loses 1.1 % more (1.14 bits; 2.0 % at 2.4) on the next 512
# than what 1024 choose, by the sum of losses; widths that know no losses 27 % more (42 %). Demo model, two-bit losses.
MEASURED = 512
HEARD = 8  # windows whose inputs make the Hessians that losses are measured with


def allocate(shapes: Mapping[str, Sequence[int]], losses: Mapping[str, float], bpw: float) -> dict[str, int]:
    """Widths by name: bit after bit goes to whatever gains most for each bit it takes, as long as the limit allows.

    shapes: (out, in) by name. losses: what the model loses when this weight alone has some width, the same for all;
    with other widths it is taken to be in proportion to the squared error of a bell. bpw: over all weights. If even
    one bit each is over the limit, because last groups are short, one bit each it is.
    """

    def offer(place: int, name: str) -> tuple[float, int, str, float]:
        """What one more bit gains for each it takes (negative), and how many it takes."""
        width = widths[name]
        more = math.prod(shapes[name]) * (bits(shapes[name], width + 1) - bits(shapes[name], width))
        return losses[name] * (ERRORS[width + 1] - ERRORS[width]) / more, place, name, more

    bits = partial(bits_of_levels, bpw=bpw)
    widths = dict.fromkeys(shapes, 1)
    left = sum(math.prod(shape) * (bpw - bits(shape, 1)) for shape in shapes.values())
    queue = [offer(place, name) for place, name in enumerate(shapes)] if bpw > ALL_SIGNS else []
    heapify(queue)
    while queue:
        _, place, name, more = heappop(queue)
        if more > left:
            continue
        left -= more
        widths[name] += 1
        if widths[name] < WIDEST:
            heappush(queue, offer(place, name))
    return widths


def widths_alike(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Bits of every linear if all weights were worth the same."""
    return allocate(shapes, {name: math.prod(shape) for name, shape in shapes.items()}, settings.bpw)


def mixes_widths(settings: Settings, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether it is to be found out which linears get more bits than others: not if all can have the most."""
    left = sum(
        math.prod(shape) * (settings.bpw - bits_of_levels(shape, WIDEST, settings.bpw)) for shape in shapes.values()
    )
    return "budget" in settings.rungs and settings.bpw > ALL_SIGNS and left < 0


@torch.no_grad()
def rounding_losses(
    blocks: Blocks, settings: Settings, windows: Tensor, width: int, bf16: bool, report: Callable[[float], None]
) -> dict[str, float]:
    """Divergence in nats from the full-precision model when one weight alone has its first codes of `width` bits.

    Tokens that attention rests on go through the full-precision weight: what they lose is added to all others, and is
    the first thing that training mends. With them v_proj of the demo model seems to lose 20 times as much.
    blocks: of a model that is in memory. windows: token ids (samples, length); the beginning of the first is what is
    measured on, the next HEARD make the Hessians. Without the rung `codes` it is plain rounding. Returns losses by
    full name.
    """
    model, family, every = blocks.model, blocks.family, blocks.all
    window = windows[:1, :MEASURED]
    measured = BlockStream(model, every, window, "cpu", 1, bf16)
    heard = BlockStream(model, every, windows[1 : 1 + HEARD] if len(windows) > 1 else windows, "cpu", 1, bf16)
    states = teacher_states(model, window, bf16)[0]
    head = model.get_output_embeddings().weight.to(states.dtype)
    columns, found = group_of(width, settings.bpw), dict[str, float]()
    for index, block in enumerate(every):
        hessians: dict[InputGroup, Tensor] = {}
        if "codes" in settings.rungs:
            hessians = group_hessians(heard, block, family, settings, blocks.name(index), ignore)
        front = Front(every[:index], measured.inputs, measured.in_tuple)
        resting = _resting_places(measured.inputs[0])
        for group in family.groups_of(block):
            factor = inverse_factor(hessians.pop(group)) if group in hessians else None
            for linear in group.linears:
                weight: Any = block.get_submodule(linear).weight
                kept = weight.clone()
                levels, scales = first_codes(kept.float(), factor, width, columns)
                weight.copy_(levels * spread(scales, weight.shape[1], columns))
                with _exact_for(resting, block.get_submodule(linear), kept):
                    own = teacher_states(model, window, bf16, front=front)[0]
                found[f"{blocks.name(index)}.{linear}"] = float(divergence(own, states, head, logit_cap(model.config)))
                weight.copy_(kept)
        for stream in (measured, heard) if block is not every[-1] else ():
            stream.run(block, stream.inputs, ignore)
        report((index + 1) / len(every))
    return found


def _resting_places(states: Tensor) -> Tensor:
    """Which tokens attention rests on where there is nothing to attend to: bool (length,). states: (length, width)."""
    norms = states.norm(dim=-1)
    found = norms > LARGE * norms.median()
    found[0] = True
    return found


@contextmanager
def _exact_for(tokens: Tensor, linear: Any, weight: Tensor) -> Iterator[None]:
    """Inside, some tokens (bool, (length,)) of a window go through `weight` (out, in) instead of the linear's own."""

    def correct(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if output.shape[-2] == len(tokens):  # an expert is given some tokens, without their places
            output[..., tokens, :] += nn.functional.linear(given[0][..., tokens, :], weight - linear.weight)

    hook = linear.register_forward_hook(correct)
    try:
        yield
    finally:
        hook.remove()


def choose_widths(
    blocks: Blocks,
    settings: Settings,
    shapes: Mapping[str, Sequence[int]],
    windows: Tensor,
    bf16: bool,
    report: Callable[[float], None],
) -> dict[str, int]:
    """Bits of every linear by full name, under the limit of `settings`. shapes: (out, in) of all of them."""
    alike = widths_alike(settings, shapes)
    if not mixes_widths(settings, shapes):
        return alike
    losses = rounding_losses(blocks, settings, windows, min(alike.values()), bf16, report)
    return allocate(shapes, losses, settings.bpw)
