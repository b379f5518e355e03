"""Structural search: which columns of a block are salient, and where its other weights split in two groups.

Source: BiLLM (arXiv 2402.04291) §3.2 and Algorithm 1. The search looks at a saliency S, not at the weights:
it binarizes S and measures the squared error of S. A plain loop runs 49 + 81 binarizations of the whole
block; here each candidate costs a few sums, because for a set M of n numbers

    Σ (s − μ − α·sign(s − μ))² = Σ s² − n·μ² − n·α²,     n·α = Σ |s − μ|.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Metric = Literal["hessian", "magnitude"]
METRICS: tuple[Metric, ...] = ("hessian", "magnitude")

ROWS_AT_ONCE = 256  # keeps the working set of the threshold search in the second-level cache
MAX_SALIENT = 50  # the search tries 1 … 49 salient columns
QUANTILES = torch.linspace(0.1, 0.9, 81, dtype=torch.float64)


def saliency(weight: Tensor, cholesky_diagonal: Tensor | None, metric: Metric) -> Tensor:
    """S = W² / diag(U)² for `hessian`, S = W for `magnitude` (BiLLM eq. 2).

    weight: (r, c). cholesky_diagonal: (c,), the block's part of the diagonal of U, the upper Cholesky factor
    of the inverse Hessian; unused for `magnitude`.
    """
    if metric == "magnitude":
        return weight
    assert cholesky_diagonal is not None, "the hessian metric needs the Cholesky diagonal"
    return weight.square() / cholesky_diagonal.square()


def _order1_error(values: Tensor) -> Tensor:
    """Squared error of the one-term fit of each column of `values` (n, r), summed over everything."""
    mean = values.mean(dim=0)
    deviation = (values - mean).abs_().sum(dim=0)
    return (values.square().sum(dim=0) - len(values) * mean.square() - deviation.square() / len(values)).sum()


def _order2_error(values: Tensor) -> Tensor:
    """Squared error of the two-term fit of each column of `values` (n, r), summed over everything."""
    centred = values - values.mean(dim=0)
    scale = centred.abs().mean(dim=0)
    residual = centred.addcmul_(torch.sign(centred), scale, value=-1)
    residual -= residual.mean(dim=0)
    deviation = residual.abs().sum(dim=0)
    return (residual.square().sum(dim=0) - deviation.square() / len(values)).sum()


def salient_columns(scores: Tensor, ordinary_order: Literal[1, 2]) -> Tensor:
    """The set of salient columns of least error: bool (c,).

    Columns are ranked by Σ_r |S|. For k = 1 … min(50, c) − 1 the error is that of two binary terms on the
    first k and `ordinary_order` terms on the others (1 in DBellQuant, 2 in BiLLM); the first least k wins.
    scores: float (r, c). A block of one column has no salient one.
    """
    columns = scores.shape[1]
    order = scores.abs().sum(dim=0).argsort(descending=True)
    ranked = scores.t()[order].contiguous()  # columns lead, so that every candidate is a contiguous slice
    rest_error = _order1_error if ordinary_order == 1 else _order2_error
    candidates = range(1, min(MAX_SALIENT, columns))
    salient = torch.zeros(columns, dtype=torch.bool, device=scores.device)
    if candidates:
        errors = torch.stack([_order2_error(ranked[:k]) + rest_error(ranked[k:]) for k in candidates])
        salient[order[: int(errors.argmin()) + 1]] = True
    return salient


def _sorted(values: Tensor) -> Tensor:
    """`values` ascending along the last dimension. NumPy's vectorized sort is 20–30 times faster on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _quantiles(values: Tensor) -> Tensor:
    """The 81 quantiles 10 % … 90 % of `values`, linearly interpolated, without `torch.quantile`'s size limit."""
    ordered = _sorted(values.flatten())
    position = QUANTILES.to(values.device) * (len(ordered) - 1)
    below = position.floor().long()
    above = (below + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], (position - below).to(values.dtype))


def sparse_threshold(scores: Tensor, salient: Tensor) -> Tensor:
    """The threshold t on |S| that splits the ordinary weights with least error: 0-d tensor.

    Tried are the 81 quantiles of |S|, the salient columns zeroed but counted. Concentrated is |S| < t, sparse
    |S| ≥ t, each with one binary term per row. The first least t wins.

    Each row is sorted once. The concentrated set is then one interval of it, the sparse set the two tails,
    and every sum comes from prefix sums and a binary search.
    scores: float (r, c). salient: bool (c,), not all True.
    """
    thresholds = _quantiles(torch.where(salient, 0, scores.abs()))
    ordered = _sorted(scores[:, ~salient])
    gain = torch.stack([_split_gain(rows, thresholds) for rows in ordered.split(ROWS_AT_ONCE)]).sum(dim=0)
    return thresholds[gain.argmax()]


def _split_gain(ordered: Tensor, thresholds: Tensor) -> Tensor:
    """What the two one-term fits on either side of each threshold take off Σ s²: float64 (thresholds,).

    ordered: (r, n), each row ascending. thresholds: (t,).
    """
    rows, columns = ordered.shape
    prefix = torch.zeros(rows, columns + 1, dtype=torch.float64, device=ordered.device)
    torch.cumsum(ordered, dim=1, dtype=torch.float64, out=prefix[:, 1:])
    per_row = thresholds.expand(rows, -1).contiguous()
    first = torch.searchsorted(ordered, -per_row, right=True)
    last = torch.maximum(first, torch.searchsorted(ordered, per_row))

    def below(position: Tensor) -> Tensor:
        return prefix.gather(1, position)

    def explained(count: Tensor, total: Tensor, mean: Tensor, count_below: Tensor, sum_below: Tensor) -> Tensor:
        """n·μ² + n·α², with n·α = 2·Σ (μ − s) over the s below μ."""
        deviation = 2 * (count_below * mean - sum_below)
        return (mean * total + deviation.square_() / count).sum(dim=0)

    sum_first, sum_last = below(first), below(last)
    inner, total = last - first, sum_last - sum_first
    count = inner.double().clamp_min_(1)
    mean = total / count
    cut = torch.searchsorted(ordered, mean.to(ordered.dtype)).clamp_(first, last)
    gain = explained(count, total, mean, cut - first, below(cut) - sum_first)

    total = prefix[:, -1:] - total
    count = (columns - inner).double().clamp_min_(1)
    mean = total / count
    cut = torch.searchsorted(ordered, mean.to(ordered.dtype))
    low, high = torch.minimum(cut, first), torch.maximum(cut, last)
    return gain + explained(count, total, mean, low + high - last, below(low) + below(high) - sum_last)


def find_masks(scores: Tensor, ordinary_order: Literal[1, 2]) -> tuple[Tensor, Tensor]:
    """The masks of one block from its saliency.

    scores: float (r, c). Returns salient bool (c,) and sparse bool (r, c); `sparse` is False in salient columns.
    """
    salient = salient_columns(scores, ordinary_order)
    threshold = sparse_threshold(scores, salient)
    return salient, (scores.abs() >= threshold) & ~salient
