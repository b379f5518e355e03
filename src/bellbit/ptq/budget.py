"""The bit budget: which weights get one bit more than the others under a limit of stored bits per weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.grid import GROUP, first_codes, spread
from bellbit.ptq.distill import Front, divergence, logit_cap, teacher_states

SCALE_BITS = 16


def stored_bits(columns: int, width: int) -> float:
    """Bits per weight of a row: its codes, and a scale per group, the last group perhaps shorter."""
    return width + SCALE_BITS * math.ceil(columns / GROUP) / columns


def allocate(shapes: Mapping[str, Sequence[int]], losses: Mapping[str, float], bpw: float) -> dict[str, int]:
    """Widths by name: all alike, and one more, within the limit, for those that gain most for each bit they take.

    shapes: (out, in) by name. losses: what the model loses when this weight alone is rounded to the lesser width. What
    one bit more gains is taken to be in proportion to that. bpw: over all weights. If even one bit each is over the
    limit, because last groups are short, one bit each it is.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    whole = sum(sizes.values())
    scales = sum(sizes[name] * stored_bits(shape[1], 0) for name, shape in shapes.items())
    base = max(1, math.floor((bpw * whole - scales) / whole))
    left = bpw * whole - scales - base * whole
    widths = dict.fromkeys(shapes, base)
    for name in sorted(shapes, key=lambda name: losses[name] / sizes[name], reverse=True):
        if sizes[name] <= left:
            widths[name] += 1
            left -= sizes[name]
    return widths


@torch.no_grad()
def rounding_losses(
    model: Any,
    path: str,
    names: Sequence[str],
    window: Tensor,
    width: int,
    bf16: bool,
    report: Callable[[float], None],
) -> dict[str, float]:
    """Divergence in nats from the full-precision model when one weight alone is rounded to `width` bits, by full name.

    path: of the list of decoder blocks. names: of the linears in them, in full. window: token ids (length,).
    """
    blocks = list(model.get_submodule(path).children())
    calls: list[tuple[Tensor, bool]] = []  # hidden states that come in, and whether a tuple goes out

    def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        calls.append((arguments[0], isinstance(output, tuple)))

    hooks = [block.register_forward_hook(note) for block in blocks]

    def last(front: Front | None = None) -> Tensor:
        return teacher_states(model, window[None], bf16, front=front)[0]

    states = last()
    for hook in hooks:
        hook.remove()
    head = model.get_output_embeddings().weight.to(states.dtype)
    found: dict[str, float] = {}
    for index in range(len(blocks)):
        inside = [name for name in names if name.startswith(f"{path}.{index}.")]
        front = Front(blocks[:index], *calls[index])
        for name in inside:
            weight: Any = model.get_submodule(name).weight
            kept = weight.clone()
            levels, scales = first_codes(kept.float(), None, width)
            weight.copy_(levels * spread(scales, weight.shape[1]))
            found[name] = float(divergence(last(front), states, head, logit_cap(model.config)))
            weight.copy_(kept)
            report(len(found) / len(names))
    return found
