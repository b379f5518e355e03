"""ARB, alternating refined binarization: the numbers and signs of a binarized block, each refitted given the others.

Source: ARB-LLM (arXiv 2410.03129) §3.1–3.3. A block has the zones of BRAQ (`core.binarize`): concentrated and sparse
weights with one binary term, salient columns with two; here every number and sign of them is revisited, 15 rounds long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbit.core.binarize import (
    MEAN_CONCENTRATED,
    MEAN_SALIENT,
    MEAN_SPARSE,
    SCALE_CONCENTRATED,
    SCALE_RESIDUAL,
    SCALE_SALIENT,
    SCALE_SPARSE,
    BinarizedBlock,
    masked_mean,
    reconstruct_block,
    signed,
)

ROUNDS = 15


def zones(block: BinarizedBlock) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (r, c) of the concentrated, the sparse and the salient weights."""
    salient = block.salient.expand_as(block.second)
    return ~block.second & ~salient, block.second & ~salient, salient


def alternate(weight: Tensor, block: BinarizedBlock, rounds: int = ROUNDS) -> BinarizedBlock:
    """ARB: μ, α and signs in turn; the squared error of the block never rises.

    One term:  μ ← μ + mean(W − αB − μ),  α ← mean(B∘(W − μ)),  B ← sign(W − μ).
    Two terms: μ likewise,  α₁ ← mean(B₁∘(W − μ − α₂B₂)),  α₂ likewise,  (B₁, B₂) ← the nearest of ±α₁ ± α₂ to W − μ.
    weight: (r, c).
    """
    concentrated, sparse, salient = zones(block)
    scales, signs, second = block.scales.clone(), block.signs.clone(), block.second.clone()
    for _ in range(rounds):
        for mask, mean, scale in (
            (concentrated, MEAN_CONCENTRATED, SCALE_CONCENTRATED),
            (sparse, MEAN_SPARSE, SCALE_SPARSE),
        ):
            mu, alpha, b = scales[:, mean, None], scales[:, scale, None], signed(signs)
            mu += masked_mean(weight - alpha * b - mu, mask)
            alpha.copy_(masked_mean(b * (weight - mu), mask))
            signs = torch.where(mask, (weight >= mu) == (alpha >= 0), signs)
        mu, alpha1, alpha2 = (scales[:, i, None] for i in (MEAN_SALIENT, SCALE_SALIENT, SCALE_RESIDUAL))
        b1, b2 = signed(signs), signed(second)
        mu += masked_mean(weight - alpha1 * b1 - alpha2 * b2 - mu, salient)
        alpha1.copy_(masked_mean(b1 * (weight - mu - alpha2 * b2), salient))
        alpha2.copy_(masked_mean(b2 * (weight - mu - alpha1 * b1), salient))
        first, other = nearest_pair(weight - mu, alpha1, alpha2)
        signs, second = torch.where(salient, first, signs), torch.where(salient, other, second)
    return BinarizedBlock(signs, second, scales, block.salient)


def nearest_pair(values: Tensor, alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ±α₁ ± α₂ is nearest to each value: the two signs, bool, True for +. All broadcast."""
    candidates = torch.stack([(values - s1 * alpha1 - s2 * alpha2).abs() for s1 in (1, -1) for s2 in (1, -1)])
    best = candidates.argmin(dim=0)
    return best < 2, best % 2 == 0


def calibrate(weight: Tensor, block: BinarizedBlock, gram: Tensor, rounds: int = ROUNDS) -> BinarizedBlock:
    """ARB_X: with the signs kept, each number in turn fitted to the block's output, with S = ΣXᵀX.

        μ ← μ + 1ᵀS(w − ŵ) / (1ᵀS1),   α ← α + bᵀS(w − ŵ) / (bᵀSb)

    over the entries of the number's zone, b their signs. The output error of the block never rises.
    weight: (r, c). gram: S of the block's columns (c, c), positive definite.
    """
    concentrated, sparse, salient = (mask.float() for mask in zones(block))
    b1, b2 = signed(block.signs), signed(block.second)
    directions = {
        MEAN_CONCENTRATED: concentrated,
        SCALE_CONCENTRATED: concentrated * b1,
        MEAN_SPARSE: sparse,
        SCALE_SPARSE: sparse * b1,
        MEAN_SALIENT: salient,
        SCALE_SALIENT: salient * b1,
        SCALE_RESIDUAL: salient * b2,
    }
    seen = {number: direction @ gram for number, direction in directions.items()}
    power = {number: (seen[number] * direction).sum(dim=1) for number, direction in directions.items()}
    scales = block.scales.clone()
    residual = weight - reconstruct_block(block)
    for _ in range(rounds):
        for number, direction in directions.items():
            there = power[number] > 0
            step = torch.where(there, (seen[number] * residual).sum(dim=1) / power[number].clamp_min(1e-30), 0.0)
            scales[:, number] += step
            residual -= step[:, None] * direction
    return block._replace(scales=scales)
