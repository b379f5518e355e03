"""One linear layer through BRAQ: saliency, masks, binarization and error compensation, block by block.

Source: BiLLM (arXiv 2402.04291) Algorithm 1; DBellQuant (arXiv 2507.01027) uses it with `ordinary_order` 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from bellbit.core.binarize import BinarizedBlock, binarize_block, reconstruct_block
from bellbit.core.compensate import quantize_blocks
from bellbit.core.hessian import InverseFactor
from bellbit.core.search import Metric, find_masks, saliency


def braq(
    weight: Tensor,
    factor: InverseFactor | None,
    *,
    ordinary_order: Literal[1, 2] = 1,
    block_size: int = 128,
    metric: Metric = "hessian",
    compensate: bool = True,
    refine: Callable[[Tensor, BinarizedBlock, slice], BinarizedBlock] = lambda weight, block, columns: block,
    store: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> list[BinarizedBlock]:
    """Binarize a weight; one `BinarizedBlock` per block of columns, left to right.

    weight: float (out, in). factor: see `inverse_factor`; None only for `metric="magnitude", compensate=False`.
    ordinary_order: terms that the search, and only it, gives ordinary columns: 1 in DBellQuant, 2 in BiLLM.
    refine: makes of a block's weights, its first binarization and its columns a better one.
    store: rounds scales (out, 7) to what will be stored, so that the error compensated is the real one.
    """

    def quantize(current: Tensor, columns: slice) -> tuple[BinarizedBlock, Tensor]:
        diagonal = None if factor is None else factor.upper.diagonal()[columns]
        salient, sparse = find_masks(saliency(current, diagonal, metric), ordinary_order)
        block = refine(current, binarize_block(current, salient, sparse), columns)
        block = block._replace(scales=store(block.scales))
        error = current - reconstruct_block(block)
        return block, error if diagonal is None else error / diagonal

    return quantize_blocks(weight, factor, block_size, quantize, compensate)
