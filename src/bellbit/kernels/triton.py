"""Kernels for NVIDIA GPUs in Triton: codes of activations, their product with a weight's codes, and few tokens times
`sign128`, `symmetric` and `codebook2`. Imported only where a tensor lies on a GPU, or by tests in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bellbit.core import bellbox
from bellbit.core.activations import Scope, quantize_activations
from bellbit.packed.bits import packed_width
from bellbit.packed.codebook2 import Codebook2
from bellbit.packed.planes import Bellbox, Sign128, Symmetric
from bellbit.packed.tensor import PackedTensor

FEW_TOKENS = 16  # more are multiplied by the unpacked weight: its unpacking is paid once for all of them
ROWS = 32  # of a program's tile, where nothing else says so
_LEAST_POSITIVE = 2.0**-126


def supports(x: Tensor, weight: PackedTensor) -> bool:
    """Whether `linear` takes these: few tokens, and a layout that it can decode."""
    if x.numel() > FEW_TOKENS * weight.shape[1]:
        return False
    if isinstance(weight, Symmetric):
        return weight.width < 8 and _tile(weight.group_size) >= 16  # twice a level is to fit into a byte
    return isinstance(weight, Sign128) or (isinstance(weight, Codebook2) and _tile(weight.block_size) >= 16)


def _tile(size: int) -> int:
    """How many columns a program takes at once, so that none of its tiles lies in two groups of `size` columns."""
    return min(128, size & -size)


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None, act_bits: int = 16, scope: Scope = "token") -> Tensor:
    """What `reference.linear` computes, in float32, for what `supports` is true of."""
    rows, columns = weight.shape
    flat = quantize_activations(x, act_bits, scope).reshape(-1, columns).contiguous()
    y = x.new_empty(len(flat), rows)
    grid = (triton.cdiv(rows, ROWS), len(flat))
    last = (bias if bias is not None else flat, bias is not None, ROWS)
    with torch.cuda.device_of(x):
        if isinstance(weight, Sign128):
            _sign128[grid](flat, weight.blocks, y, rows, columns, weight.blocks.shape[1], *last)
        elif isinstance(weight, Symmetric):
            stored = (weight.codes, weight.steps, weight.octaves)
            sizes = (rows, columns, weight.codes.shape[2], weight.group_size, weight.steps.shape[1])
            _symmetric[grid](flat, *stored, y, *sizes, *last, weight.width, _tile(weight.group_size))
        else:
            assert isinstance(weight, Codebook2)
            wide = weight.exponents is None
            parts = (weight.codes, weight.scales, weight.scales if wide else weight.exponents, weight.salient)
            sizes = (rows, columns, weight.codes.shape[1], weight.block_size, weight.scales.shape[1])
            _codebook2[grid](flat, *parts, y, *sizes, *last, wide, _tile(weight.block_size))
    return y.view(*x.shape[:-1], rows)


def codes_linear(
    x: Tensor, gamma: Tensor, inverse: Tensor | None, width: int, weight: Bellbox, bias: Tensor | None
) -> Tensor:
    """x̂·Ŵᵀ + bias with x̂ = BBQ's quantization of x, as a product of integers.

    x: (..., in), any float dtype. gamma, inverse, width: of x's quantizer; see `quantize`. weight: rotated.
    Returns (..., out) in x's dtype.
    """
    planes = quantize(x, width, inverse)
    y = multiply(planes, gamma / 2 ** (width - 1), bellbox.zero_point(width), weight, bias, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def quantize(x: Tensor, width: int, inverse: Tensor | None = None) -> Tensor:
    """Codes of BBQ, rotated, normalised, compared with Φ's thresholds and packed in one pass over x.

    x: (..., n), any float dtype. inverse: float32 (), 1/rms to divide by; None for that of x itself.
    Returns bit planes, lowest first, as the layout `bellbox` has them: uint8 (width, tokens, ⌈n/8⌉).
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, columns = flat.shape
    if inverse is None:
        inverse = bellbox.inverse_rms(flat, by_row=False)  # H keeps it
    planes = torch.empty(width, tokens, packed_width(columns), dtype=torch.uint8, device=x.device)
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(columns, 128))
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # which holds ±1 and all 16-bit floats exactly
    tensors = (flat, planes, inverse, _thresholds(width, x.device))
    with torch.cuda.device_of(x):
        _quantize[grid](*tensors, tokens, columns, planes.shape[2], width, ROWS, precision)
    return planes


def _thresholds(width: int, device: torch.device) -> Tensor:
    """The u from which each code above 0 is taken: Φ⁻¹(k/2ᵇ), float32 (2ᵇ − 1,).

    What lies on one is rounded to the even code; only an exact zero ever does, at 1 bit down and else up.
    """
    found = torch.special.ndtri(torch.arange(1, 2**width, dtype=torch.float64, device=device) / 2**width).float()
    return found.clamp_min(_LEAST_POSITIVE) if width == 1 else found


def multiply(
    planes: Tensor, scale: Tensor, zero: float, weight: Bellbox, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """scale·(codes − zero)·Ŵᵀ + bias, the sums in integers.

    planes: (width, tokens, ⌈in/8⌉), see `quantize`. scale: one number. weight: taken in its own domain. bias: (out,).
    Returns (tokens, out).
    """
    width, tokens, row_bytes = planes.shape
    rows, columns = weight.shape
    y = torch.empty(tokens, rows, dtype=dtype, device=planes.device)
    tile = 64 if tokens > 32 else 16
    grid = (triton.cdiv(tokens, tile), triton.cdiv(rows, 64))
    stored = (planes, weight.codes, scale.float(), weight.scales, bias if bias is not None else scale)
    sizes = (tokens, rows, columns, row_bytes, round(2 * zero), round(2 * weight.zero))
    with torch.cuda.device_of(planes):
        _multiply[grid](*stored, y, *sizes, bias is not None, width, weight.width, tile, 64, 64)
    return y


@triton.jit
def _hadamard(rest):
    """±1 where a tile of 128 columns has H, without the 1/√size: float32 (128, 128); and the block size by column.

    rest: columns from the tile's first on; those from 128 on belong to others. Blocks are of the powers of two that
    min(rest, 128) is made of, largest first, so that the highest bit in which column and rest differ is the size.
    """
    i = tl.arange(0, 128)
    below = i ^ tl.minimum(rest, 128)
    below |= below >> 1
    below |= below >> 2
    below |= below >> 4
    size = tl.maximum((below + 1) >> 1, 1)
    both = i[:, None] & i[None, :] & (size[None, :] - 1)
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    inside = (i[:, None] < rest) & (i[None, :] < rest) & (size[:, None] == size[None, :])
    return tl.where(inside, (1 - 2 * (both & 1)).to(tl.float32), 0.0), size


@triton.jit
def _quantize(
    x,
    planes,
    inverse,
    thresholds,
    tokens,
    columns,
    row_bytes,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.program_id(1) * 128
    column = first + tl.arange(0, 128)[None, :]
    valid = (row < tokens) & (column < columns)
    values = tl.load(x + row * columns + column, mask=valid, other=0.0)
    h, size = _hadamard(columns - first)
    v = tl.dot(values.to(tl.float32), h, input_precision=PRECISION)
    u = v * (tl.load(inverse) / tl.sqrt(size.to(tl.float32)))[None, :]
    codes = tl.zeros((ROWS, 128), tl.int32)
    for k in tl.static_range(2**WIDTH - 1):
        codes += (u >= tl.load(thresholds + k)).to(tl.int32)
    codes = tl.reshape(tl.where(valid, codes, 0), (ROWS, 16, 8))
    byte = first // 8 + tl.arange(0, 16)[None, :]
    for plane in tl.static_range(WIDTH):
        bits = ((codes >> plane) & 1) << tl.arange(0, 8)[None, None, :]
        place = planes + (plane * tokens + row) * row_bytes + byte
        tl.store(place, tl.sum(bits, axis=2).to(tl.uint8), mask=(row < tokens) & (byte < row_bytes))


@triton.jit
def _levels(planes, row, rows, column, columns, row_bytes, TWICE_ZERO, WIDTH: tl.constexpr):
    """Twice (code − zero) of some rows and columns, 0 outside the matrix: int8 (rows, columns)."""
    valid = (row < rows) & (column < columns)
    codes = tl.zeros_like(row + column).to(tl.int32)
    for plane in tl.static_range(WIDTH):
        byte = tl.load(planes + (plane * rows + row) * row_bytes + column // 8, mask=valid, other=0).to(tl.int32)
        codes += ((byte >> (column % 8)) & 1) << plane
    return tl.where(valid, 2 * codes - TWICE_ZERO, 0).to(tl.int8)


@triton.jit
def _multiply(
    x,
    weight,
    scale,
    scales,
    bias,
    y,
    tokens,
    rows,
    columns,
    row_bytes,
    twice_zero_x,
    twice_zero_w,
    HAS_BIAS: tl.constexpr,
    WIDTH_X: tl.constexpr,
    WIDTH_W: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    sums = tl.zeros((TOKENS, ROWS), tl.int32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        a = _levels(x, token[:, None], tokens, column, columns, row_bytes, twice_zero_x, WIDTH_X)
        b = _levels(weight, row[:, None], rows, column, columns, row_bytes, twice_zero_w, WIDTH_W)
        sums = tl.dot(a, tl.trans(b), sums)
    result = sums.to(tl.float32) * (0.25 * tl.load(scale)) * tl.load(scales + row, mask=row < rows, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    inside = (token[:, None] < tokens) & (row[None, :] < rows)
    tl.store(y + token[:, None] * rows + row[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _store(y, sums, bias, token, row, rows, HAS_BIAS: tl.constexpr):
    """Row sums of one token, with what is added to them."""
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + token * rows + row, sums.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _sign128(x, blocks, y, rows, columns, row_bytes, bias, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, 128)
    sums = tl.zeros((ROWS,), tl.float32)
    for block in range(tl.cdiv(columns, 128)):
        there = block * 128 + k < columns
        values = tl.load(x + token * columns + block * 128 + k, mask=there, other=0.0).to(tl.float32)[None, :]
        start = blocks + row * row_bytes + block * 18
        low = tl.load(start, mask=row < rows, other=0).to(tl.uint16)
        high = tl.load(start + 1, mask=row < rows, other=0).to(tl.uint16)
        scale = (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        byte = tl.load(start[:, None] + 2 + (k // 8)[None, :], mask=(row < rows)[:, None] & there[None, :], other=0)
        positive = ((byte.to(tl.int32) >> (k % 8)[None, :]) & 1) != 0
        sums += scale * tl.sum(tl.where(positive, values, -values), axis=1)
    _store(y, sums, bias, token, row, rows, HAS_BIAS)


@triton.jit
def _symmetric(
    x,
    codes,
    steps,
    octaves,
    y,
    rows,
    columns,
    row_bytes,
    group_size,
    groups,
    bias,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    top = tl.load(octaves)
    step = tl.load(octaves + 1)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        k = first + tl.arange(0, COLUMNS)[None, :]
        values = tl.load(x + token * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        twice = _levels(codes, row[:, None], rows, k, columns, row_bytes, 2**WIDTH - 1, WIDTH).to(tl.float32)
        below = tl.load(steps + row * groups + first // group_size, mask=row < rows, other=0).to(tl.float32)
        sums += 0.5 * tl.exp2(top - step * below) * tl.sum(twice * values, axis=1)
    _store(y, sums, bias, token, row, rows, HAS_BIAS)


@triton.jit
def _codebook2(
    x,
    codes,
    scales,
    exponents,
    salient,
    y,
    rows,
    columns,
    row_bytes,
    block_size,
    blocks,
    bias,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    valid = row < rows
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        values = tl.load(x + token * columns + k, mask=k < columns, other=0.0).to(tl.float32)[None, :]
        there = valid[:, None] & (k < columns)[None, :]
        byte = tl.load(codes + row[:, None] * row_bytes + (k // 4)[None, :], mask=there, other=0).to(tl.int32)
        bits = byte >> (2 * (k % 4))[None, :]
        sign = (2 * (bits & 1) - 1).to(tl.float32)
        second = (bits & 2) != 0
        is_salient = ((tl.load(salient + k // 8, mask=k < columns, other=0).to(tl.int32) >> (k % 8)) & 1)[None, :] != 0
        place = row * blocks + first // block_size
        seven = scales + place * 7
        step = tl.full((ROWS,), 1.0, tl.float32)
        if not WIDE:
            step = tl.exp2(tl.load(exponents + place, mask=valid, other=0).to(tl.float32) - 133.0)
        mean_c = (tl.load(seven, mask=valid, other=0).to(tl.float32) * step)[:, None]
        scale_c = (tl.load(seven + 1, mask=valid, other=0).to(tl.float32) * step)[:, None]
        mean_s = (tl.load(seven + 2, mask=valid, other=0).to(tl.float32) * step)[:, None]
        scale_s = (tl.load(seven + 3, mask=valid, other=0).to(tl.float32) * step)[:, None]
        mean = (tl.load(seven + 4, mask=valid, other=0).to(tl.float32) * step)[:, None]
        scale1 = (tl.load(seven + 5, mask=valid, other=0).to(tl.float32) * step)[:, None]
        scale2 = (tl.load(seven + 6, mask=valid, other=0).to(tl.float32) * step)[:, None]
        ordinary = tl.where(second, mean_s + scale_s * sign, mean_c + scale_c * sign)
        special = mean + scale1 * sign + tl.where(second, scale2, -scale2)
        sums += tl.sum(tl.where(is_salient, special, ordinary) * values, axis=1)
    _store(y, sums, bias, token, row, rows, HAS_BIAS)
