"""QuantLinear, and the ways in and out: `prepare` puts it into a model, `convert` leaves packed layers behind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.baselines import nf_maximum
from bellbit.errors import BellbitError
from bellbit.kernels import rotate
from bellbit.packed.linear import PackedLinear
from bellbit.packed.plain import Float16, NormalFloat
from bellbit.packed.planes import Bellbox
from bellbit.packed.tensor import PackedTensor
from bellbit.quantizers import Quantizer, parse, quantizer, rotates


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
    model: nn.Module, weights: str = "bbq:2", activations: str = "bbq:2", skip: str | Iterable[str] = ("lm_head",)
) -> nn.Module:
    """Make every nn.Linear of a model a QuantLinear, in place; train it with anything, then `convert`.

    weights, activations: METHOD:BITS, or none, see `quantizer`. skip: names of modules, or patterns as
    `*.mlp.*`, that stay as they are; the default is what transformers calls the head.
    Raises BellbitError for an unknown quantizer, or if no linear layer is left.
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    for spec in (weights, activations):
        parse(spec)  # a mistake in either is told before anything changes
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

    Raises BellbitError if a quantizer has not seen a batch yet.
    """
    if isinstance(model, QuantLinear):
        raise BellbitError("a layer by itself cannot be replaced in place; give the module that holds it")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise BellbitError("there is nothing to convert: the model has no QuantLinear, see bellbit.qat.prepare")
    packed = {name: pack(layer, name) for name, layer in layers.items()}
    for name, layer in layers.items():
        inputs = layer.input_quantizer
        settled = inputs.settled() if isinstance(inputs, Quantizer) else None
        model.set_submodule(name, PackedLinear.holding(packed[name], bias=layer.bias, input_quantizer=settled))
    return model


def pack(layer: QuantLinear, name: str = "the layer") -> PackedTensor:
    """What a layer's weight is now: codes on a grid or NF's, or 16 bits if it is not quantized.

    Raises BellbitError, see `convert`; `name` is how it calls the layer.
    """
    quantizers: list[Any] = [layer.weight_quantizer, layer.input_quantizer]
    if not all(bool(rule.ready) for rule in quantizers if isinstance(rule, Quantizer)):
        raise BellbitError(f"{name} cannot be packed: its quantizers have seen no batch yet")
    weight, rule = _in_domain(layer), quantizers[0]
    if isinstance(rule, nn.Identity):
        return Float16.pack(weight)
    codes = rule.rules.codes(rule, weight).to(torch.uint8)
    if rule.rules.spacing is None:
        return NormalFloat.pack(codes, nf_maximum(weight).squeeze(1), rule.width)
    spacing = rule.rules.spacing(rule, weight).expand(len(weight), 1).squeeze(1).contiguous()
    return Bellbox.pack(codes, spacing, rule.width, rule.rules.zero(rule.width) % 1 != 0, rotates(rule))


@torch.no_grad()
def code_entropy(layer: QuantLinear) -> float:
    """Entropy of the codes that a layer's weight has now, in bits; nan if it has none."""
    rule: Any = layer.weight_quantizer
    if isinstance(rule, nn.Identity) or rule.rules.codes is None:
        return math.nan
    counts = rule.rules.codes(rule, _in_domain(layer)).flatten().long().bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


def _in_domain(layer: QuantLinear) -> Tensor:
    """A layer's weight in the domain that its quantizer works in, float32."""
    weight = layer.weight.detach().float()
    return rotate(weight) if rotates(layer.weight_quantizer) else weight
