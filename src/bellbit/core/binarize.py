"""Binary residual approximation (BRAQ) of one block of columns.

Source: BiLLM (arXiv 2402.04291) §3.2–3.3, used unchanged by DBellQuant (arXiv 2507.01027) §3.

A block holds three disjoint sets of weights. Whole *salient* columns get two binary terms, every other weight
one, with its own mean and scale per row in each of two groups, *concentrated* and *sparse*:

    salient       ŵ = μ + α₁·s₁ + α₂·s₂
    concentrated  ŵ = μ + α·s
    sparse        ŵ = μ + α·s                      s ∈ {−1, +1}
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MEAN_CONCENTRATED, SCALE_CONCENTRATED, MEAN_SPARSE, SCALE_SPARSE, MEAN_SALIENT, SCALE_SALIENT, SCALE_RESIDUAL = range(7)
SCALES_PER_ROW = 7


class BinarizedBlock(NamedTuple):
    """One binarized block of `r` rows and `c` columns: two bits a weight and seven numbers a row.

    signs: bool (r, c), the sign of the first binary term, True for +1.
    second: bool (r, c). In ordinary columns True for the sparse group; in salient columns the sign of the
        second binary term.
    scales: float32 (r, 7): μ, α of the concentrated group, μ, α of the sparse one, and μ, α₁, α₂ of the
        salient columns (the means of the two terms merged).
    salient: bool (c,), the salient columns, shared by all rows.
    """

    signs: Tensor
    second: Tensor
    scales: Tensor
    salient: Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (r, c) over the True entries of `mask` in each row -> (r, 1); 0 where a row has none."""
    count = mask.sum(dim=1, keepdim=True)
    return torch.where(mask, values, 0).sum(dim=1, keepdim=True) / count.clamp_min(1)


def binary_term(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best one-bit fit per row over `mask`: μ = mean(v), α = mean|v − μ|, s = v ≥ μ.

    BiLLM eq. 4. One stored bit has no zero, so sign(0) is +1 (the reference's `torch.sign` would leave a
    weight that equals its row's mean at the mean).
    values, mask: (r, c). Returns μ (r, 1), α (r, 1), s bool (r, c).
    """
    mean = masked_mean(values, mask)
    centred = values - mean
    return mean, masked_mean(centred.abs(), mask), centred >= 0


def signed(positive: Tensor) -> Tensor:
    """True and False as +1 and −1."""
    return positive.float() * 2 - 1


def binarize_block(weight: Tensor, salient: Tensor, sparse: Tensor) -> BinarizedBlock:
    """Binarize one block given its masks.

    weight: float (r, c). salient: bool (c,). sparse: bool (r, c), ignored in salient columns.
    """
    columns = salient.expand_as(weight)
    mean1, scale1, sign1 = binary_term(weight, columns)
    residual = weight - (mean1 + scale1 * signed(sign1))
    mean2, scale2, sign2 = binary_term(residual, columns)

    mean_c, scale_c, sign_c = binary_term(weight, ~sparse & ~columns)
    mean_s, scale_s, sign_s = binary_term(weight, sparse & ~columns)

    return BinarizedBlock(
        signs=torch.where(columns, sign1, torch.where(sparse, sign_s, sign_c)),
        second=torch.where(columns, sign2, sparse),
        scales=torch.cat([mean_c, scale_c, mean_s, scale_s, mean1 + mean2, scale1, scale2], dim=1),
        salient=salient,
    )


def reconstruct_block(block: BinarizedBlock) -> Tensor:
    """The weights a `BinarizedBlock` stands for: float32 (r, c)."""
    signs, second = signed(block.signs), block.second
    mean_c, scale_c, mean_s, scale_s, mean, scale1, scale2 = block.scales.float().split(1, dim=1)
    ordinary = torch.where(second, mean_s, mean_c) + torch.where(second, scale_s, scale_c) * signs
    return torch.where(block.salient, mean + scale1 * signs + scale2 * signed(second), ordinary)
