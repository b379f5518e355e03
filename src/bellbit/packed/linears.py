"""Every matrix of a model as an `nn.Linear`: GPT-2 keeps its transposed, mixtures keep their experts' in one array."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bellbit.errors import BellbitError


class Expert(nn.Module):
    """A gated MLP: down(act(gate(x))·up(x))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):
    """Experts of a block, each with linears of its own, called as transformers calls its fused ones."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden: (tokens, width). top_k_index: experts, int64 (tokens, k). top_k_weights: shares, (tokens, k)."""
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if len(token):
                share = top_k_weights[token, place, None]
                out.index_add_(0, token, (expert(hidden[token]) * share).to(out.dtype))
        return out


def _linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear that holds a given weight (out, in), not a copy of it."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def _experts(fused: Any) -> Experts:
    """gate_up_proj: (experts, 2·inner, width). down_proj: (experts, width, inner)."""
    inner = fused.down_proj.shape[2]
    return Experts(
        Expert(first[:inner], first[inner:], second, fused.act_fn)
        for first, second in zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
    )


# What transformers notes of experts, and how it is where they are what `Expert` computes.
_ORDINARY = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "is_transposed": False,
}


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds gated experts in two arrays, as Mixtral's and Qwen3-MoE's do today."""
    arrays = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(array, nn.Parameter) and array.ndim == 3 for array in arrays)


def _check_ordinary(name: str, fused: Any) -> None:
    """Raise BellbitError if fused experts do not compute down(act(gate(x))·up(x)): some clamp, some have biases."""
    gate = getattr(type(fused), "_apply_gate", None)
    if (gate is not None and gate.__name__ != "_default_apply_gate") or any(
        getattr(fused, field, usual) != usual for field, usual in _ORDINARY.items()
    ):
        raise BellbitError(
            f"the experts {name!r} ({type(fused).__name__}) are no plain gated MLPs, and bellbit knows no others"
        )


def unfuse(model: nn.Module) -> None:
    """Put linears into the place of all that is none, in place; the function is unchanged.

    Raises BellbitError for experts that are computed in another way than most.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module.weight.detach().t().contiguous(), module.bias))
        elif _is_fused(module):
            _check_ordinary(name, module)
            model.set_submodule(name, _experts(module))
