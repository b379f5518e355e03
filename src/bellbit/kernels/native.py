"""The compiled kernels as `torch.library` operators, so that `torch.compile` and `torch.export` see them.

Each operator takes the stored tensors of a layout as they lie in the file. Many rows of input go through dense
panels of unpacked weights instead, since a product of matrices is torch's own best work.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bellbit.core.activations import Scope, quantize_activations
from bellbit.packed.codebook2 import Codebook2
from bellbit.packed.planes import SIGN_BLOCK, Bellbox, Sign128, Symmetric, Uniform
from bellbit.packed.tensor import PackedTensor

try:
    _kernels: Any = import_module("bellbit._kernels")
except ImportError:  # built without a compiler
    _kernels = None

BUILT = _kernels is not None  # a constant: torch.compile breaks its graph at calls into an extension
FEW_TOKENS = 16  # up to here the packed kernels beat a product with unpacked panels
PANEL_BYTES = 1 << 23  # of unpacked weights at a time: they stay in the cache between unpacking and product
_SIGN128, _HALVES, _TABLE, _FLOATS = range(4)  # Grid in csrc/kernels.h


def available() -> list[str]:
    """Instruction sets that this build has and this machine runs, best first; empty without the compiled kernels."""
    return [] if _kernels is None else list(_kernels.available())


def chosen() -> str | None:
    """The instruction set in use."""
    return None if _kernels is None else str(_kernels.chosen())


def choose(name: str) -> None:
    """Use another instruction set, for tests and benchmarks. Raises ValueError if it is not available."""
    if _kernels is None or not _kernels.choose(name):
        raise ValueError(f"there are no {name!r} kernels here; there are {available()}")


def supports(weight: PackedTensor) -> bool:
    """Whether the compiled kernels can run a weight."""
    if _kernels is None or not all(t.device.type == "cpu" and t.is_contiguous() for t in weight.tensors.values()):
        return False
    if isinstance(weight, Codebook2):
        return weight.block_size % 16 == 0
    if isinstance(weight, Uniform | Symmetric):
        return weight.group_size % SIGN_BLOCK == 0
    return type(weight) in _ARGUMENTS


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None, act_bits: int = 16, scope: Scope = "token") -> Tensor:
    """What `reference.linear` computes, for weights that `supports` is true of."""
    arguments = _ARGUMENTS[type(weight)](weight)
    if isinstance(weight, Bellbox) and weight.rotated:
        x = rotate(x)
    return getattr(torch.ops.bellbit, weight.layout)(x, *arguments, bias, act_bits, scope == "tensor")


_ARGUMENTS: dict[type[PackedTensor], Callable[[Any], tuple[Any, ...]]] = {
    Codebook2: lambda w: (w.codes, w.salient, w.scales, w.exponents, w.shape[1], w.block_size),
    Sign128: lambda w: (w.blocks, w.shape[1]),
    Bellbox: lambda w: (w.codes, w.scales, w.shape[1], w.zero),
    Symmetric: lambda w: (w.codes, w.steps, w.octaves, w.shape[1], w.group_size),
    Uniform: lambda w: (w.codes, w.scales, w.zeros, w.shape[1], w.group_size),
}


# --- weights as the compiled kernels take them; shapes are checked here, addresses are all that goes further ----


def _require(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a tensor. Raises ValueError if it is not what a kernel will read."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.data_ptr()


def _codebook2(
    codes: Tensor, salient: Tensor, scales: Tensor, exponents: Tensor | None, columns: int, block: int
) -> Any:
    rows, blocks = len(codes), -(-columns // block)
    if block % 16:
        raise ValueError(f"blocks of {block} columns are not possible; multiples of 16 are")
    return _kernels.Codebook(
        codes=_require(codes, torch.uint8, rows, -(-columns // 4)),
        salient=_require(salient, torch.uint8, -(-columns // 8)),
        rows=rows,
        columns=columns,
        block_size=block,
        scales=_require(scales, torch.float16 if exponents is None else torch.int8, rows, blocks, 7),
        exponents=0 if exponents is None else _require(exponents, torch.uint8, rows, blocks),
    )


def _planes(
    codes: Tensor,
    columns: int,
    group: int,
    grid: int,
    scales: int,
    zeros: int = 0,
    zero: float = 0,
    octaves: tuple[float, float] = (0, 0),
) -> Any:
    width, rows, row_bytes = codes.shape[0], codes.shape[1], -(-columns // 8)
    if not 1 <= width <= 8:
        raise ValueError(f"codes of {width} bits are not possible; 1 to 8 are")
    if group % SIGN_BLOCK:
        raise ValueError(f"groups of {group} columns are not possible; multiples of {SIGN_BLOCK} are")
    return _kernels.Planes(
        bits=_require(codes, torch.uint8, width, rows, row_bytes),
        planes=width,
        rows=rows,
        columns=columns,
        plane_stride=rows * row_bytes,
        row_stride=row_bytes,
        block_stride=SIGN_BLOCK // 8,
        group=group // SIGN_BLOCK,
        grid=grid,
        scales=scales,
        zeros=zeros,
        zero=zero,
        top=octaves[0],
        step=octaves[1],
    )


def _sign128(blocks: Tensor, columns: int) -> Any:
    rows, row_bytes = len(blocks), 2 * -(-columns // SIGN_BLOCK) + -(-columns // 8)
    return _kernels.Planes(
        bits=_require(blocks, torch.uint8, rows, row_bytes) + 2,
        planes=1,
        rows=rows,
        columns=columns,
        plane_stride=0,
        row_stride=row_bytes,
        block_stride=2 + SIGN_BLOCK // 8,
        group=1,
        grid=_SIGN128,
        scales=0,
        zeros=0,
        zero=0,
        top=0,
        step=0,
    )


def _uniform(codes: Tensor, scales: Tensor, zeros: Tensor, columns: int, group: int) -> Any:
    groups = (codes.shape[1], -(-columns // group))
    scale, zero = _require(scales, torch.float16, *groups), _require(zeros, torch.uint8, *groups)
    return _planes(codes, columns, group, _HALVES, scale, zero)


def _symmetric(codes: Tensor, steps: Tensor, octaves: Tensor, columns: int, group: int) -> Any:
    scale = _require(steps, torch.uint8, codes.shape[1], -(-columns // group))
    top, step = octaves.tolist()
    return _planes(codes, columns, group, _TABLE, scale, zero=(2 ** codes.shape[0] - 1) / 2, octaves=(top, step))


def _bellbox(codes: Tensor, scales: Tensor, columns: int, zero: float) -> Any:
    scale = _require(scales, torch.float32, codes.shape[1])
    row = -(-columns // SIGN_BLOCK) * SIGN_BLOCK
    return _planes(codes, columns, row, _FLOATS, scale, zero=zero)


_BUILDERS: dict[type[PackedTensor], Callable[..., Any]] = {
    Codebook2: _codebook2,
    Sign128: _sign128,
    Bellbox: _bellbox,
    Symmetric: _symmetric,
    Uniform: _uniform,
}


def weight(packed: PackedTensor) -> Any:
    """A packed weight as the compiled kernels take it; `packed` must outlive it."""
    return _BUILDERS[type(packed)](*_ARGUMENTS[type(packed)](packed))


def dense_weight(values: Tensor) -> Any:
    """A 16-bit matrix (out, in) as the compiled kernels take it; `values` must outlive it."""
    bfloat = values.dtype == torch.bfloat16
    address = _require(values, torch.bfloat16 if bfloat else torch.float16, *values.shape)
    return _kernels.Dense(values=address, rows=len(values), columns=values.shape[1], bfloat=bfloat)


def largest_code(act_bits: int) -> int:
    """Of activations rounded to so many bits; 0 where they are not."""
    return 0 if act_bits == 16 else 2 ** (act_bits - 1) - 1


def layer(weight: Any, bias: int, act_bits: int, scope: Scope) -> Any:
    """A linear layer of the compiled decoder. bias: the address of float32 values, or 0."""
    return _kernels.Layer(weight, bias, largest_code(act_bits), scope == "tensor")


def block(**arguments: Any) -> Any:
    """A decoder block of the compiled decoder, see csrc/decoder.h."""
    return _kernels.Block(**arguments)


def decoder(**arguments: Any) -> Any:
    """The compiled decoder, see csrc/decoder.h."""
    return _kernels.Decoder(**arguments)


# --- operators ---------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("bellbit", "DEF")


def _multiply(
    weight: Any, x: Tensor, rows: int, columns: int, bias: Tensor | None, act_bits: int, shared: bool
) -> Tensor:
    """x: (..., columns), any float dtype."""
    if x.shape[-1] != columns:
        raise ValueError(f"the input has {x.shape[-1]} columns, the weight {columns}")
    tokens = x.numel() // columns
    offset = None if bias is None else bias.float().contiguous()
    if tokens > FEW_TOKENS:
        rounded = quantize_activations(x, act_bits, "tensor" if shared else "token").float().reshape(tokens, columns)

        def unpack(panel: Tensor, first: int) -> None:
            _kernels.unpack(weight, panel.data_ptr(), first, first + len(panel), torch.get_num_threads())

        return _by_panels(unpack, rounded, rows, offset).to(x.dtype).view(*x.shape[:-1], rows)
    values = x.float().contiguous()
    y = torch.empty(*x.shape[:-1], rows)
    _kernels.multiply(
        weight,
        values.data_ptr(),
        tokens,
        largest_code(act_bits),
        shared,
        0 if offset is None else offset.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _by_panels(unpack: Callable[[Tensor, int], None], x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """x: float32 (tokens, columns). unpack: writes rows from a first one on into a float32 panel."""
    tokens, columns = x.shape
    step = max(1, min(rows, PANEL_BYTES // (4 * columns)))
    panel, y = torch.empty(step, columns), torch.empty(tokens, rows)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        unpack(panel[: last - first], first)
        torch.mm(x, panel[: last - first].t(), out=y[:, first:last])
    return y if bias is None else y.add_(bias)


def _define(name: str, arguments: str, build: Callable[..., Any], rows_axis: int) -> None:
    """Register an operator that multiplies by a weight.

    arguments: its stored tensors, `columns`, and options behind. build: makes of them what the kernels take.
    rows_axis: of the first tensor, the one of the weight's rows.
    """
    _LIBRARY.define(f"{name}(Tensor x, {arguments}, Tensor? bias, int act_bits, bool shared_step) -> Tensor")
    names = [argument.split()[1] for argument in arguments.split(", ")]
    at_columns = names.index("columns")

    def run(x: Tensor, *stored: Any) -> Tensor:
        *weight, bias, act_bits, shared = stored
        rows = weight[0].shape[rows_axis]
        return _multiply(build(*weight), x, rows, weight[at_columns], bias, act_bits, shared)

    def fake(x: Tensor, *stored: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], stored[0].shape[rows_axis])

    _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"bellbit::{name}", fake, lib=_LIBRARY)


def rotate(x: Tensor) -> Tensor:
    """x·H with the blockwise Hadamard matrix of `core.hadamard`: (..., width), in x's dtype."""
    return torch.ops.bellbit.hadamard(x)


def _rotate(x: Tensor) -> Tensor:
    rotated = x.to(torch.float32, copy=True).contiguous()
    _kernels.hadamard(
        rotated.data_ptr(), rotated.numel() // rotated.shape[-1], rotated.shape[-1], torch.get_num_threads()
    )
    return rotated.to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """`core.grid.straight_through` in one pass over memory for the weights and one for both derivatives."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, width: int, dtype: torch.dtype, group: int) -> Tensor:
        ctx.latents = _latents(latent, scales, width, group)
        weight = torch.empty_like(latent, dtype=dtype)
        _kernels.weights_of(ctx.latents, dtype == torch.bfloat16, weight.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(latent, weight, scales)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        latent, weight, scales = ctx.saved_tensors
        gradient = gradient.contiguous()  # held until the kernel has read it
        wrt_latent = torch.empty_like(latent) if ctx.needs_input_grad[0] else None
        wrt_scales = torch.empty_like(scales)
        _kernels.derivatives_of(
            ctx.latents,
            weight.dtype == torch.bfloat16,
            weight.data_ptr(),
            _require(gradient, weight.dtype, *weight.shape),
            0 if wrt_latent is None else wrt_latent.data_ptr(),
            wrt_scales.data_ptr(),
            torch.get_num_threads(),
        )
        return wrt_latent, wrt_scales, None, None, None


def _latents(latent: Tensor, scales: Tensor, width: int, group: int) -> Any:
    rows, columns = latent.shape
    return _kernels.Latents(
        latents=_require(latent, torch.float32, rows, columns),
        scales=_require(scales, torch.float32, rows, -(-columns // group)),
        rows=rows,
        columns=columns,
        group=group,
        width=width,
    )


def straight_through(latent: Tensor, scales: Tensor, width: int, dtype: torch.dtype, group: int) -> Tensor:
    """What `core.grid.straight_through` computes; dtype: float32 or bfloat16."""
    return _StraightThrough.apply(latent.contiguous(), scales.contiguous(), width, dtype, group)  # type: ignore[no-untyped-call]


def divergences(student: Tensor, teacher: Tensor, slope: bool) -> Tensor:
    """What `core.divergence.divergences` computes, in two passes over memory."""
    rows, columns = teacher.shape
    found = torch.empty(rows)
    _kernels.divergences_of(
        _require(teacher, torch.float32, rows, columns),
        _require(student, torch.float32, rows, columns),
        rows,
        columns,
        slope,
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + bias for a 16-bit weight (out, in): (..., out) in x's dtype."""
    return torch.ops.bellbit.dense(x, weight, bias)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    if x.numel() > FEW_TOKENS * columns:
        offset = None if bias is None else bias.float()
        flat = x.float().reshape(-1, columns)

        def unpack(panel: Tensor, first: int) -> None:
            panel.copy_(weight[first : first + len(panel)])

        return _by_panels(unpack, flat, rows, offset).to(x.dtype).view(*x.shape[:-1], rows)
    return _multiply(dense_weight(weight), x, rows, columns, bias, 16, shared=False)


if _kernels is not None:
    _LIBRARY.define("dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _LIBRARY.impl("dense", _dense, "CPU")
    torch.library.register_fake(
        "bellbit::dense", lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)), lib=_LIBRARY
    )
    _LIBRARY.define("hadamard(Tensor x) -> Tensor")
    _LIBRARY.impl("hadamard", _rotate, "CPU")
    torch.library.register_fake("bellbit::hadamard", lambda x: x.new_empty(x.shape), lib=_LIBRARY)
    torch.library.register_autograd(  # H is symmetric
        "bellbit::hadamard",
        lambda ctx, grad: rotate(grad),
        setup_context=lambda ctx, inputs, output: None,
        lib=_LIBRARY,
    )
    _define(
        "codebook2",
        "Tensor codes, Tensor salient, Tensor scales, Tensor? exponents, int columns, int block_size",
        _codebook2,
        rows_axis=0,
    )
    _define("sign128", "Tensor blocks, int columns", _sign128, rows_axis=0)
    _define("symmetric", "Tensor codes, Tensor steps, Tensor octaves, int columns, int group", _symmetric, rows_axis=1)
    _define("uniform", "Tensor codes, Tensor scales, Tensor zeros, int columns, int group", _uniform, rows_axis=1)
    _define("bellbox", "Tensor codes, Tensor scales, int columns, float zero", _bellbox, rows_axis=1)
