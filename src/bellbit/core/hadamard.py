"""The blockwise Hadamard transform of BBQ (arXiv 2603.01599)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def block_sizes(width: int) -> list[int]:
    """Blocks of 128, then of the powers of two that the rest is made of, largest first: 576 = 4·128 + 64."""
    return [BLOCK] * (width // BLOCK) + [size for size in (64, 32, 16, 8, 4, 2, 1) if width % BLOCK & size]


def sylvester(size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The normalized Sylvester-Hadamard matrix, orthogonal and symmetric: (size, size), size at most 128.

    Entry (i, j) is −1 to the number of bits that i and j have in common, over √size. It is made where it is used: a
    kept one could come from inference mode, or be a fake tensor of a compiler.
    """
    i = torch.arange(size, device=device)
    both = i[:, None] & i
    for shift in (4, 2, 1):
        both = both ^ (both >> shift)
    return (1 - 2 * (both & 1)).to(dtype) * size**-0.5


def hadamard(x: Tensor) -> Tensor:
    """x·H with H block-diagonal over the last dimension, any width: (..., width), in x's dtype, under autocast, too."""
    whole = x.shape[-1] // BLOCK * BLOCK
    parts = []
    with torch.autocast(x.device.type, enabled=False):
        if whole:
            matrix = sylvester(BLOCK, x.dtype, x.device)
            parts.append((x[..., :whole].unflatten(-1, (-1, BLOCK)) @ matrix).flatten(-2))
        start = whole
        for size in block_sizes(x.shape[-1] - whole):
            parts.append(x[..., start : start + size] @ sylvester(size, x.dtype, x.device))
            start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
