"""The layouts of bit planes: `uniform`, `symmetric`, `sign128`, `bellbox`; docs/format.md has them byte for byte."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbit.core.hadamard import hadamard
from bellbit.core.uniform import UniformGroup
from bellbit.packed.bits import pack_bits, packed_width, unpack_bits
from bellbit.packed.tensor import PackedTensor, TensorSpec


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """uint8 (out, in) codes of `width` bits as bit planes, lowest first: uint8 (width, out, ⌈in/8⌉)."""
    return torch.stack([pack_bits((codes >> bit & 1).bool()) for bit in range(width)])


def unpack_codes(planes: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_codes`, as float32 (out, in)."""
    bits = unpack_bits(planes, columns)
    return sum((plane.float() * 2**bit for bit, plane in enumerate(bits)), torch.zeros(()))


SIGN_BLOCK = 128  # columns that share a scale wherever kernels want it so
_SCALE_BYTES = 2
_LAST_STEP = 255


@dataclass(frozen=True, eq=False)
class Uniform(PackedTensor):
    """Codes of `width` bits on a uniform grid per row and group of columns: GPTQ and RTN results.

    codes: uint8 (width, out, ⌈in/8⌉), one bit plane per bit of the code, lowest first.
    scales: float16 (out, groups). zeros: uint8 (out, groups). w = scale·(code − zero).
    """

    layout: ClassVar[str] = "uniform"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {"width": range(1, 9), "group_size": range(1, 2**31)}
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
            "codes": TensorSpec((options["width"], rows, packed_width(columns)), torch.uint8, ("codes",)),
            "scales": TensorSpec((rows, groups), torch.float16, ("scales",)),
            "zeros": TensorSpec((rows, groups), torch.uint8, ("scales",)),
        }

    @classmethod
    def pack(cls, groups: list[UniformGroup], width: int, group_size: int) -> Uniform:
        """From the groups of one weight, left to right."""
        codes = torch.cat([group.codes for group in groups], dim=1)
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            width=width,
            group_size=group_size,
            codes=pack_codes(codes, width),
            scales=torch.cat([group.scale for group in groups], dim=1).half(),
            zeros=torch.cat([group.zero for group in groups], dim=1),
        )

    def dequantize(self) -> Tensor:
        columns = self.shape[1]
        codes = unpack_codes(self.codes, columns)
        group = torch.arange(columns, device=codes.device) // self.group_size
        return self.scales.float()[:, group] * (codes - self.zeros.float()[:, group])

    @property
    def nominal_bits(self) -> float:
        return float(self.width)


@dataclass(frozen=True, eq=False)
class Symmetric(PackedTensor):
    """Codes of `width` bits on a grid without zero, per row and group of columns: w = scale·(code − (2^width − 1)/2).

    codes: uint8 (width, out, ⌈in/8⌉), one bit plane per bit of the code, lowest first.
    steps: uint8 (out, groups), of each scale below the largest: scale = 2^(octaves[0] − octaves[1]·steps).
    octaves: float32 (2,), where the largest is and how long a step is, so that the smallest is 255 steps away.
    """

    layout: ClassVar[str] = "symmetric"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {"width": range(1, 9), "group_size": range(1, 2**31)}
    width: int
    group_size: int
    codes: Tensor
    steps: Tensor
    octaves: Tensor

    @property
    def zero(self) -> float:
        """What is subtracted from a code."""
        return (2**self.width - 1) / 2

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "codes": TensorSpec((options["width"], rows, packed_width(columns)), torch.uint8, ("codes",)),
            "steps": TensorSpec((rows, -(-columns // options["group_size"])), torch.uint8, ("scales",)),
            "octaves": TensorSpec((2,), torch.float32, ("scales",)),
        }

    @classmethod
    def pack(cls, levels: Tensor, scales: Tensor, width: int, group_size: int = SIGN_BLOCK) -> Symmetric:
        """levels: (out, in), ±½ … ±(2^width − 1)/2. scales: float (out, groups), positive; rounded to a step here.

        The demo model's span 4 octaves a weight (at most 10), so that a step is a sixtieth and changes them by .3 %.
        """
        codes = (levels + (2**width - 1) / 2).to(torch.uint8)
        shape = (levels.shape[0], levels.shape[1])
        wanted = scales.double().log2()
        octaves = torch.stack([wanted.max(), (wanted.max() - wanted.min()) / _LAST_STEP]).float()
        steps = ((octaves[0] - wanted) / octaves[1].clamp_min(1e-9)).round_().clamp_(0, _LAST_STEP).to(torch.uint8)
        return cls(shape, width, group_size, pack_codes(codes, width), steps, octaves)

    @property
    def scales(self) -> Tensor:
        """float32 (out, groups)."""
        top, step = self.octaves.double()
        return torch.exp2(top - step * self.steps).float()

    def dequantize(self) -> Tensor:
        columns = self.shape[1]
        group = torch.arange(columns, device=self.codes.device) // self.group_size
        return self.scales[:, group] * (unpack_codes(self.codes, columns) - self.zero)

    @property
    def nominal_bits(self) -> float:
        return float(self.width)


@dataclass(frozen=True, eq=False)
class Sign128(PackedTensor):
    """One sign per weight and one float16 scale per row and 128 columns: w = ±d, the bytes of llama.cpp's Q1_0.

    blocks: uint8 (out, bytes of a row), per block d and then its bits, 1 for +d. A last block shorter than 128 has
    fewer bytes of bits; then the row is no Q1_0 row.
    """

    layout: ClassVar[str] = "sign128"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {}
    blocks: Tensor

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        row_bytes = _SCALE_BYTES * -(-columns // SIGN_BLOCK) + packed_width(columns)
        return {"blocks": TensorSpec((rows, row_bytes), torch.uint8, ("signs",))}

    @property
    def bits(self) -> dict[str, float]:
        columns = self.shape[1]
        scales = 8 * _SCALE_BYTES * -(-columns // SIGN_BLOCK)
        return {"signs": (8 * self.blocks.shape[1] - scales) / columns, "scales": scales / columns}

    @classmethod
    def pack(cls, signs: Tensor, scales: Tensor) -> Sign128:
        """signs: bool (out, in), True for +. scales: float (out, ⌈in/128⌉), rounded to float16 here."""
        parts = []
        for block, bits in enumerate(signs.split(SIGN_BLOCK, dim=1)):
            parts += [scales[:, block, None].half().contiguous().view(torch.uint8), pack_bits(bits)]
        return cls(shape=(signs.shape[0], signs.shape[1]), blocks=torch.cat(parts, dim=1))

    def dequantize(self) -> Tensor:
        weights = []
        start = 0
        for first in range(0, self.shape[1], SIGN_BLOCK):
            columns = min(SIGN_BLOCK, self.shape[1] - first)
            bits = start + _SCALE_BYTES
            stop = bits + packed_width(columns)
            scale = self.blocks[:, start:bits].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
            weights.append(torch.where(unpack_bits(self.blocks[:, bits:stop], columns), scale, -scale))
            start = stop
        return torch.cat(weights, dim=1)

    @property
    def nominal_bits(self) -> float:
        return 1.0


def codes_and_row_scales(shape: tuple[int, int], width: int) -> dict[str, TensorSpec]:
    """What is stored where a row has codes of `width` bits and one scale."""
    rows, columns = shape
    return {
        "codes": TensorSpec((width, rows, packed_width(columns)), torch.uint8, ("codes",)),
        "scales": TensorSpec((rows,), torch.float32, ("scales",)),
    }


@dataclass(frozen=True, eq=False)
class Bellbox(PackedTensor):
    """Codes on one grid per row: what quantization while training leaves, BBQ (arXiv 2603.01599) above all.

    codes: uint8 (width, out, ⌈in/8⌉), one bit plane per bit of the code, lowest first.
    scales: float32 (out,), the distance of two levels; γ / 2^(b−1) for BBQ.
    half: 1 if levels lie at ±½, ±3/2, …, 0 if at integers. rotated: 1 if the weight is in the domain of the rotated
    input, y = (x·H)·(scale·(code − zero))ᵀ with H blockwise Hadamard, 0 if in the input's own.
    """

    layout: ClassVar[str] = "bellbox"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {"width": range(1, 5), "half": (0, 1), "rotated": (0, 1)}
    width: int
    half: int
    rotated: int
    codes: Tensor
    scales: Tensor

    @property
    def zero(self) -> float:
        """What is subtracted from a code."""
        return 2 ** (self.width - 1) - 0.5 * self.half

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return codes_and_row_scales(shape, options["width"])

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, width: int, half: bool, rotated: bool = True) -> Bellbox:
        """codes: uint8 (out, in), 0 … 2^width − 1. scales: float32 (out,)."""
        return cls(
            shape=(codes.shape[0], codes.shape[1]),
            width=width,
            half=int(half),
            rotated=int(rotated),
            codes=pack_codes(codes, width),
            scales=scales.float(),
        )

    def levels(self) -> Tensor:
        """The weights in their own domain: float32 (out, in)."""
        return self.scales[:, None] * (unpack_codes(self.codes, self.shape[1]) - self.zero)

    def dequantize(self) -> Tensor:
        return hadamard(self.levels()) if self.rotated else self.levels()  # H is symmetric: (x·H)·Ŵᵀ = x·(Ŵ·H)ᵀ

    @property
    def nominal_bits(self) -> float:
        return float(self.width)
