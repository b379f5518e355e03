"""QuantLinear, and the ways in and out: `prepare` puts it into a model, `convert` leaves packed layers behind."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core import baselines, bellbox
from bellbit.errors import BellbitError
from bellbit.kernels import rotate
from bellbit.packed.linear import PackedLinear
from bellbit.packed.planes import Bellbox
from bellbit.quantizers import Quantizer, quantizer, rotates


class QuantLinear(nn.Linear):
    """nn.Linear that trains through quantizers of its weight and its input: y = x̂·Ŵᵀ + b.

    Where only one of the two is rotated, the other is, too: the product is the same.
    """

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        inputs, weight = self.input_quantizer(x), self.weight_quantizer(self.weight)
        if rotates(self.weight_quantizer) and not rotates(self.input_quantizer):
            inputs = rotate(inputs)
        elif rotates(self.input_quantizer) and not rotates(self.weight_quantizer):
            weight = rotate(weight)
        return nn.functional.linear(inputs, weight, self.bias)


def prepare(
    model: nn.Module, weights: str = "bbq:2", activations: str = "bbq:2", skip: Iterable[str] = ("lm_head",)
) -> nn.Module:
    """Make every nn.Linear of a model a QuantLinear, in place; train it with anything, then `convert`.

    weights, activations: METHOD:BITS, or none, see `quantizer`. skip: names of modules, or patterns as
    `*.mlp.*`, that stay as they are; the default is what transformers calls the head.
    Raises BellbitError for an unknown quantizer, or if no linear layer is left.
    """
    patterns = tuple(skip)
    quantizer(weights, 1), quantizer(activations)  # a mistake in either is told before anything changes
    chosen = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(fnmatch(name, pattern) for pattern in patterns)
    ]
    if not chosen:
        raise BellbitError(f"the model has no nn.Linear to quantize besides {', '.join(patterns)}")
    for linear in chosen:
        linear.__class__ = QuantLinear  # the same module otherwise: hooks, ties, what others have noted in it
        linear.weight_quantizer = quantizer(weights, linear.out_features)
        linear.input_quantizer = quantizer(activations)
        linear.weight_quantizer.to(linear.weight.device), linear.input_quantizer.to(linear.weight.device)
    return model


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Replace every QuantLinear by a PackedLinear with the codes of its weight, in place; input quantizers stay.

    Raises BellbitError if a weight's quantizer has no codes on a grid (none, nf), or has not seen a batch yet.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise BellbitError("there is nothing to convert: the model has no QuantLinear, see bellbit.qat.prepare")
    packed = {name: pack(layer, name) for name, layer in layers.items()}
    for name, layer in layers.items():
        inputs = layer.input_quantizer
        rule = f"{inputs.method}:{inputs.width}" if isinstance(inputs, Quantizer) else "none"
        replacement = PackedLinear.holding(packed[name], bias=layer.bias, input_rule=rule)
        if isinstance(inputs, Quantizer):
            replacement.take_input_quantizer(inputs)
        model.set_submodule(name, replacement)
    return model


def pack(layer: QuantLinear, name: str = "the layer") -> Bellbox:
    """The codes that a layer's weight has now."""
    rule: Any = layer.weight_quantizer
    grid = _GRIDS.get(getattr(rule, "method", "none"))
    if grid is None:
        what = "not quantized" if isinstance(rule, nn.Identity) else f"quantized by {rule.method}, which has no grid"
        raise BellbitError(f"{name} cannot be packed: its weight is {what}")
    if not bool(rule.ready):
        raise BellbitError(f"{name} cannot be packed: its quantizer has seen no batch yet")
    weight = layer.weight.detach().float()
    codes, scale = grid(rule, rotate(weight) if rotates(rule) else weight)
    half = rule.method not in ("bbq", "bbq-fast") or rule.width <= 2
    scales = scale.expand(len(weight), 1).squeeze(1).contiguous()
    return Bellbox.pack(codes.to(torch.uint8), scales, rule.width, half, rotates(rule))


# Codes 0 … 2ᵇ − 1 and the distance of two levels, (rows, 1) or (), of a weight by each method.


def _bbq_grid(rule: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    codes = bellbox.normal_codes(v * bellbox.inverse_rms(v, by_row=True), rule.width)
    return codes, rule.gamma / 2 ** (rule.width - 1)


def _quest_grid(rule: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    step = baselines.quest_step(v.square().mean(dim=-1, keepdim=True).sqrt(), rule.width)
    return baselines.quest_codes(v, step, rule.width), step


def _lsq_grid(rule: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    half = 2 ** (rule.width - 1)
    return (x / rule.step - 0.5).clamp(-half, half - 1).round() + half, rule.step


def _seq_grid(rule: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    half = 2 ** (rule.width - 1)
    if rule.width == 1:
        return (x / rule.edge >= 0).float(), 2 * rule.edge
    edge = baselines.SEQ_EDGE
    return ((x / rule.edge).clamp(-edge, edge) * half - 0.5).round() + half, rule.edge / half


def _n2uq_grid(rule: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    factor = baselines.n2uq_factor(x, rule.width)
    return baselines.n2uq_codes(x, factor, rule.width), factor / ((2**rule.width - 1) / 2)


_GRIDS = {
    "bbq": _bbq_grid,
    "bbq-fast": _bbq_grid,
    "quest": _quest_grid,
    "lsq": _lsq_grid,
    "seq": _seq_grid,
    "n2uq": _n2uq_grid,
}
