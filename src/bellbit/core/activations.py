"""Symmetric integer rounding of activations (DBellQuant, arXiv 2507.01027, §4.1)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Scope = Literal["token", "tensor"]
ACTIVATION_BITS = (16, 8, 6)  # 16: left as they are
SMALLEST_MAXIMUM = 1e-5

# Tokens that go through a block together: as fast as 4096 on two cores, 7 % faster than 1024, at 70 MB less.
TOKENS_AT_ONCE = 2048


def windows_at_once(length: int, bits: int, scope: Scope) -> int:
    """How many windows of `length` tokens go through a model together.

    With one activation step per tensor it is one, as at inference: the step would depend on which windows meet.
    """
    return 1 if bits < 16 and scope == "tensor" else max(1, TOKENS_AT_ONCE // length)


def quantize_activations(x: Tensor, bits: int, scope: Scope = "token") -> Tensor:
    """s = max|x| / (2^(b−1) − 1), x̂ = round(x/s)·s, with one s per token or per tensor.

    x: float (..., features), one token per row. bits: 16 returns `x` itself. Computed in float32, returned in x's
    dtype: in bfloat16 one code of eleven would be another at 8 bits.
    """
    if bits == 16:
        return x
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True) if scope == "token" else wide.abs().amax()
    step = largest.clamp_min(SMALLEST_MAXIMUM) / (2 ** (bits - 1) - 1)
    return (wide / step).round_().mul_(step).to(x.dtype)
