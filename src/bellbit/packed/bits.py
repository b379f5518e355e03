"""Bit planes: eight columns a byte, column 8·i + j in bit j of byte i, unused bits of the last byte zero."""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = torch.arange(256, dtype=torch.uint8)
_BITS_OF_BYTE = (_BYTES[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool()  # (256, 8)
_BIT_VALUES = 1 << torch.arange(8, dtype=torch.uint8)


def packed_width(columns: int) -> int:
    """Bytes that `columns` bits take."""
    return -(-columns // 8)


def pack_bits(bits: Tensor) -> Tensor:
    """bool (..., columns) -> uint8 (..., ⌈columns / 8⌉)."""
    padding = -bits.shape[-1] % 8
    padded = torch.nn.functional.pad(bits, (0, padding))
    bytes_ = padded.unflatten(-1, (-1, 8)).to(torch.uint8) * _BIT_VALUES.to(bits.device)
    return bytes_.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """uint8 (..., ⌈columns / 8⌉) -> bool (..., columns)."""
    if packed.device.type == "cpu":
        bits = _BITS_OF_BYTE[packed.int()]
    else:  # made there: the table would be copied at every call
        bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).bool()
    return bits.flatten(-2)[..., :columns]
