"""The layouts a quantized weight is stored in, byte for byte as docs/format.md specifies them.

A `PackedTensor` is a frozen dataclass whose tensor fields are exactly what a checkpoint stores under the
linear layer's name; all that it says about its size follows from them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from bellbit.core.binarize import SCALES_PER_ROW, BinarizedBlock, reconstruct_block
from bellbit.core.compensate import blocks
from bellbit.core.uniform import UniformGroup
from bellbit.errors import BellbitError
from bellbit.packed.bits import pack_bits, packed_width, unpack_bits


class TensorSpec(NamedTuple):
    """Shape, dtype and purpose ("signs", "bitmap", "codes" or "scales") of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: str


@dataclass(frozen=True, eq=False)
class PackedTensor(ABC):
    """A quantized weight of `shape` (out, in) in the form it is stored and run in."""

    layout: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]]
    nominal_from: ClassVar[tuple[str, ...]] = ()  # the stored tensors whose content `nominal_bits` depends on
    shape: tuple[int, int]

    @classmethod
    @abstractmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """What is stored for a weight of `shape` (out, in) under the layout's `options`, by field name."""

    @property
    def options(self) -> dict[str, Any]:
        """The layout's parameters, as config.json keeps them."""
        return {name: getattr(self, name) for name in self.option_names}

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per weight as papers quote them: without scales and bitmaps."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weights that the stored bits stand for: float32 (out, in)."""

    @classmethod
    def build(cls, shape: tuple[int, int], options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """From the stored tensors."""
        return cls(shape=shape, **options, **tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def bits(self) -> dict[str, float]:
        """Stored bits per weight by purpose, counted from the stored tensors."""
        return stored_bits(type(self), self.shape, self.options)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of weights."""
        return sum(self.bits.values())


def stored_bits(layout: type[PackedTensor], shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, float]:
    """Stored bits per weight by purpose for a weight of `shape` (out, in)."""
    bits: dict[str, float] = {}
    for spec in layout.spec(shape, options).values():
        size = 8 * spec.dtype.itemsize * math.prod(spec.shape)
        bits[spec.part] = bits.get(spec.part, 0.0) + size / math.prod(shape)
    return bits


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

    signs: uint8 (out, ⌈in/8⌉), sign of the first binary term.
    second: uint8 (out, ⌈in/8⌉), the group of an ordinary weight, the second sign of a salient one.
    scales: float16 (out, blocks, 7), or int8 with `exponents`; in the order of `core.binarize`.
    exponents: uint8 (out, blocks) with scale_bits 8, else absent.
    salient: uint8 (⌈in/8⌉,), the salient columns.
    """

    layout: ClassVar[str] = "codebook2"
    option_names: ClassVar[tuple[str, ...]] = ("block_size", "scale_bits")
    nominal_from: ClassVar[tuple[str, ...]] = ("salient",)
    block_size: int
    scale_bits: int
    signs: Tensor
    second: Tensor
    scales: Tensor
    salient: Tensor
    exponents: Tensor | None = field(default=None)

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        width, count = packed_width(columns), -(-columns // options["block_size"])
        wide = options["scale_bits"] == 16
        spec = {
            "signs": TensorSpec((rows, width), torch.uint8, "signs"),
            "second": TensorSpec((rows, width), torch.uint8, "bitmap"),
            "scales": TensorSpec((rows, count, SCALES_PER_ROW), torch.float16 if wide else torch.int8, "scales"),
            "salient": TensorSpec((width,), torch.uint8, "bitmap"),
        }
        if not wide:
            spec["exponents"] = TensorSpec((rows, count), torch.uint8, "scales")
        return spec

    @classmethod
    def pack(cls, parts: list[BinarizedBlock], block_size: int, scale_bits: int = 16) -> Codebook2:
        """From the blocks of one weight, left to right."""
        signs = torch.cat([part.signs for part in parts], dim=1)
        scales = torch.stack([part.scales for part in parts], dim=1)
        exponents = None
        if scale_bits == 8:
            scales, exponents = shared_exponent(scales)
        return cls(
            shape=(signs.shape[0], signs.shape[1]),
            block_size=block_size,
            scale_bits=scale_bits,
            signs=pack_bits(signs),
            second=pack_bits(torch.cat([part.second for part in parts], dim=1)),
            scales=scales.half() if scale_bits == 16 else scales,
            salient=pack_bits(torch.cat([part.salient for part in parts])),
            exponents=exponents,
        )

    def dequantize(self) -> Tensor:
        columns = self.shape[1]
        signs, second = unpack_bits(self.signs, columns), unpack_bits(self.second, columns)
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


@dataclass(frozen=True, eq=False)
class Uniform(PackedTensor):
    """Codes of `width` bits on a uniform grid per row and group of columns: GPTQ and RTN results.

    codes: uint8 (width, out, ⌈in/8⌉), one bit plane per bit of the code, lowest first.
    scales: float16 (out, groups). zeros: uint8 (out, groups). w = scale·(code − zero).
    """

    layout: ClassVar[str] = "uniform"
    option_names: ClassVar[tuple[str, ...]] = ("width", "group_size")
    width: int
    group_size: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = -(-columns // options["group_size"])
        return {
            "codes": TensorSpec((options["width"], rows, packed_width(columns)), torch.uint8, "codes"),
            "scales": TensorSpec((rows, groups), torch.float16, "scales"),
            "zeros": TensorSpec((rows, groups), torch.uint8, "scales"),
        }

    @classmethod
    def pack(cls, groups: list[UniformGroup], width: int, group_size: int) -> Uniform:
        """From the groups of one weight, left to right."""
        codes = torch.cat([group.codes for group in groups], dim=1)
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            width=width,
            group_size=group_size,
            codes=torch.stack([pack_bits((codes >> bit & 1).bool()) for bit in range(width)]),
            scales=torch.cat([group.scale for group in groups], dim=1).half(),
            zeros=torch.cat([group.zero for group in groups], dim=1),
        )

    def dequantize(self) -> Tensor:
        columns = self.shape[1]
        planes = unpack_bits(self.codes, columns)
        codes = sum((plane.float() * 2**bit for bit, plane in enumerate(planes)), torch.zeros(()))
        group = torch.arange(columns, device=codes.device) // self.group_size
        return self.scales.float()[:, group] * (codes - self.zeros.float()[:, group])

    @property
    def nominal_bits(self) -> float:
        return float(self.width)


LAYOUTS: dict[str, type[PackedTensor]] = {cls.layout: cls for cls in (Codebook2, Uniform)}
