"""The slow, obvious kernel that every other one is tested against: unpack, then multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from bellbit.packed.layouts import PackedTensor


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
    """x·Ŵᵀ + bias. x: (..., in), float. Returns (..., out) in x's dtype; Ŵ is rounded to it."""
    return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)
