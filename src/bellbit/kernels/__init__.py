"""Kernels for packed weights: compiled ones on a CPU, Triton's on a GPU, else the reference in plain torch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bellbit.core import bellbox, divergence, grid
from bellbit.core.activations import Scope
from bellbit.core.hadamard import hadamard
from bellbit.kernels import native, reference
from bellbit.packed.planes import Bellbox
from bellbit.packed.tensor import PackedTensor


def _gpu_kernels(x: Tensor) -> Any:
    """The Triton kernels, if they serve for x."""
    if x.device.type != "cuda" or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return _triton_kernels()


@cache
def _triton_kernels() -> Any:
    try:
        from bellbit.kernels import triton
    except ImportError:
        return None
    return triton


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
    if _native_takes(x) and native.supports(weight):
        return native.linear(x, weight, bias, act_bits, scope)
    if (gpu := _gpu_kernels(x)) is not None and gpu.supports(x, weight):
        return gpu.linear(x, weight, bias, act_bits, scope)
    return reference.linear(x, weight, bias, act_bits, scope)


def bellbox_linear(
    x: Tensor, gamma: Tensor, inverse: Tensor | None, width: int, weight: Bellbox, bias: Tensor | None
) -> Tensor:
    """x̂·Ŵᵀ + bias with x̂ = BBQ's quantization of x and a rotated weight; on a GPU a product of integers.

    x: (..., in), float. gamma: (1,), learned. inverse: (), the 1/rms kept for x; None for its own. width: bits of x̂.
    Returns (..., out) in x's dtype.
    """
    if (gpu := _gpu_kernels(x)) is not None:
        return gpu.codes_linear(x, gamma, inverse, width, weight, bias)
    levels, _ = bellbox.bellbox(x, gamma, width, by_row=False, running=inverse, rotate=rotate)
    return linear(levels, replace(weight, rotated=0), bias)


def rotate(x: Tensor) -> Tensor:
    """x·H, blockwise Hadamard over the last dimension, with a gradient: (..., width), in x's dtype."""
    return native.rotate(x) if x.device.type == "cpu" and native.BUILT else hadamard(x)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias for a weight in 16 bits, bfloat16 or float16 (out, in), computed in x's dtype."""
    fits = _native_takes(x) and native.BUILT
    return native.dense(x, weight, bias) if fits else torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def straight_through(latent: Tensor, scales: Tensor, width: int, dtype: torch.dtype, group: int = grid.GROUP) -> Tensor:
    """The weight s·ℓ(latent) of a layer in training, differentiable in both; see `core.grid.straight_through`."""
    fits = latent.device.type == "cpu" and native.BUILT and dtype in (torch.float32, torch.bfloat16)
    return (native if fits else grid).straight_through(latent, scales, width, dtype, group)


def divergences(student: Tensor, teacher: Tensor, slope: bool) -> Tensor:
    """KL(teacher ‖ student) of every row of logits and its derivative in place; see `core.divergence.divergences`."""
    fits = teacher.device.type == "cpu" and native.BUILT
    return (native if fits else divergence).divergences(student, teacher, slope)
