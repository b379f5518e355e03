"""PB-LLM (arXiv 2310.00034): a share of the weights, the most salient, in 8 bits, the others as signs.

ŵ = scale·(code − zero) where salient,  ŵ = ±α elsewhere, scale, zero and α per row and block
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bellbit.core.binarize import masked_mean, signed
from bellbit.core.compensate import quantize_blocks
from bellbit.core.hessian import InverseFactor
from bellbit.core.search import saliency

SHARE = 0.1  # of the weights in 8 bits
BITS = 8


class PartialBlock(NamedTuple):
    """One block of `r` rows and `c` columns.

    salient: bool (r, c). signs: bool (r, c), True for +. codes: uint8 (r, c), of the salient weights, else 0.
    scales: float32 (r, 3): α, and scale and minimum of the 8-bit grid.
    """

    salient: Tensor
    signs: Tensor
    codes: Tensor
    scales: Tensor


def reconstruct(block: PartialBlock) -> Tensor:
    """The weights a `PartialBlock` stands for: float32 (r, c)."""
    alpha, scale, low = block.scales.float().split(1, dim=1)
    return torch.where(block.salient, low + scale * block.codes.float(), alpha * signed(block.signs))


def pb_llm(weight: Tensor, factor: InverseFactor, block_size: int = 128) -> list[PartialBlock]:
    """Quantize a weight with error compensation; one `PartialBlock` per block of columns, left to right.

    Salient are, over the whole weight as it comes, those of largest W² / diag(U)². weight: float (out, in).
    """
    scores = saliency(weight, factor.upper.diagonal(), "hessian")
    count = round(SHARE * scores.numel())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=weight.device)
    chosen[scores.flatten().topk(count).indices] = True
    everywhere = chosen.view_as(weight)

    def quantize(current: Tensor, columns: slice) -> tuple[PartialBlock, Tensor]:
        salient = everywhere[:, columns]
        low = torch.where(salient, current, torch.inf).amin(dim=1, keepdim=True)
        high = torch.where(salient, current, -torch.inf).amax(dim=1, keepdim=True)
        low, high = (torch.where(x.isfinite(), x, 0.0) for x in (low, high))
        scales = torch.cat([masked_mean(current.abs(), ~salient), (high - low) / (2**BITS - 1), low], dim=1)
        scales = scales.half().float()
        steps = ((current - scales[:, 2:]) / scales[:, 1:2].clamp_min(1e-30)).round().clamp(0, 2**BITS - 1)
        block = PartialBlock(salient, current >= 0, torch.where(salient, steps, 0.0).to(torch.uint8), scales)
        return block, (current - reconstruct(block)) / factor.upper.diagonal()[columns]

    return quantize_blocks(weight, factor, block_size, quantize)
