"""Rounding to signs, the naive baseline: what llama-quantize does for Q1_0."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_signs(weight: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """The nearest ±d for each row and group of columns: d = mean|w|, least-squares optimal given the signs.

    weight: float (out, in). Returns signs, bool (out, in), True for w ≥ 0, and d, float32 (out, ⌈in/group⌉).
    """
    scales = torch.stack([part.abs().float().mean(dim=1) for part in weight.split(group, dim=1)], dim=1)
    return weight >= 0, scales
