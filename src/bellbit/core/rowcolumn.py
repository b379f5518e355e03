"""ARB_RC: binary terms with a scale per row and one per column instead of means.

Source: ARB-LLM (arXiv 2410.03129) §3.3–3.4. Each zone of a block has its own terms αʳ_r·αᶜ_c·s: the concentrated and
the sparse ordinary weights one, the salient columns two. With the column-group bitmap the salient columns fall into a
concentrated and a sparse zone as well, which makes four zones and six terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bellbit.core.arb import ROUNDS, nearest_pair
from bellbit.core.binarize import signed
from bellbit.core.compensate import quantize_blocks
from bellbit.core.hessian import InverseFactor
from bellbit.core.search import find_masks, saliency, sparse_threshold


class RowColumnBlock(NamedTuple):
    """One block of `r` rows and `c` columns.

    signs: bool (r, c), of the first term, True for +. zone: bool (r, c), True where sparse; without the bitmap False in
    salient columns. residual: bool (r, c), sign of the second term, False in ordinary columns.
    rows: float32 (r, 4 or 6): αʳ of the concentrated and the sparse zone, then of the first and second term of the
    salient columns, with the bitmap first of the concentrated and then of the sparse ones.
    columns: float32 (2 or 4, c): αᶜ of what a column has of these terms, in the same order.
    salient: bool (c,).
    """

    signs: Tensor
    zone: Tensor
    residual: Tensor
    rows: Tensor
    columns: Tensor
    salient: Tensor


def fit_term(weight: Tensor, mask: Tensor, signs: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """αʳ and αᶜ of one term over `mask` given its signs, each by least squares given the other.

        αʳ = Σ_c αᶜ·s·w / Σ_c αᶜ²,   αᶜ = Σ_r αʳ·s·w / Σ_r αʳ²

    weight, mask, signs (±1): (r, c). row: (r, 1). column: (1, c). Where nothing is masked a scale becomes 0.
    """
    size = torch.where(mask, weight * signs, 0.0)
    there = mask.float()
    row = (size * column).sum(1, keepdim=True) / (there * column.square()).sum(1, keepdim=True).clamp_min(1e-30)
    column = (size * row).sum(0, keepdim=True) / (there * row.square()).sum(0, keepdim=True).clamp_min(1e-30)
    return row, column


def _start(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First signs and scales of a term: αʳ = mean|W|, αᶜ = mean|W/αʳ|."""

    def mean(values: Tensor, dim: int) -> Tensor:
        return torch.where(mask, values, 0.0).sum(dim, keepdim=True) / mask.sum(dim, keepdim=True).clamp_min(1)

    row = mean(weight.abs(), 1)
    column = mean(weight.abs() / row.clamp_min(1e-30), 0)
    return signed(weight >= 0), row, column


def one_term(weight: Tensor, mask: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor]:
    """w ≈ αʳαᶜ·sign(w) over `mask`: signs (r, c), αʳ (r, 1), αᶜ (1, c)."""
    signs, row, column = _start(weight, mask)
    for _ in range(rounds):
        row, column = fit_term(weight, mask, signs, row, column)
    return signs, row, column


def two_terms(weight: Tensor, mask: Tensor, rounds: int = ROUNDS) -> list[tuple[Tensor, Tensor, Tensor]]:
    """w ≈ αʳ₁αᶜ₁s₁ + αʳ₂αᶜ₂s₂ over `mask`: each pair fitted to what the other leaves, then the nearest signs."""
    first = one_term(weight, mask, rounds)
    second = one_term(weight - _value(first), mask, rounds)
    for _ in range(rounds):
        first = (first[0], *fit_term(weight - _value(second), mask, *first))
        second = (second[0], *fit_term(weight - _value(first), mask, *second))
        s1, s2 = nearest_pair(weight, first[1] * first[2], second[1] * second[2])
        first, second = (signed(s1), *first[1:]), (signed(s2), *second[1:])
    return [first, second]


def _value(term: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    signs, row, column = term
    return row * column * signs


def binarize(weight: Tensor, salient: Tensor, zone: Tensor, split: bool) -> RowColumnBlock:
    """Binarize one block given its masks.

    weight: float (r, c). salient: bool (c,). zone: bool (r, c), True where sparse. split: with the bitmap in salient
    columns, else `zone` says nothing there.
    """
    whole = salient.expand_as(weight)
    zone = zone if split else zone & ~whole
    ordinary = [one_term(weight, mask & ~whole) for mask in (~zone, zone)]
    parts = [mask & whole for mask in ((~zone, zone) if split else (~zone,))]
    doubled = [term for mask in parts for term in two_terms(weight, mask)]
    signs = torch.where(zone, ordinary[1][0], ordinary[0][0])
    residual = torch.zeros_like(signs)
    for i, mask in enumerate(parts):
        signs = torch.where(mask, doubled[2 * i][0], signs)
        residual = torch.where(mask, doubled[2 * i + 1][0], residual)
    columns = torch.zeros(len(doubled), weight.shape[1], device=weight.device)
    columns[:2] = torch.cat([term[2] for term in ordinary])
    columns[:, salient] = torch.cat([term[2] for term in doubled])[:, salient]
    rows = torch.cat([term[1] for term in (*ordinary, *doubled)], dim=1)
    return RowColumnBlock(signs > 0, zone, residual > 0, rows, columns, salient)


def reconstruct(block: RowColumnBlock) -> Tensor:
    """The weights a `RowColumnBlock` stands for: float32 (r, c)."""
    signs, residual, zone = signed(block.signs), signed(block.residual), block.zone
    terms = [block.rows[:, i, None] * block.columns[i] for i in range(2)]
    ordinary = torch.where(zone, terms[1], terms[0]) * signs
    doubled = [block.rows[:, 2 + i, None] * block.columns[i] for i in range(len(block.columns))]
    value = doubled[0] * signs + doubled[1] * residual
    if len(doubled) == 4:
        value = torch.where(zone, doubled[2] * signs + doubled[3] * residual, value)
    return torch.where(block.salient, value, ordinary)


def arb_rc(weight: Tensor, factor: InverseFactor, split: bool, block_size: int = 128) -> list[RowColumnBlock]:
    """Binarize a weight with error compensation; one `RowColumnBlock` per block of columns, left to right.

    Masks are BiLLM's, salient columns and a threshold among the others; with `split` a second one among the salient.
    weight: float (out, in).
    """

    def quantize(current: Tensor, columns: slice) -> tuple[RowColumnBlock, Tensor]:
        diagonal = factor.upper.diagonal()[columns]
        scores = saliency(current, diagonal, "hessian")
        salient, zone = find_masks(scores, 1)
        if split and bool(salient.any()):
            own = scores[:, salient]
            zone[:, salient] = own.abs() >= sparse_threshold(own, torch.zeros_like(salient[salient]))
        block = binarize(current, salient, zone, split)
        block = block._replace(rows=block.rows.half().float(), columns=block.columns.half().float())
        return block, (current - reconstruct(block)) / diagonal

    return quantize_blocks(weight, factor, block_size, quantize)
