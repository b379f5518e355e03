"""The quantizer of BBQ (arXiv 2603.01599): normalise, normal CDF, round; codes of maximal entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bellbit.core.hadamard import hadamard

Rotate = Callable[[Tensor], Tensor]

INIT = 1.694  # γ starts at this times the rms of what is quantized
SMALLEST_RMS = 1e-8


def zero_point(width: int) -> float:
    """What is subtracted from a code 0 … 2^b − 1: levels lie at ±½, ±3/2, … for 1 and 2 bits, at integers for more."""
    return 2 ** (width - 1) - (0.5 if width <= 2 else 0)


def inverse_rms(v: Tensor, by_row: bool) -> Tensor:
    """1 / max(rms, 1e-8): over the last dimension (..., 1), or of the whole tensor (). float32."""
    wide = v.float()
    if by_row:
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / wide.shape[-1] ** 0.5
    else:
        rms = torch.linalg.vector_norm(wide) / wide.numel() ** 0.5
    return 1 / rms.clamp_min(SMALLEST_RMS)


def normal_codes(u: Tensor, width: int) -> Tensor:
    """round(2ᵇ·Φ(u) − ½), clipped to 0 … 2ᵇ − 1: codes, in u's dtype; each as likely as any other if u is normal."""
    codes = torch.special.ndtr(u).mul_(2**width).sub_(0.5).round_()
    return codes.clamp_(0, 2**width - 1)


class _Bellbox(torch.autograd.Function):
    """y = γ/2^(b−1)·(code − zero), straight through the rounding alone.

    Keeps x, which others keep, too, and the codes in bytes; x·H and u = v/rms are made again on the way back, which
    takes less time than the memory of either is worth.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, width: int, by_row: bool, running: Tensor | None, rotate: Rotate | None
    ) -> tuple[Tensor, Tensor]:
        v = x if rotate is None else rotate(x)
        inverse = inverse_rms(v, by_row) if running is None else running.float()
        codes = normal_codes(v.float() * inverse, width)
        ctx.save_for_backward(x, codes.to(torch.uint8), gamma, inverse)
        ctx.width, ctx.by_row, ctx.live, ctx.rotate = width, by_row, running is None, rotate
        ctx.mark_non_differentiable(inverse)
        levels = codes.sub_(zero_point(width))
        return (levels * (gamma.float() / 2 ** (width - 1))).to(x.dtype), inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, gamma, inverse = ctx.saved_tensors
        rotate = ctx.rotate
        u = (x if rotate is None else rotate(x)).float() * inverse
        grad = grad.float()
        wrt_gamma = (codes.float().sub_(zero_point(ctx.width)).mul_(grad)).div_(2 ** (ctx.width - 1))
        wrt_gamma = wrt_gamma.sum(dim=-1, keepdim=True) if gamma.ndim == 2 else wrt_gamma.sum().view_as(gamma)
        # dy/du = γ/2^(b−1) · 2ᵇ·φ(u)
        wrt_u = (u.square() * -0.5).exp_().mul_(2 / math.sqrt(2 * math.pi)).mul_(gamma.float()).mul_(grad)
        if ctx.live:  # u = v/rms(v)
            product = wrt_u * u
            mean = product.mean(dim=-1, keepdim=True) if ctx.by_row else product.mean()
            mean = torch.where(inverse * SMALLEST_RMS < 1 - 1e-6, mean, 0)  # a clamped rms is a constant
            wrt_u = wrt_u.addcmul_(u, mean, value=-1)
        wrt_v = wrt_u.mul_(inverse)
        wrt_x = wrt_v if rotate is None else rotate(wrt_v)  # H is symmetric
        if x.dtype == torch.float16:
            wrt_x = wrt_x.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
        return wrt_x.to(x.dtype), wrt_gamma.to(gamma.dtype), None, None, None, None


def bellbox(
    x: Tensor, gamma: Tensor, width: int, by_row: bool, running: Tensor | None = None, rotate: Rotate | None = hadamard
) -> tuple[Tensor, Tensor]:
    """BBQ's fake quantization (§3): γ/2^(b−1)·(round(2ᵇ·Φ(v/rms) − ½) − z) with v = x·H, and the 1/rms that was used.

    x: (..., n), any float dtype; computed in float32. gamma: one number, or (rows, 1) with `by_row`. width: b.
    by_row: one rms per row, else one of the whole tensor. running: use this 1/rms instead, as a constant.
    rotate: what multiplies by H; None if x is to stay in its own domain (an ablation).
    The gradient passes the rounding straight and goes through Φ, rms and H; γ's is not scaled.
    Returns the output, rotated, in x's dtype, and float32 (..., 1) or ().
    """
    y, inverse = _Bellbox.apply(x, gamma, width, by_row, running, rotate)  # type: ignore[no-untyped-call]
    return y, inverse
