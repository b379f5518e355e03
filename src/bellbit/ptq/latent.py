"""A linear layer while the ladder trains it: float latents that stand for codes, and the scales of their groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bellbit.core.grid import nearest_levels, spread
from bellbit.kernels import straight_through
from bellbit.packed.tensor import PackedTensor
from bellbit.ptq.methods import group_of, pack_levels

MARGIN = 0.05  # how far inside its cell a latent starts whose code is not that of its weight, in units of the scale


class LatentLinear(nn.Module):
    """y = x·Ŵᵀ + bias, Ŵ = s·ℓ(latent) on the symmetric grid of `width` bits; trained straight through.

    latent: float32 (out, in), in units of the scale. log_scales: logarithm of s, float32 (out, groups of `group_of`).
    bpw: the budget under which it is stored.
    """

    def __init__(self, latent: Tensor, log_scales: Tensor, width: int, bpw: float, bias: Tensor | None) -> None:
        super().__init__()
        self.width, self.bpw = width, bpw
        self.latent, self.log_scales = nn.Parameter(latent.contiguous()), nn.Parameter(log_scales.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def starting(
        cls, weight: Tensor, levels: Tensor, scales: Tensor, width: int, bpw: float, bias: Tensor | None
    ) -> LatentLinear:
        """With given codes: latents are the weights themselves, moved into the cell of their code where they are not.

        weight, levels: (out, in). scales: (out, groups).
        """
        relative = weight / spread(scales, weight.shape[1], group_of(width, bpw))
        low = levels - 0.5
        inside = nearest_levels(relative, width) == levels
        latent = torch.where(inside, relative, relative.clamp(low + MARGIN, low + 1 - MARGIN))
        return cls(latent + 0.0, scales.log(), width, bpw, bias)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ (out, in)."""
        return straight_through(self.latent, self.log_scales.exp(), self.width, dtype, group_of(self.width, self.bpw))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return nn.functional.linear(x, self.weight(dtype), self.bias)

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """As it is stored."""
        return pack_levels(nearest_levels(self.latent, self.width), self.log_scales.exp(), self.width, self.bpw)


def latent_linears(model: nn.Module) -> dict[str, LatentLinear]:
    """The layers in training of a model or block by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LatentLinear)}
