"""The layout `partial8`, PB-LLM's results; docs/format.md has it byte for byte."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbit.core.compensate import blocks
from bellbit.core.partial import BITS, PartialBlock, reconstruct
from bellbit.packed.bits import pack_bits, packed_width, unpack_bits
from bellbit.packed.tensor import PackedTensor, TensorSpec


@dataclass(frozen=True, eq=False)
class Partial(PackedTensor):
    """Signs, and 8-bit codes in their place for `count` weights anywhere.

    salient: uint8 (out, ⌈in/8⌉), a bit plane of where those are. signs: uint8 (⌈(out·in − count)/8⌉,), of the others.
    codes: uint8 (count,). Both row by row, left to right. scales: float16 (out, blocks, 3), as `core.partial` has them.
    """

    layout: ClassVar[str] = "partial8"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {"block_size": range(1, 2**31), "count": range(2**62)}
    block_size: int
    count: int
    salient: Tensor
    signs: Tensor
    codes: Tensor
    scales: Tensor

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = -(-columns // options["block_size"])
        return {
            "salient": TensorSpec((rows, packed_width(columns)), torch.uint8, ("bitmap",)),
            "signs": TensorSpec((packed_width(rows * columns - options["count"]),), torch.uint8, ("signs",)),
            "codes": TensorSpec((options["count"],), torch.uint8, ("codes",)),
            "scales": TensorSpec((rows, groups, 3), torch.float16, ("scales",)),
        }

    @classmethod
    def pack(cls, parts: list[PartialBlock], block_size: int) -> Partial:
        """From the blocks of one weight, left to right."""
        salient, signs, codes = (torch.cat(plane, dim=1) for plane in zip(*(part[:3] for part in parts), strict=True))
        return cls(
            shape=(salient.shape[0], salient.shape[1]),
            block_size=block_size,
            count=int(salient.sum()),
            salient=pack_bits(salient),
            signs=pack_bits(signs[~salient]),
            codes=codes[salient],
            scales=torch.stack([part.scales for part in parts], dim=1).half(),
        )

    def dequantize(self) -> Tensor:
        rows, columns = self.shape
        salient = unpack_bits(self.salient, columns)
        signs = torch.zeros(self.shape, dtype=torch.bool, device=salient.device)
        codes = torch.zeros(self.shape, dtype=torch.uint8, device=salient.device)
        signs[~salient] = unpack_bits(self.signs, rows * columns - self.count)
        codes[salient] = self.codes
        parts = [
            reconstruct(PartialBlock(salient[:, b], signs[:, b], codes[:, b], self.scales[:, i]))
            for i, b in enumerate(blocks(columns, self.block_size))
        ]
        return torch.cat(parts, dim=1)

    @property
    def nominal_bits(self) -> float:
        share = self.count / (self.shape[0] * self.shape[1])
        return 1 + (BITS - 1) * share
