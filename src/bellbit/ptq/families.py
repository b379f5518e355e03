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
    chains: pairs of linears; what the first gives reaches the second times something that does not depend on it, so
    that a positive factor moves from columns of the second to rows of the first.
    learns_scales: whether DBellQuant learns T here or only smooths (T = T⁰), as its reference does for OPT.
    act_scope, rounded_outputs: the reference's rule for quantized activations.
    norm_offset: norms multiply by offset + weight.
    """

    blocks: str
    groups: tuple[InputGroup, ...]
    chains: tuple[tuple[str, str], ...] = ()
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


_GATED_CHAINS = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))

_LLAMA = Family(blocks="model.layers", groups=_gated("post_attention_layernorm"), chains=_GATED_CHAINS)
_OPT = Family(
    blocks="model.decoder.layers",
    groups=(
        InputGroup(_ATTENTION, norm="self_attn_layer_norm"),
        InputGroup(("self_attn.out_proj",)),
        InputGroup(("fc1",), norm="final_layer_norm"),
        InputGroup(("fc2",)),
    ),
    chains=(("self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2")),  # ReLU passes positive factors
    learns_scales=False,
    act_scope="tensor",
    rounded_outputs=_ATTENTION,
)
_GEMMA3 = Family(
    blocks="model.layers", groups=_gated("pre_feedforward_layernorm"), chains=_GATED_CHAINS, norm_offset=1.0
)

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


def linear_names(model: Any, family: Family) -> list[str]:
    """Full names of the linears that are quantized, block after block, in the order in which their inputs come."""
    count = len(model.get_submodule(family.blocks))
    return [f"{family.blocks}.{i}.{name}" for i in range(count) for group in family.groups for name in group.linears]


_NO_FOLDING = "use --ltdb off (dbellquant), --columns none (bellbit), or another method"


def check_foldable(config: Any) -> None:
    """Raise BellbitError if column scales cannot be folded into the norms of such a model."""
    if not getattr(config, "do_layer_norm_before", True):
        raise BellbitError(
            "this OPT model normalizes after each sub-layer, so no norm feeds its linears alone and column scales "
            f"cannot be folded; {_NO_FOLDING}"
        )
    if not getattr(config, "layer_norm_elementwise_affine", True):
        raise BellbitError(f"this model's norms have no weights to fold column scales into; {_NO_FOLDING}")


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


def fold_along_chain(block: nn.Module, chain: tuple[str, str], scales: Tensor, head_dim: int) -> None:
    """Columns of the second linear times T, rows and bias of the first by T. The function is unchanged.

    scales: T, positive, one for each row of the first linear (out,). Where the second has more columns, several
    attention heads of `head_dim` in turn read each head of the first. In place.
    """
    source, target = (block.get_submodule(name) for name in chain)
    with torch.no_grad():
        for parameter in source.parameters(recurse=False):
            parameter.div_(scales.view(-1, *[1] * (parameter.ndim - 1)))
        weight: Any = target.weight
        weight.mul_(shared_by_heads(scales, weight.shape[1], head_dim))


def shared_by_heads(scales: Tensor, columns: int, head_dim: int) -> Tensor:
    """One value per row of a linear, repeated for the heads that read it: (out,) to (columns,)."""
    repeat = columns // len(scales)
    return scales if repeat == 1 else scales.view(-1, 1, head_dim).expand(-1, repeat, -1).flatten()
