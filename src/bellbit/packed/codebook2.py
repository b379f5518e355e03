"""The layout `codebook2` and its scales; docs/format.md has it byte for byte."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbit.core.binarize import SCALES_PER_ROW, BinarizedBlock, reconstruct_block
from bellbit.core.compensate import blocks
from bellbit.errors import BellbitError
from bellbit.packed.bits import pack_bits, packed_width, unpack_bits
from bellbit.packed.tensor import PackedTensor, TensorSpec

SHARED_EXPONENT_BIAS = 127
_MANTISSA_BITS = 7


def shared_exponent(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (..., 7) as 8-bit integers times a power of two per row: int8 (..., 7) and uint8 (...).

    value = integer · 2^(exponent − 127 − 6), the power chosen so that the largest of the seven uses all of
    −127 … 127 that it can (the shared exponent of OCP MX formats).
    """
    largest = scales.abs().amax(dim=-1).double().clamp_min(2.0**-110)
    exponent = torch.ceil(torch.log2(largest * 64 / 127)).clamp(-110, 127)
    step = torch.exp2(exponent - 6)
    integers = (scales.double() / step[..., None]).round_().clamp_(-127, 127)
    return integers.to(torch.int8), (exponent + SHARED_EXPONENT_BIAS).to(torch.uint8)


def from_shared_exponent(integers: Tensor, exponents: Tensor) -> Tensor:
    """The inverse of `shared_exponent`: float32 (..., 7)."""
    step = torch.exp2(exponents.float() - SHARED_EXPONENT_BIAS - 6)
    return integers.float() * step[..., None]


def round_scales(scales: Tensor, scale_bits: int) -> Tensor:
    """Scales (..., 7) as they come back from storage, 16 or 8 bits each: float32.

    Raises BellbitError if a scale is too large for float16.
    """
    if scale_bits == 8:
        return from_shared_exponent(*shared_exponent(scales))
    rounded = scales.half().float()
    if not bool(rounded.isfinite().all()):
        raise BellbitError(
            f"a scale of {float(scales.abs().max()):.3g} does not fit float16 (at most 65504); try --scale-bits 8"
        )
    return rounded


@dataclass(frozen=True, eq=False)
class Codebook2(PackedTensor):
    """Two bits a weight into 4-entry tables per row and block of columns: every BRAQ result.

    codes: uint8 (out, ⌈in/4⌉), two bits a column, least significant first: the sign of the first binary term; the group
        of an ordinary weight, the second sign of a salient one.
    scales: float16 (out, blocks, 7), or int8 with `exponents`; in the order of `core.binarize`.
    exponents: uint8 (out, blocks) with scale_bits 8, else absent.
    salient: uint8 (⌈in/8⌉,), the salient columns.
    """

    layout: ClassVar[str] = "codebook2"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {"block_size": range(1, 2**31), "scale_bits": (8, 16)}
    nominal_from: ClassVar[tuple[str, ...]] = ("salient",)
    block_size: int
    scale_bits: int
    codes: Tensor
    scales: Tensor
    salient: Tensor
    exponents: Tensor | None = field(default=None)

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        count = -(-columns // options["block_size"])
        wide = options["scale_bits"] == 16
        spec = {
            "codes": TensorSpec((rows, packed_width(2 * columns)), torch.uint8, ("signs", "bitmap")),
            "scales": TensorSpec((rows, count, SCALES_PER_ROW), torch.float16 if wide else torch.int8, ("scales",)),
            "salient": TensorSpec((packed_width(columns),), torch.uint8, ("bitmap",)),
        }
        if not wide:
            spec["exponents"] = TensorSpec((rows, count), torch.uint8, ("scales",))
        return spec

    @classmethod
    def pack(cls, parts: list[BinarizedBlock], block_size: int, scale_bits: int = 16) -> Codebook2:
        """From the blocks of one weight, left to right."""
        signs = torch.cat([part.signs for part in parts], dim=1)
        second = torch.cat([part.second for part in parts], dim=1)
        scales = torch.stack([part.scales for part in parts], dim=1)
        exponents = None
        if scale_bits == 8:
            scales, exponents = shared_exponent(scales)
        return cls(
            shape=(signs.shape[0], signs.shape[1]),
            block_size=block_size,
            scale_bits=scale_bits,
            codes=pack_bits(torch.stack((signs, second), dim=-1).flatten(-2)),
            scales=scales.half() if scale_bits == 16 else scales,
            salient=pack_bits(torch.cat([part.salient for part in parts])),
            exponents=exponents,
        )

    def dequantize(self) -> Tensor:
        columns = self.shape[1]
        signs, second = unpack_bits(self.codes, 2 * columns).unflatten(-1, (-1, 2)).unbind(dim=-1)
        salient = unpack_bits(self.salient, columns)
        scales = self.scales.float() if self.exponents is None else from_shared_exponent(self.scales, self.exponents)
        parts = [
            reconstruct_block(BinarizedBlock(signs[:, block], second[:, block], scales[:, i], salient[block]))
            for i, block in enumerate(blocks(columns, self.block_size))
        ]
        return torch.cat(parts, dim=1)

    @property
    def nominal_bits(self) -> float:
        columns = self.shape[1]
        return 1 + int(unpack_bits(self.salient, columns).sum()) / columns
