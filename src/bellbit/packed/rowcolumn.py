"""The layout `rowcolumn2`, ARB_RC's results; docs/format.md has it byte for byte."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbit.core.compensate import blocks
from bellbit.core.rowcolumn import RowColumnBlock, reconstruct
from bellbit.packed.bits import pack_bits, packed_width, unpack_bits
from bellbit.packed.tensor import PackedTensor, TensorSpec


@dataclass(frozen=True, eq=False)
class RowColumn(PackedTensor):
    """Two bits a weight, scales per row and block and per column.

    codes: uint8 (out, ⌈in/4⌉), two bits a column, least significant first: the sign of the first binary term; then the
        zone, but with `split` 0 the sign of the second term in salient columns.
    rows: float16 (out, blocks, 4), with `split` 1 (…, 6). columns: float16 (2, in), with `split` 1 (4, in).
    salient: uint8 (⌈in/8⌉,), the salient columns.
    residual: uint8 (out, ⌈count/8⌉) with `split` 1, else absent: signs of second terms, of the `count` salient columns.
    """

    layout: ClassVar[str] = "rowcolumn2"
    allowed_options: ClassVar[Mapping[str, Container[int]]] = {
        "block_size": range(1, 2**31),
        "split": (0, 1),
        "count": range(2**31),
    }
    nominal_from: ClassVar[tuple[str, ...]] = ("salient",)
    block_size: int
    split: int
    count: int
    codes: Tensor
    rows: Tensor
    columns: Tensor
    salient: Tensor
    residual: Tensor | None = field(default=None)

    @classmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        rows, columns = shape
        terms = 4 if options["split"] else 2
        spec = {
            "codes": TensorSpec((rows, packed_width(2 * columns)), torch.uint8, ("signs", "bitmap")),
            "rows": TensorSpec((rows, -(-columns // options["block_size"]), 2 + terms), torch.float16, ("scales",)),
            "columns": TensorSpec((terms, columns), torch.float16, ("scales",)),
            "salient": TensorSpec((packed_width(columns),), torch.uint8, ("bitmap",)),
        }
        if options["split"]:
            spec["residual"] = TensorSpec((rows, packed_width(options["count"])), torch.uint8, ("signs",))
        return spec

    @classmethod
    def pack(cls, parts: list[RowColumnBlock], block_size: int, split: bool) -> RowColumn:
        """From the blocks of one weight, left to right."""
        planes = zip(*((part.signs, part.zone, part.residual) for part in parts), strict=True)
        signs, zone, residual = (torch.cat(plane, dim=1) for plane in planes)
        salient = torch.cat([part.salient for part in parts])
        second = zone if split else torch.where(salient, residual, zone)
        return cls(
            shape=(signs.shape[0], signs.shape[1]),
            block_size=block_size,
            split=int(split),
            count=int(salient.sum()) if split else 0,
            codes=pack_bits(torch.stack((signs, second), dim=-1).flatten(-2)),
            rows=torch.stack([part.rows for part in parts], dim=1).half(),
            columns=torch.cat([part.columns for part in parts], dim=1).half(),
            salient=pack_bits(salient),
            residual=pack_bits(residual[:, salient]) if split else None,
        )

    def dequantize(self) -> Tensor:
        width = self.shape[1]
        signs, second = unpack_bits(self.codes, 2 * width).unflatten(-1, (-1, 2)).unbind(dim=-1)
        salient = unpack_bits(self.salient, width)
        residual, zone = second & salient, second & ~salient
        if self.residual is not None:
            zone = second
            residual = torch.zeros_like(second)
            residual[:, salient] = unpack_bits(self.residual, self.count)
        rows, columns = self.rows.float(), self.columns.float()
        parts = [
            reconstruct(RowColumnBlock(signs[:, b], zone[:, b], residual[:, b], rows[:, i], columns[:, b], salient[b]))
            for i, b in enumerate(blocks(width, self.block_size))
        ]
        return torch.cat(parts, dim=1)

    @property
    def nominal_bits(self) -> float:
        return 1 + int(unpack_bits(self.salient, self.shape[1]).sum()) / self.shape[1]
