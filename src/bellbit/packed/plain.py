"""The layouts of weights that are on no grid: `nf`, and `float16` for what is not quantized beside inputs that are."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbit.core.baselines import nf_levels
from bellbit.errors import BellbitError
from bellbit.packed.planes import codes_and_row_scales, pack_codes, unpack_codes
from bellbit.packed.tensor import PackedTensor, TensorSpec


@dataclass(frozen=True, eq=False)
class NormalFloat(PackedTensor):
    """Codes of NF's levels, which are constants, times one scale per row.

    codes: uint8 (width, out, ⌈in/8⌉), one bit plane per bit of the code, lowest first. scales: float32 (out,).
    """

    layout: ClassVar[str] = "nf"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {"width": range(2, 5)}
    width: int
    codes: Tensor
    scales: Tensor

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return codes_and_row_scales(shape, options["width"])

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, width: int) -> NormalFloat:
        """codes: uint8 (out, in), 0 … 2^width − 1. scales: float32 (out,)."""
        shape = (codes.shape[0], codes.shape[1])
        return cls(shape=shape, width=width, codes=pack_codes(codes, width), scales=scales.float())

    def dequantize(self) -> Tensor:
        codes = unpack_codes(self.codes, self.shape[1]).long()
        return nf_levels(self.width).to(codes.device)[codes] * self.scales[:, None]

    @property
    def nominal_bits(self) -> float:
        return float(self.width)


@dataclass(frozen=True, eq=False)
class Float16(PackedTensor):
    """A weight as it is, rounded to float16. values: float16 (out, in)."""

    layout: ClassVar[str] = "float16"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {}
    values: Tensor

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(shape, torch.float16, ("codes",))}

    @classmethod
    def pack(cls, weight: Tensor) -> Float16:
        """weight: float (out, in). Raises BellbitError if it does not fit float16."""
        values = weight.half()
        if not bool(values.isfinite().all()):
            raise BellbitError(f"a weight of {float(weight.abs().max()):.3g} does not fit float16 (at most 65504)")
        return cls(shape=(weight.shape[0], weight.shape[1]), values=values)

    def dequantize(self) -> Tensor:
        return self.values.float()

    @property
    def nominal_bits(self) -> float:
        return 16.0
