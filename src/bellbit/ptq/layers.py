"""The linears of a decoder block: their weights and shapes, what they lose, and packed ones taken out and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bellbit.packed.linear import PackedLinear, packed_linears
from bellbit.ptq.families import Family, linear_names


def weight_of(block: nn.Module, linear: str) -> Tensor:
    """The weight of a linear of a block or model, (out, in)."""
    weight = block.get_submodule(linear).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def linear_shapes(model: Any, family: Family) -> dict[str, torch.Size]:
    """(out, in) of the linears that are quantized, by full name, in the order of `linear_names`."""
    return {name: weight_of(model, name).shape for name in linear_names(model, family)}


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """As GroupRecord says; 0 where there is nothing to lose."""

    def power(w: Tensor) -> float:
        return float(w.square().sum() if hessian is None else ((w @ hessian) * w).sum())

    whole = power(weight)
    return power(weight - quantized) / whole if whole > 0 else 0.0


def layers_of(block: nn.Module) -> dict[str, dict[str, Any]]:
    """What makes the packed linears of a block again, but for their tensors, by name."""
    return {
        name: {
            "shape": [layer.out_features, layer.in_features],
            "layout": layer.layout,
            "options": layer.options,
            "act_bits": layer.act_bits,
            "act_scope": layer.act_scope,
            "round_output": layer.round_output,
        }
        for name, layer in packed_linears(block).items()
    }


def put_back(block: nn.Module, tensors: dict[str, Tensor], layers: dict[str, dict[str, Any]]) -> None:
    """Make a block what it was when `tensors`, its state dict, and `layers`, see `layers_of`, were kept."""
    for linear, arguments in layers.items():
        block.set_submodule(linear, PackedLinear(**arguments, bias=tensors.get(f"{linear}.bias")))
    block.load_state_dict(tensors)
