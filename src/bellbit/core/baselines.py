"""The quantizers that BBQ is measured against: QuEST, LSQ, SEQ (ParetoQ), N2UQ and NF (SPEC of each in its docstring).

Each takes x and its learned parameters and returns the fake-quantized x. Rounding has no gradient of its own: what
backward sees is said by `straight`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The multiple of the rms at which clipping a normal variable costs least, by bits (QuEST, arXiv 2502.05003).
QUEST_CLIP = {1: 0.7978845587140913, 2: 1.4935346200015913, 3: 2.051068354131873, 4: 2.513930578568423}
SEQ_EDGE = 0.99
N2UQ_SMALLEST_STEP = 1e-3
N2UQ_SMALLEST_MEAN = 1e-8
NF_SMALLEST_MAXIMUM = 1e-6


def straight(value: Tensor, *surrogates: Tensor) -> Tensor:
    """`value`, with the gradient of the sum of `surrogates`."""
    result = value.detach()
    for surrogate in surrogates:
        result = result + (surrogate - surrogate.detach())
    return result


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scaled_gradient(parameter: Tensor, factor: float) -> Tensor:
    """The parameter itself; its gradient × `factor`, as learned steps need it (LSQ, arXiv 1902.08153 §2.2)."""
    result: Tensor = _ScaledGradient.apply(parameter, factor)  # type: ignore[no-untyped-call]
    return result


def quest(v: Tensor, width: int) -> Tensor:
    """s = c_b·rms + 1e-8 per row, step = 2s/(2ᵇ − 1): round(clip(v, ±s)/step + ½)·step − step/2 (QuEST §3).

    v: rotated x (..., n). The gradient reaches v where |v̂ − v| ≤ c_b·rms/(2ᵇ − 1), and not through the rms.
    """
    rms = v.detach().square().mean(dim=-1, keepdim=True).sqrt()
    step = quest_step(rms, width)
    value = quest_codes(v.detach(), step, width) * step - step * (2 ** (width - 1) - 0.5)
    kept = (value - v).abs() <= rms * QUEST_CLIP[width] / (2**width - 1)
    return straight(value, v * kept)


def quest_step(rms: Tensor, width: int) -> Tensor:
    """Distance of two levels."""
    return 2 * (QUEST_CLIP[width] * rms + 1e-8) / (2**width - 1)


def quest_codes(v: Tensor, step: Tensor, width: int) -> Tensor:
    """0 … 2ᵇ − 1, in v's dtype."""
    edge = step * (2**width - 1) / 2
    return (v.clamp(-edge, edge) / step + 0.5).round() + (2 ** (width - 1) - 1)


def lsq(x: Tensor, step: Tensor, width: int) -> Tensor:
    """(round(clamp(x/s − ½, −2^(b−1), 2^(b−1) − 1)) + ½)·s, one learned s per tensor (LSQ, half-integer levels).

    step: (1,). Its gradient × 1/√(numel·(2^(b−1) − 1)). Not defined at 1 bit.
    """
    step = scaled_gradient(step, (x.numel() * (2 ** (width - 1) - 1)) ** -0.5)
    inside = _lsq_inside(x, step, width)
    return (straight(inside.round(), inside) + 0.5) * step + step * 1e-9  # the reference carries this last term


def _lsq_inside(x: Tensor, step: Tensor, width: int) -> Tensor:
    half = 2 ** (width - 1)
    return (x / step - 0.5).clamp(-half, half - 1)


def lsq_codes(x: Tensor, step: Tensor, width: int) -> Tensor:
    """0 … 2ᵇ − 1, in x's dtype."""
    return _lsq_inside(x, step, width).round() + 2 ** (width - 1)


def seq(x: Tensor, edge: Tensor, width: int) -> Tensor:
    """α·(round(clip(x/α, ±.99)·n − ½) + ½)/n with n = 2^(b−1); α·sign(x) at 1 bit (SEQ of ParetoQ, arXiv 2502.02631).

    edge: α, (1,) or (rows, 1), learned; its gradient is that of the levels against x/α, × 1/√(numel·max(n − 1, 1)).
    x's gradient passes where |x/α| ≤ .99.
    """
    half = 2 ** (width - 1)
    ratio = (x / edge).detach()
    if width == 1:
        level = slope = ratio.sign()
    else:
        level = (_seq_round(ratio, half) + 0.5) / half
        slope = torch.where(ratio.abs() <= SEQ_EDGE, level - ratio, ratio.sign() * (half - 0.5) / half)
    learned = scaled_gradient(edge, (x.numel() * max(half - 1, 1)) ** -0.5)
    return straight(edge * level, x * (ratio.abs() <= SEQ_EDGE), learned * slope)


def _seq_round(ratio: Tensor, half: int) -> Tensor:
    return (ratio.clamp(-SEQ_EDGE, SEQ_EDGE) * half - 0.5).round()


def seq_codes(x: Tensor, edge: Tensor, width: int) -> Tensor:
    """0 … 2ᵇ − 1, in x's dtype; at 1 bit an exact zero, which the formula keeps, counts as +."""
    if width == 1:
        return (x / edge >= 0).to(x.dtype)
    half = 2 ** (width - 1)
    return _seq_round(x / edge, half) + half


def n2uq_weight(x: Tensor, width: int) -> Tensor:
    """f·(round((clip(x/f, ±1) + 1)·m)/m − 1), f = (2ᵇ − 1)/2^(b−1)·mean|x| per row, m = (2ᵇ − 1)/2 (N2UQ, weights).

    The gradient is g/f, as in the reference: clipped nowhere, f a constant.
    """
    factor = n2uq_factor(x, width)
    middle = (2**width - 1) / 2
    codes = n2uq_codes(x, factor, width)
    return straight(factor * (codes / middle - 1), x / factor)


def n2uq_factor(x: Tensor, width: int) -> Tensor:
    """f, (rows, 1)."""
    mean = x.detach().abs().mean(dim=-1, keepdim=True).clamp_min(N2UQ_SMALLEST_MEAN)
    return (2**width - 1) / 2 ** (width - 1) * mean


def n2uq_codes(x: Tensor, factor: Tensor, width: int) -> Tensor:
    """0 … 2ᵇ − 1, in x's dtype."""
    return (((x.detach() / factor).clamp(-1, 1) + 1) * ((2**width - 1) / 2)).round()


def n2uq_activation(
    x: Tensor, start: Tensor, lengths: Tensor, scale1: Tensor, scale2: Tensor, interval: Tensor, zero: Tensor
) -> Tensor:
    """s₂·(zero + interval·(number of thresholds below s₁·x)): unequal thresholds, equal levels (N2UQ, activations).

    lengths: a (2ᵇ − 1,), learned, at least 1e-3; thresholds lie at start + a₀/2, then (a_{i−1} + a_i)/2 further each.
    start, scale1, scale2: (1,), learned. interval, zero: fixed. The gradient is that of the line through the knots
    (start + a₀ + … + a_{i−1}, zero + i·interval), flat outside.
    """
    count = len(lengths)
    lengths = lengths.clamp_min(N2UQ_SMALLEST_STEP)
    scaled = scale1 * x
    knots = start + torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # (2ᵇ,)
    thresholds = knots[:-1] + lengths / 2
    codes = torch.bucketize(scaled.detach(), thresholds.detach())  # how many lie below
    piece = torch.bucketize(scaled.detach(), knots.detach()) - 1  # (t_i, t_{i+1}]
    inside = (piece >= 0) & (piece < count)
    piece = piece.clamp(0, count - 1)
    line = torch.where(inside, interval * (scaled - knots[piece]) / lengths[piece], 0.0)
    return scale2 * straight(zero + codes * interval, line)


def nf_levels(width: int) -> Tensor:
    """Quantiles of the normal distribution, 2ᵇ of them with an exact zero, the largest ±1 (QLoRA, arXiv 2305.14314)."""
    delta = 0.5 * (1 / 2 ** (width + 1) + 1 / (2 ** (width + 1) - 2))
    half = 2 ** (width - 1)
    low = torch.linspace(delta, 0.5, half, dtype=torch.float64)
    high = torch.linspace(0.5, 1 - delta, half + 1, dtype=torch.float64)[1:]
    levels = torch.special.ndtri(torch.cat([low, high]))
    return (levels / levels.abs().max()).float()


def nf(x: Tensor, width: int) -> Tensor:
    """The nearest of `nf_levels` times max|x| of the last dimension; the gradient is the identity. At least 2 bits."""
    return straight(nf_levels(width).to(x)[nf_codes(x, width)] * nf_maximum(x), x)


def nf_maximum(x: Tensor) -> Tensor:
    """(..., 1)."""
    return x.detach().abs().amax(dim=-1, keepdim=True).clamp_min(NF_SMALLEST_MAXIMUM)


def nf_codes(x: Tensor, width: int) -> Tensor:
    """0 … 2ᵇ − 1, int64."""
    levels = nf_levels(width).to(x)
    return torch.bucketize(x.detach() / nf_maximum(x), (levels[1:] + levels[:-1]) / 2)
