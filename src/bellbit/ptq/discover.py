"""A family for an architecture that nobody described: what reads the same input is found by running the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.errors import BellbitError
from bellbit.ptq.families import Family, InputGroup

PROBE = 8  # tokens that are run


@torch.no_grad()
def discover(model: Any) -> Family:
    """Every linear of the decoder blocks, grouped by the tensors that they were given; nothing is folded.

    model: each of its matrices an `nn.Linear`. Raises BellbitError if it has no list of blocks with linears.
    """
    path = _longest_list(model)
    names = {
        module: f"{index}.{name}"
        for index, block in model.get_submodule(path).named_children()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    calls: list[tuple[Tensor, str]] = []  # inputs are kept, so that none takes another's place in memory

    def noting(name: str) -> Callable[..., None]:
        return lambda _, arguments: calls.append((arguments[0], name))

    hooks = [module.register_forward_pre_hook(noting(name)) for module, name in names.items()]
    try:
        model.base_model(input_ids=torch.arange(PROBE)[None] % model.config.vocab_size, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    inputs: dict[tuple[str, int, torch.Size], list[str]] = {}  # a part of a tensor may begin where the whole does
    for x, name in calls:
        index, _, linear = name.partition(".")
        inputs.setdefault((index, x.data_ptr(), x.shape), []).append(linear)
    called = {name for _, name in calls}
    alone = [(name.partition(".")[2],) for name in names.values() if name not in called]  # experts without a token
    groups = dict.fromkeys([*(tuple(dict.fromkeys(linears)) for linears in inputs.values()), *alone])
    return Family(path, tuple(InputGroup(linears) for linears in _disjoint(groups)), ordered=False)


def _longest_list(model: nn.Module) -> str:
    """Path of the ModuleList that holds the most weights of linears, of those that are in no other."""
    sizes = {
        name: sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    outer = {name: size for name, size in sizes.items() if not any(name.startswith(f"{other}.") for other in sizes)}
    path = max(outer, key=lambda name: outer[name], default=None)
    if path is None or outer[path] == 0:
        raise BellbitError("--allow-unknown: this model has no list of blocks with linear layers")
    return path


def _disjoint(groups: Any) -> list[tuple[str, ...]]:
    """Groups without the linears that an earlier one has: blocks may differ."""
    seen: set[str] = set()
    found = []
    for linears in groups:
        own = tuple(name for name in linears if name not in seen)
        seen |= set(own)
        if own:
            found.append(own)
    return found
