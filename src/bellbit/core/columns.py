"""Column scales for weights that keep one magnitude per row and group: W·diag(T) with every column alike in size.

A grid of one scale per row and group fits best where |w_rc| ≈ αʳ_r·αᶜ_c with αᶜ constant. So T = 1/αᶜ, which is folded
into what feeds the columns, takes away what the grid cannot follow.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bellbit.core.compensate import blocks
from bellbit.core.grid import GROUP
from bellbit.core.ltdb import EPSILON, initial_scales

Estimate = Literal["rank1", "mean", "maxima"]
ROUNDS = 8  # of αʳ and αᶜ in turn, which converge like a power iteration


def column_scales(weight: Tensor, importance: Tensor, estimate: Estimate, group: int = GROUP) -> Tensor:
    """T for a weight: float32 (in,), positive, with geometric mean 1.

    `rank1`: αᶜ of ARB-LLM_RC (arXiv 2410.03129 §3.3), the least squares of Σ h·(|w| − αʳ·αᶜ)², αʳ per row and group.
    `mean`: αᶜ = mean|w| of the column. `maxima`: what LTDB starts from (DBellQuant, arXiv 2507.01027 §3.3),
    αᶜ = max|w|^(1−ε) / √h^ε with LTDB's ε, the inputs' root mean square for their maximum.
    A column of zeros gets 1.
    weight: (rows, in), of all linears that share the columns. importance: h (in,), mean squares of the inputs.
    """
    size = weight.abs().float()
    column = size.mean(dim=0)
    if estimate == "maxima":
        inputs = importance.float().sqrt()
        started = initial_scales(weight, inputs.where(inputs > 0, 1.0), EPSILON)
        column = torch.where(column > 0, started.reciprocal(), 0.0)
    if estimate == "rank1":
        parts = []
        for part in blocks(size.shape[1], group):
            own, h, alpha = size[:, part], importance[part], column[part]
            for _ in range(ROUNDS):
                row = (own @ (h * alpha)) / (h @ alpha.square()).clamp_min(1e-30)
                alpha = (row @ own) / row.square().sum().clamp_min(1e-30)
            parts.append(alpha)
        column = torch.cat(parts)
    dead = column <= 0
    logs = torch.where(dead, 1.0, column).log()
    return torch.where(dead, 1.0, (logs.sum() / (~dead).sum().clamp_min(1) - logs).exp())
