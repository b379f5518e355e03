"""The types that a GGUF file stores matrices in: Q1_0 as it lies in `sign128`, and wider ones by rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bellbit.errors import BellbitError
from bellbit.packed.planes import Sign128

Array = Any  # numpy.ndarray; its own generic type says nothing about shapes


@dataclass(frozen=True)
class GgufType:
    """A storage type. bits: per weight. block: what columns must be a multiple of. pack: float32 rows to bytes."""

    name: str
    bits: float
    block: int
    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]


def _library(name: str, bits: float, block: int) -> GgufType:
    """A type that the gguf package itself rounds to."""

    def pack(values: Array) -> Array:
        import gguf

        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])

    def unpack(stored: Array) -> Array:
        import gguf

        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])

    return GgufType(name, bits, block, pack, unpack)


def dequantize(stored: Array, kind: Any) -> Array:
    """Float32 values of a tensor as it lies in a file: what the gguf package does, and Q1_0, which it cannot.

    stored: uint8 (…, bytes of a row), or float32 or float16. kind: a gguf.GGMLQuantizationType.
    """
    import gguf

    if kind != gguf.GGMLQuantizationType.Q1_0:
        return gguf.quants.dequantize(stored, kind)
    shape = gguf.quants.quant_shape_from_byte_shape(stored.shape, kind)
    rows = torch.tensor(stored).flatten(0, -2)
    return Sign128(shape=(len(rows), shape[-1]), blocks=rows).dequantize().numpy().reshape(shape)


Q6_K_BLOCK, Q6_K_GROUP, Q6_K_BYTES = 256, 16, 210


def pack_q6_k(values: Array) -> Array:
    """GGML's Q6_K: codes −32 … 31, an int8 scale per 16 columns, one float16 for 256: uint8 (rows, bytes).

    Per block 128 bytes of low nibbles, 64 of high bit pairs, 16 scales, d; w = d·scale·code. Each group's scale takes
    its largest magnitude to −32, as llama.cpp's does before it searches around that.
    values: float32 (rows, columns), columns a multiple of 256.
    """
    rows = len(values)
    groups = values.reshape(rows, -1, Q6_K_BLOCK // Q6_K_GROUP, Q6_K_GROUP).astype(np.float32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    wanted = extreme / -32
    largest = np.take_along_axis(wanted, np.abs(wanted).argmax(axis=-1, keepdims=True), axis=-1)
    d = (largest / -128).astype(np.float16)
    step = d.astype(np.float32)
    scales = np.clip(np.rint(np.divide(wanted, step, out=np.zeros_like(wanted), where=step != 0)), -128, 127)
    unit = (step * scales)[..., None]
    codes = np.clip(np.rint(np.divide(groups, unit, out=np.zeros_like(groups), where=unit != 0)), -32, 31) + 32
    # two halves of 128 columns, each of four runs of 32
    runs = codes.astype(np.uint8).reshape(rows, -1, 2, 4, 32)
    low = np.concatenate([runs[..., :2, :] & 15 | (runs[..., 2:, :] & 15) << 4], axis=-2)
    high = sum((runs[..., i, :] >> 4) << (2 * i) for i in range(4))
    blocks = low.shape[1]
    parts = [
        low.reshape(rows, blocks, 128),
        np.asarray(high, np.uint8).reshape(rows, blocks, 64),
        scales.astype(np.int8).view(np.uint8).reshape(rows, blocks, 16),
        d.view(np.uint8).reshape(rows, blocks, 2),
    ]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _q6_k() -> GgufType:
    return GgufType("Q6_K", 8 * Q6_K_BYTES / Q6_K_BLOCK, Q6_K_BLOCK, pack_q6_k, _library("Q6_K", 0, 0).unpack)


TYPES: dict[str, GgufType] = {
    kind.name: kind
    for kind in (
        _library("Q4_0", 4.5, 32),
        _library("Q4_1", 5.0, 32),
        _library("Q5_0", 5.5, 32),
        _library("Q5_1", 6.0, 32),
        _q6_k(),
        _library("Q8_0", 8.5, 32),
        _library("F16", 16, 1),
    )
}


def relative_error(found: Array, values: Array) -> float:
    """Squared, of what was stored for float32 `values`."""
    return float(np.square(found.astype(np.float32) - values).sum()) / (float(np.square(values).sum()) or 1.0)


def choose(values: Array, budget: float) -> tuple[GgufType, Array, float]:
    """The type of at most `budget` bits a weight with the least squared error; its bytes and that error, relative.

    values: float32 (rows, columns). Raises BellbitError if none fits.
    """
    best: tuple[GgufType, Array, float] | None = None
    for kind in TYPES.values():
        if kind.bits > budget or values.shape[1] % kind.block:
            continue
        stored = kind.pack(values)
        error = relative_error(kind.unpack(stored), values)
        if best is None or error < best[2]:
            best = kind, stored, error
    if best is None:
        raise BellbitError(f"no GGUF type of at most {budget} bits a weight holds rows of {values.shape[1]} columns")
    return best
