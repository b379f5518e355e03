"""The blockwise Hadamard transform of BBQ (arXiv 2603.01599)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def block_sizes(width: int) -> list[int]:
    """Blocks of 128, then of the powers of two that the rest is made of, largest first: 576 = 4·128 + 64."""
    return [BLOCK] * (width // BLOCK) + [size for size in (64, 32, 16, 8, 4, 2, 1) if width % BLOCK & size]


def sylvester(size: int) -> Tensor:
    """The normalized Sylvester-Hadamard matrix, orthogonal and symmetric: float64 (size, size)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def hadamard(x: Tensor) -> Tensor:
    """x·H with H block-diagonal over the last dimension, any width: (..., width), in x's dtype."""
    whole = x.shape[-1] // BLOCK * BLOCK
    parts = []
    if whole:
        parts.append((x[..., :whole].unflatten(-1, (-1, BLOCK)) @ _matrix(BLOCK, x.dtype, x.device)).flatten(-2))
    start = whole
    for size in block_sizes(x.shape[-1] - whole):
        parts.append(x[..., start : start + size] @ _matrix(size, x.dtype, x.device))
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


_MATRICES: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`sylvester` where and as it is needed, made once: a plain dict, which torch.compile sees through."""
    key = (size, dtype, device)
    if key not in _MATRICES:
        _MATRICES[key] = sylvester(size).to(device, dtype)
    return _MATRICES[key]
