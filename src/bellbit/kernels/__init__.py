"""Kernels for packed weights: the compiled ones where they are built and fit, else the reference in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from bellbit.core.activations import Scope
from bellbit.core.hadamard import hadamard
from bellbit.kernels import native, reference
from bellbit.packed.tensor import PackedTensor


def _native_takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def linear(
    x: Tensor,
    weight: PackedTensor,
    bias: Tensor | None,
    act_bits: int = 16,
    scope: Scope = "token",
) -> Tensor:
    """x̂·Ŵᵀ + bias, x̂ = x rounded to `act_bits`. x: (..., in), float. Returns (..., out) in x's dtype.

    Where a gradient is wanted (call models under `torch.no_grad()` if not), the reference serves: it has one.
    """
    fits = _native_takes(x) and native.supports(weight)
    return (native if fits else reference).linear(x, weight, bias, act_bits, scope)


def rotate(x: Tensor) -> Tensor:
    """x·H, blockwise Hadamard over the last dimension, with a gradient: (..., width), in x's dtype."""
    return native.rotate(x) if x.device.type == "cpu" and native.BUILT else hadamard(x)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias for a weight in 16 bits, bfloat16 or float16 (out, in), computed in x's dtype."""
    fits = _native_takes(x) and native.BUILT
    return native.dense(x, weight, bias) if fits else torch.nn.functional.linear(x, weight.to(x.dtype), bias)
