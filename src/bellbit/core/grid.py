"""Symmetric grids, one bit and up: w ≈ s·ℓ with levels ℓ = ±½, ±3/2, … ±(2^b − 1)/2 and one scale s per row and group.

At one bit that is a sign and a magnitude d = s/2. Three ways to the codes, each better and dearer than the one before:
rounding to nearest; column after column with error feedback (GPTQ, arXiv 2210.17323); descent from there, one
coordinate at a time, on the output error (W − Ŵ)·H·(W − Ŵ)ᵀ itself, with the scales refitted jointly in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bellbit.core.compensate import blocks, quantize_blocks
from bellbit.core.hessian import InverseFactor

GROUP = 128
TOGETHER = 128  # columns whose errors are fed into each other at once, and into all others together
STEPS = {1: 2.0, 2: 1.248, 3: 0.734, 4: 0.42}  # best scale by width for a bell, over its mean magnitude (Max 1960)
ERRORS = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}  # mean square of the rest then, over the variance
WIDEST = max(STEPS)
SMALLEST_SCALE = torch.finfo(torch.float16).tiny  # as scales are stored
LLOYD_ROUNDS = 8  # of scales and codes in turn


def nearest_levels(values: Tensor, width: int) -> Tensor:
    """The level nearest to each value, both in units of the scale; 0 goes to +½. Any shape, float."""
    top = 2 ** (width - 1)
    return values.floor().clamp_(-top, top - 1).add_(0.5)


def spread(per_group: Tensor, columns: int, group: int = GROUP) -> Tensor:
    """(out, groups) to (out, columns): each value for all columns of its group."""
    return per_group.repeat_interleave(group, dim=1)[:, :columns]


def in_groups(values: Tensor, group: int = GROUP) -> Tensor:
    """Sums over the columns of each group: (out, in) to (out, groups)."""
    return torch.stack([part.sum(dim=1) for part in values.split(group, dim=1)], dim=1)


def fit_scales(weight: Tensor, importance: Tensor, width: int, group: int = GROUP) -> Tensor:
    """Scales of least squared error Σ h·(w − s·ℓ(w/s))², by scales and codes in turn.

    weight: (out, in). importance: h (in,), not negative: the diagonal of the Hessian, or ones. width: 1 … 4.
    Returns float32 (out, ⌈in/group⌉), positive; a group of zeros gets the smallest normal float16.
    """
    columns = weight.shape[1]
    total = in_groups(importance.expand_as(weight), group).clamp_min(1e-30)
    scales = (STEPS[width] * in_groups(weight.abs() * importance, group) / total).clamp_min(SMALLEST_SCALE)
    for _ in range(1 if width == 1 else LLOYD_ROUNDS):
        levels = nearest_levels(weight / spread(scales, columns, group), width)
        fitted = in_groups(weight * levels * importance, group)
        scales = (fitted / in_groups(levels.square() * importance, group).clamp_min(1e-30)).clamp_min(SMALLEST_SCALE)
    return scales


def refit_scales(weight: Tensor, levels: Tensor, scales: Tensor, hessian: Tensor, group: int = GROUP) -> Tensor:
    """Scales of least output error for given codes, all groups of a row at once.

    Per row the normal equations A·s = b with A_gh = ℓ_g·H_gh·ℓ_h and b_g = ℓ_g·(H·w)_g. A row whose solution has a
    scale that is not positive keeps its `scales`.
    weight, levels: (out, in). hessian: (in, in), damped. Returns float32 (out, groups).
    """
    parts = blocks(weight.shape[1], group)
    target = in_groups(levels * (weight @ hessian), group)
    normal = torch.stack([in_groups(levels * (levels[:, part] @ hessian[part]), group) for part in parts], dim=2)
    solved = torch.linalg.solve_ex(normal.double(), target.double())[0].float()
    sound = (solved > SMALLEST_SCALE).all(dim=1, keepdim=True) & solved.isfinite().all(1, keepdim=True)
    return torch.where(sound, solved, scales)


def feedback_levels(weight: Tensor, factor: InverseFactor, width: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Codes column after column, each one's error fed into the columns to its right (GPTQ Algorithm 1).

    The scales of a group are fitted to what has become of its weights when its turn comes.
    weight: float (out, in). Returns levels (out, in) and scales (out, groups).
    """

    def quantize(current: Tensor, block: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        corner = factor.upper[block, block]
        scale = fit_scales(current, corner.diagonal().square().reciprocal(), width, group)[:, 0]
        columns = current.t().contiguous()  # one column is one contiguous row
        levels, error = torch.empty_like(columns), torch.empty_like(columns)
        for part in blocks(len(columns), TOGETHER):
            for j in range(part.start, part.stop):
                levels[j] = nearest_levels(columns[j] / scale, width)
                error[j] = (columns[j] - scale * levels[j]) / corner[j, j]
                columns[j + 1 : part.stop].addr_(corner[j, j + 1 : part.stop], error[j], alpha=-1)
            columns[part.stop :].addmm_(corner[part, part.stop :].t(), error[part], alpha=-1)
        return (levels.t(), scale), error.t()

    parts = quantize_blocks(weight, factor, group, quantize)
    return torch.cat([levels for levels, _ in parts], dim=1), torch.stack([scale for _, scale in parts], dim=1)


def descend(
    weight: Tensor, levels: Tensor, scales: Tensor, hessian: Tensor, width: int, sweeps: int = 2, group: int = GROUP
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on the output error: each code in turn goes to its best level given all the others.

    With G = (Ŵ − W)·H the error is least in ŵ_j at ŵ_j − G_j/H_jj, and on the grid at the level nearest to that. After
    each sweep over the columns the scales are refitted. The error never rises.
    weight, levels: (out, in). scales: (out, groups). hessian: (in, in), damped. Returns levels and scales.
    """
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        full = spread(scales, weight.shape[1], group).t().contiguous()  # one column is one contiguous row
        codes = levels.t().contiguous()
        slope = hessian @ (full * codes - weight.t())
        for part in blocks(len(codes), TOGETHER):
            change = torch.empty_like(codes[part])
            local, corner = slope[part], hessian[part, part]
            for i, j in enumerate(range(part.start, part.stop)):
                best = nearest_levels(codes[j] - local[i] / (diagonal[j] * full[j]), width)
                change[i] = (best - codes[j]) * full[j]
                codes[j] = best
                local[i + 1 :].addr_(corner[i, i + 1 :], change[i])
            slope[part.stop :].addmm_(hessian[part.stop :, part], change)
        levels = codes.t().contiguous()
        scales = refit_scales(weight, levels, scales, hessian, group)
    return levels, scales


def first_codes(weight: Tensor, factor: InverseFactor | None, width: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """The best of the three ways that can be had: levels (out, in) and scales (out, groups).

    Without a factor, or with that of a Hessian beyond repair, it is rounding to nearest. A row of zeros is as near to
    them as can be stored: its groups would else mend each other's least scale, and its weights grow fourfold.
    """
    if factor is None or factor.damping is None:
        scales = fit_scales(weight, torch.ones_like(weight[0]), width, group)
        return nearest_levels(weight / spread(scales, weight.shape[1], group), width), scales
    factor = _heard_faintly(factor)
    hessian = torch.cholesky_inverse(factor.upper, upper=True)
    levels, scales = feedback_levels(weight, factor, width, group)
    scales = refit_scales(weight, levels, scales, hessian, group)
    levels, scales = descend(weight, levels, scales, hessian, width, group=group)
    nothing = ~weight.any(dim=1, keepdim=True)
    return levels.masked_fill_(nothing, 0.5), scales.masked_fill_(nothing, SMALLEST_SCALE)


def _heard_faintly(factor: InverseFactor) -> InverseFactor:
    """Dead inputs as if they had been heard as faintly as the faintest.

    A grid without a zero can neither leave their weights out, nor let them, with the 1 that stands for their mean
    square, decide the scales of others.
    """
    if bool(factor.dead.all()) or not bool(factor.dead.any()):
        return factor._replace(dead=torch.zeros_like(factor.dead))
    upper = factor.upper.clone()
    diagonal = upper.diagonal()
    diagonal[factor.dead] = diagonal[~factor.dead].max()  # of the inverse
    return InverseFactor(upper, torch.zeros_like(factor.dead), factor.damping)


class _StraightThrough(torch.autograd.Function):
    """ŵ = s·ℓ(latent); ∂ŵ/∂latent = s as if ℓ were the identity, ∂ŵ/∂s = ℓ = ŵ/s.

    What it costs is passes over memory: of a training step of 256 tokens it was a half.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, width: int, group: int, dtype: torch.dtype) -> Tensor:
        if width == 1:  # the sign of a number is that of its rounding
            weight = _by_groups(torch.copysign, scales / 2, latent.to(dtype), group)
        else:
            weight = _by_groups(torch.mul, scales, nearest_levels(latent, width).to(dtype), group)
        ctx.save_for_backward(weight, scales)
        ctx.group = group
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        weight, scales = ctx.saved_tensors
        wrt_latent = _by_groups(torch.mul, scales, gradient, ctx.group).float() if ctx.needs_input_grad[0] else None
        return wrt_latent, in_groups(gradient * weight, ctx.group).float() / scales, None, None, None


def _by_groups(function: Callable[..., Tensor], scales: Tensor, values: Tensor, group: int) -> Tensor:
    """function(scale of the row and group, values (out, in)), in the dtype of `values`."""
    scales = scales.to(values.dtype)[:, :, None]
    whole = values.shape[1] // group
    result = torch.empty_like(values)
    end = whole * group
    for part, target, factor in (
        (values[:, :end].unflatten(1, (whole, group)), result[:, :end].unflatten(1, (whole, group)), scales[:, :whole]),
        (values[:, None, end:], result[:, None, end:], scales[:, whole:]),
    ):
        if target.numel():
            function(factor, part, out=target)
    return result


def straight_through(latent: Tensor, scales: Tensor, width: int, dtype: torch.dtype, group: int = GROUP) -> Tensor:
    """The weight s·ℓ(latent), differentiable in both.

    latent: float32 (out, in), weights in units of their scale; at one bit −0 would be a −. scales: float32
    (out, groups). dtype: of the result.
    """
    return _StraightThrough.apply(latent, scales, width, group, dtype)  # type: ignore[no-untyped-call]
