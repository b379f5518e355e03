"""Uniform grids: rounding to nearest (RTN), and GPTQ (arXiv 2210.17323 Algorithm 1).

Per row and group of columns w ≈ scale·(q − zero), q an integer of b bits, the grid spanning min(w, 0) … max(w, 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bellbit.core.compensate import quantize_blocks
from bellbit.core.hessian import InverseFactor


class UniformGroup(NamedTuple):
    """codes: uint8 (out, c). scale: float32 (out, 1), exact in float16. zero: uint8 (out, 1)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def fit_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row, the scale already rounded to float16: float32 (out, 1) each.

    weight: (out, c). A row of zeros gets scale 1.
    """
    low = weight.amin(dim=1, keepdim=True).clamp_max(0)
    high = weight.amax(dim=1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    scale = torch.where(scale == 0, 1, scale)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The integers nearest to `weight` on the grid, as floats."""
    return (weight / scale + zero).round_().clamp_(0, 2**bits - 1)


def quantize_uniform(
    weight: Tensor, factor: InverseFactor | None, bits: int, group_size: int = 128
) -> list[UniformGroup]:
    """Quantize group after group: GPTQ with a factor of the inverse Hessian, plain rounding without.

    GPTQ feeds each column's error into the next ones of its group at once and, group by group, into the rest.
    weight: float (out, in). bits: 1 … 8.
    """

    def quantize(current: Tensor, block: slice) -> tuple[UniformGroup, Tensor]:
        scale, zero = fit_grid(current, bits)
        if factor is None:
            codes = round_to_grid(current, scale, zero, bits)
            return UniformGroup(codes.to(torch.uint8), scale, zero.to(torch.uint8)), current
        corner = factor.upper[block, block]
        columns = current.t().contiguous()  # one column is one contiguous row
        codes, error = torch.empty_like(columns), torch.empty_like(columns)
        row_scale, row_zero = scale[:, 0], zero[:, 0]
        for j in range(len(columns)):
            codes[j] = round_to_grid(columns[j], row_scale, row_zero, bits)
            error[j] = (columns[j] - row_scale * (codes[j] - row_zero)) / corner[j, j]
            columns[j + 1 :].addr_(corner[j, j + 1 :], error[j], alpha=-1)
        group = UniformGroup(codes.t().to(torch.uint8), scale, zero.to(torch.uint8))
        return group, error.t()

    return quantize_blocks(weight, factor, group_size, quantize, compensate=factor is not None)
