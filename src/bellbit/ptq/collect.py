"""What a run over the calibration set tells about a block's inputs: largest values and Hessians."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.activations import quantize_activations
from bellbit.core.hessian import accumulate, mirror, new_hessian, panels
from bellbit.errors import BellbitError
from bellbit.processes import each_in_turn, largest, processes, sent
from bellbit.ptq.families import Family, InputGroup
from bellbit.ptq.methods import Settings
from bellbit.ptq.stream import BlockStream, StopBlock

FEWEST_TOKENS = 64  # inputs that make a Hessian; what saw fewer is rounded without


@contextmanager
def _hooks(
    block: nn.Module,
    inputs: Mapping[str, Callable[[Tensor], Tensor | None]],
    outputs: Mapping[str, Callable[[Tensor], Tensor | None]] = MappingProxyType({}),
) -> Iterator[None]:
    """Call a function on the input, or on the output, of each named module while the context is open.

    What it returns takes the place of that input or output; None leaves it.
    """

    def before(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            replacement = function(arguments[0])
            return None if replacement is None else (replacement, *arguments[1:])

        return hook

    def after(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Tensor | None]:
        return lambda _, __, output: function(output)

    handles = [block.get_submodule(name).register_forward_pre_hook(before(f)) for name, f in inputs.items()]
    handles += [block.get_submodule(name).register_forward_hook(after(f)) for name, f in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_maxima(
    stream: BlockStream,
    block: nn.Module,
    norms: Iterable[str],
    hidden: Tensor,
    report: Callable[[float], None],
    keep: bool,
) -> dict[str, Tensor]:
    """max|X_c| over the calibration set of what each norm gives: (in,) each. Advances `hidden`."""
    maxima: dict[str, Tensor] = {}

    def hook(norm: str) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            most = x.detach().flatten(0, -2).abs().amax(dim=0)
            maxima[norm] = torch.maximum(maxima[norm], most) if norm in maxima else most

        return take

    with _hooks(block, {}, {norm: hook(norm) for norm in norms}):
        stream.run(block, hidden, report, keep)
    return {norm: largest(found) for norm, found in maxima.items()}


def own_panels(width: int) -> list[slice]:
    """Rows of a Hessian that this process makes."""
    state = processes()
    return panels(width)[state.process_index :: state.num_processes]


def group_hessians(
    stream: BlockStream,
    block: nn.Module,
    family: Family,
    settings: Settings,
    name: str,
    report: Callable[[float], None],
    at_most: int | None = None,
) -> dict[InputGroup, Tensor]:
    """One Hessian per group, from the chain through the quantized blocks, activations rounded as at inference.

    at_most: windows that are looked at, the first ones. A group that saw fewer than FEWEST_TOKENS, as an expert may,
    has none.
    """
    hessians: dict[InputGroup, Tensor] = {}
    seen: Counter[InputGroup] = Counter()
    groups = family.groups_of(block)
    hidden = stream.inputs[:at_most]
    samples = min(stream.windows, at_most or stream.windows)
    alone = processes().num_processes == 1
    waiting: dict[InputGroup, Tensor] = {}

    def add(group: InputGroup, x: Tensor) -> None:
        if group not in hessians:
            hessians[group] = new_hessian(x.shape[-1], x.device)
        with torch.autocast(x.device.type, enabled=False):
            accumulate(hessians[group], x, samples, own_panels(x.shape[-1]))
        seen[group] += x.numel() // x.shape[-1]

    def hook(group: InputGroup, linear: str) -> Callable[[Tensor], Tensor]:
        def take(x: Tensor) -> Tensor:
            x = quantize_activations(x, settings.act_bits, settings.resolved_scope)
            if linear == group.linears[0]:
                if alone:
                    add(group, x)
                else:
                    waiting[group] = x.flatten(0, -2).contiguous()
            if family.ordered and linear == groups[-1].linears[-1]:
                raise StopBlock  # its product, a quarter of a LLaMA block, is not needed
            return x

        return take

    def exchange() -> None:
        """Add the inputs of all processes, in the order of one that has them all, to own rows of each Hessian."""
        for group in groups:
            linear: Any = block.get_submodule(group.linears[0])
            own = waiting.pop(group, stream.inputs.new_empty(0, linear.in_features, device=stream.device))
            for x in each_in_turn(own):
                if len(x):
                    add(group, x)

    hooks = {linear: hook(group, linear) for group in groups for linear in group.linears}
    outputs = {
        linear: lambda y: quantize_activations(y, settings.act_bits, settings.resolved_scope)
        for linear in family.rounded_outputs
    }
    with _hooks(block, hooks, outputs):
        stream.run(block, hidden, report, keep=False, after=(lambda: None) if alone else exchange)
    for hessian in () if alone else hessians.values():
        for index, rows in enumerate(panels(len(hessian))):
            sent([hessian[rows]], index % processes().num_processes)
            mirror(hessian, rows)
    for group, hessian in hessians.items():
        if not bool(hessian.isfinite().all()):
            raise BellbitError(
                f"the inputs of {name}.{group.linears[0]} hold NaN or infinite values on the calibration text; "
                "try --dtype float32"
            )
    enough = min(FEWEST_TOKENS, samples * hidden.shape[1])  # short calibration text is no reason to do without
    return {group: hessian for group, hessian in hessians.items() if seen[group] >= enough}
