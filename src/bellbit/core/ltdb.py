"""LTDB, the learnable transformation for dual-bell: column scales that turn one bell of weights into two.

Source: DBellQuant (arXiv 2507.01027) §3.2–3.3. For V = W·diag(T), per row over a block of n columns,

    m = mean(V),  d = mean|V − m|,  τ± = m ± d,  τ(v) the nearer of the two (τ₋ on a tie),
    DTNP = 100 · mean((v − τ)² / τ²)     trained, by plain gradient descent on T
    DTMD = mean|v − τ|                   stops the training as soon as it rises

The gradient is written out instead of left to autograd. With σ = ±1 for the bell that v belongs to and
e = v/τ − 1, DTNP's derivatives (up to the factor 200/N) are ∂/∂v = e/τ and ∂/∂τ = −e·v/τ². Since τ has only two
values a row, Σ ∂/∂τ follows from the sums n±, Σv and Σv² of each bell: no pass over the weights is needed
for it. m and d pass their gradients on to every v of the row. (The code's `sigma` is −σ, which spares a pass.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bellbit.core.compensate import blocks

EPSILON = 0.85  # migration strength where nothing else is said
LEARNING_RATE = 0.01
SMALLEST_TARGET = 1e-12  # 1/τ² overflows float32 below 1e-19, and one such row would stop the whole block
SMALLEST_SCALE = 1e-5


def initial_scales(weight: Tensor, act_absmax: Tensor, epsilon: float) -> Tensor:
    """T⁰ = max|X_c|^ε / max_r|W_rc|^(1−ε), at least 1e-5 (SmoothQuant's rule, arXiv 2211.10438 eq. 4).

    weight: (out, in). act_absmax: (in,). An all-zero weight column, whose T⁰ would be infinite, gets 1.
    """
    column = weight.abs().amax(dim=0).float()
    scales = (act_absmax.float() ** epsilon / column ** (1 - epsilon)).clamp_min(SMALLEST_SCALE)
    return torch.where(column == 0, 1.0, scales)


class _Descent:
    """Gradient descent on the scales T of one block of columns of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (r, n)
        self.square = weight.square()
        self.ones = torch.ones_like(weight)

    def losses_and_gradient(self, scales: Tensor) -> tuple[float, float, Tensor]:
        """DTNP, DTMD and ∂DTNP/∂T (n,) at T = `scales` (n,)."""
        weight, square = self.weight, self.square
        rows, n = weight.shape
        total = weight @ scales  # Σ v per row
        mean = total / n
        below = torch.addcmul(mean[:, None], weight, scales, value=-1)  # m − v
        sigma = torch.copysign(self.ones, below)  # +1 in the lower bell; a weight at the mean belongs to it
        signed = sigma * weight
        signed_square = signed * weight
        # Σ σ, Σ σ·v, Σ v², Σ σ·v² per row, as products with T
        sigma_sum = -(sigma @ self.ones[0])
        sigma_total = -(signed @ scales)
        power = square @ scales.square()
        sigma_power = -(signed_square @ scales.square())

        distance = (sigma_total - sigma_sum * mean) / n  # d = mean σ(v − m)
        dtmd = float((below.abs_() - distance[:, None]).abs_().mean())

        # the two bells, stacked: (2, r), first τ₊
        sign = torch.tensor([[1.0], [-1.0]], device=weight.device)
        tau = mean + sign * distance
        count = (n + sign * sigma_sum) / 2
        first = (total + sign * sigma_total) / 2
        second = (power + sign * sigma_power) / 2
        slope = 1 / tau.square()  # e/τ = v/τ² − 1/τ
        offset = -1 / tau
        # a bell without weights, or of a row of (next to) nothing, contributes nothing
        empty = (count == 0) | (tau.abs() < SMALLEST_TARGET)
        slope, offset = slope.masked_fill(empty, 0), offset.masked_fill(empty, 0)
        dtnp = 100 * float((second * slope + 2 * first * offset + count).sum()) / (rows * n)

        wrt_tau = slope * (first + second * offset)  # Σ −e·v/τ² = Σ (v/τ² − v²/τ³)
        wrt_mean = wrt_tau.sum(dim=0)
        wrt_distance = (sign * wrt_tau).sum(dim=0)
        # ∂d/∂v = (σ − mean σ)/n, ∂m/∂v = 1/n
        offset = offset + (wrt_mean + wrt_distance * (sign - sigma_sum / n)) / n

        # Σ_r w·(slope·v + offset), each coefficient split into its mean over the bells and half their difference
        slope_mean, slope_half = slope.sum(dim=0) / 2, (slope[0] - slope[1]) / 2
        offset_mean, offset_half = offset.sum(dim=0) / 2, (offset[0] - offset[1]) / 2
        gradient = scales * (slope_mean @ square - slope_half @ signed_square)
        gradient += offset_mean @ weight - offset_half @ signed
        return dtnp, dtmd, gradient * (200 / (rows * n))


def learn_block(weight: Tensor, scales: Tensor, steps: int) -> Tensor:
    """T of one block after at most `steps` steps from `scales`.

    Returned is the T that the step at the least DTNP seen led to. The first step is always taken.
    weight: float32 (r, n). scales: float32 (n,). Returns float32 (n,).
    """
    descent = _Descent(weight)
    best_loss, previous_dtmd = float("inf"), float("inf")
    best = scales
    for _ in range(steps):
        dtnp, dtmd, gradient = descent.losses_and_gradient(scales)
        if dtmd > previous_dtmd:
            break
        scales = scales - LEARNING_RATE * gradient
        if dtnp < best_loss:
            best_loss, best = dtnp, scales
        previous_dtmd = dtmd
    return best


@torch.no_grad()
def learn_column_scales(
    weights: Sequence[Tensor],
    act_absmax: Tensor,
    epsilon: float = EPSILON,
    steps: int = 200,
    block_size: int = 128,
) -> Tensor:
    """Column scales T for the linear layers that share one norm: W ← W·diag(T), norm ← norm / T.

    DBellQuant Algorithm 1: each layer and each block of columns is trained by itself; each column then takes
    the T of largest absolute value among the layers.
    weights: linears (out_i, in), any float type. act_absmax: max|X_c| over the calibration set (in,).
    epsilon: in [0, 1]. steps: at most this many per block; 0 gives T⁰. Returns float32 (in,).
    """
    learned = []
    for weight in weights:
        scales = initial_scales(weight, act_absmax, epsilon)
        parts = [
            learn_block(weight[:, block].float().contiguous(), scales[block], steps)
            for block in blocks(weight.shape[1], block_size)
        ]
        learned.append(torch.cat(parts))
    stacked = torch.stack(learned)
    return stacked.gather(0, stacked.abs().argmax(dim=0, keepdim=True)).squeeze(0)
