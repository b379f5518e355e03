"""What bellbit knows about decoder families: which linears share an input, and which norm feeds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.activations import Scope
from bellbit.errors import BellbitError


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder block that read the same input; `norm` made that input, if a norm did."""

    linears: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Family:
    """A decoder architecture.

    blocks: path of the list of decoder blocks. groups: in the order of their inputs' computation.
    learns_scales: whether DBellQuant learns T here or only smooths (T = T⁰), as its reference does for OPT.
    act_scope, rounded_outputs: the reference's rule for quantized activations.
    norm_offset: norms multiply by offset + weight.
    """

    blocks: str
    groups: tuple[InputGroup, ...]
    learns_scales: bool = True
    act_scope: Scope = "token"
    rounded_outputs: tuple[str, ...] = ()
    norm_offset: float = 0.0


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _gated(mlp_norm: str) -> tuple[InputGroup, ...]:
    """Attention and gated MLP, each behind a norm; `mlp_norm` feeds the second."""
    return (
        InputGroup(_ATTENTION, norm="input_layernorm"),
        InputGroup(("self_attn.o_proj",)),
        InputGroup(("mlp.gate_proj", "mlp.up_proj"), norm=mlp_norm),
        InputGroup(("mlp.down_proj",)),
    )


_LLAMA = Family(blocks="model.layers", groups=_gated("post_attention_layernorm"))
_OPT = Family(
    blocks="model.decoder.layers",
    groups=(
        InputGroup(_ATTENTION, norm="self_attn_layer_norm"),
        InputGroup(("self_attn.out_proj",)),
        InputGroup(("fc1",), norm="final_layer_norm"),
        InputGroup(("fc2",)),
    ),
    learns_scales=False,
    act_scope="tensor",
    rounded_outputs=_ATTENTION,
)
_GEMMA3 = Family(blocks="model.layers", groups=_gated("pre_feedforward_layernorm"), norm_offset=1.0)

FAMILIES: dict[str, Family] = {
    "gemma3_text": _GEMMA3,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises BellbitError, listing what is supported."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BellbitError(
            f"the architecture {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return family


def check_foldable(config: Any) -> None:
    """Raise BellbitError if column scales cannot be folded into the norms of such a model."""
    if not getattr(config, "do_layer_norm_before", True):
        raise BellbitError(
            "this OPT model normalizes after each sub-layer, so no norm feeds its linears alone and column scales "
            "cannot be folded; use --ltdb off, or --method billm"
        )
    if not getattr(config, "layer_norm_elementwise_affine", True):
        raise BellbitError("this model's norms have no weights to fold column scales into; use --ltdb off")


def fold_column_scales(block: nn.Module, group: InputGroup, scales: Tensor, norm_offset: float = 0.0) -> None:
    """W ← W·diag(T) for the linears of `group`, weight and bias of its norm ← /T. The function is unchanged.

    scales: T, float (in,), nowhere zero. norm_offset: of the family. In place.
    """
    assert group.norm is not None
    norm = block.get_submodule(group.norm)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            offset = norm_offset if name == "weight" else 0.0
            parameter.copy_((offset + parameter) / scales - offset)  # 16-bit values are promoted to float32
        for name in group.linears:
            weight: Any = block.get_submodule(name).weight
            weight.copy_(weight * scales)
