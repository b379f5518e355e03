"""The slow, obvious kernel that every other one is tested against: round, unpack, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from bellbit.core.activations import Scope, quantize_activations
from bellbit.core.hadamard import hadamard
from bellbit.packed.planes import Bellbox
from bellbit.packed.tensor import PackedTensor


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None, act_bits: int = 16, scope: Scope = "token") -> Tensor:
    """x̂·Ŵᵀ + bias, x̂ = x rounded to `act_bits`; a rotated `bellbox` weight meets x̂ = the rotated x, rounded.

    x: (..., in), float. Returns (..., out) in x's dtype; Ŵ is rounded to it.
    """
    if isinstance(weight, Bellbox):
        dense = weight.levels()
        if weight.rotated:
            x = hadamard(x)
    else:
        dense = weight.dequantize()
    return torch.nn.functional.linear(quantize_activations(x, act_bits, scope), dense.to(x.dtype), bias)
