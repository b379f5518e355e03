"""Error compensation: what a block of columns loses is made up for by the columns to its right.

Source: OBQ/GPTQ (arXiv 2210.17323) §3, in the block form of BiLLM (arXiv 2402.04291) Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from bellbit.core.hessian import InverseFactor

Code = TypeVar("Code")


def blocks(columns: int, size: int) -> list[slice]:
    """`columns` cut into consecutive runs of `size`; the last may be shorter."""
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def quantize_blocks(
    weight: Tensor,
    factor: InverseFactor | None,
    block_size: int,
    quantize: Callable[[Tensor, slice], tuple[Code, Tensor]],
    compensate: bool = True,
) -> list[Code]:
    """Quantize block after block, feeding each block's error E into the columns to its right.

        W_right ← W_right − E·U[block, right]

    weight: float (out, in), not changed.
    factor: U of the layer; None only without compensation.
    quantize: (current weights of the block (out, c), its columns) -> its code, and its error E (out, c):
        (W_j − Ŵ_j) / U_jj for each column j as it was when it was rounded.
    compensate: False leaves the columns to the right as they are.
    """
    codes = []
    work = weight.float().clone()
    if factor is not None:
        work[:, factor.dead] = 0
    for block in blocks(work.shape[1], block_size):
        code, error = quantize(work[:, block], block)
        codes.append(code)
        if compensate:
            assert factor is not None, "compensation needs the factor of the inverse Hessian"
            work[:, block.stop :].addmm_(error, factor.upper[block, block.stop :], alpha=-1)
    return codes
