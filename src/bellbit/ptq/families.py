"""What bellbit knows about decoder families: which linears share an input, and which norm feeds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.activations import Scope
from bellbit.errors import BellbitError

EACH = "*"  # in a name: every expert of the block


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder block that read the same input; `norm` made that input, if a norm did.

    readers: what else reads that input and stays as it is, a router; several groups may name the same norm.
    """

    linears: tuple[str, ...]
    norm: str | None = None
    readers: tuple[str, ...] = ()


Chain = tuple[str, str]


@dataclass(frozen=True)
class Family:
    """A decoder architecture.

    blocks: path of the list of decoder blocks. groups: in the order of their inputs' computation; those of which a
    block has nothing are not there.
    chains: pairs of linears; what the first gives reaches the second times something that does not depend on it, so
    that a positive factor moves from columns of the second to rows of the first.
    learns_scales: whether DBellQuant learns T here or only smooths (T = T⁰), as its reference does for OPT.
    act_scope, rounded_outputs: the reference's rule for quantized activations.
    norm_offset: norms multiply by offset + weight. ordered: whether the last linear of the last group runs last.
    remark: what a user who asks for column scales should know.
    """

    blocks: str
    groups: tuple[InputGroup, ...]
    chains: tuple[Chain, ...] = ()
    learns_scales: bool = True
    act_scope: Scope = "token"
    rounded_outputs: tuple[str, ...] = ()
    norm_offset: float = 0.0
    ordered: bool = True
    remark: str = ""

    def groups_of(self, block: nn.Module) -> list[InputGroup]:
        """The groups that a block has, one for each expert where they are named together."""
        found = []
        for group in self.groups:
            for linears in _each(block, group.linears):
                found.append(replace(group, linears=linears))
        return found

    def chains_of(self, block: nn.Module) -> list[Chain]:
        """The chains that a block has, likewise."""
        return [(pair[0], pair[1]) for chain in self.chains for pair in _each(block, chain) if len(pair) == 2]


def _each(block: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The names as the block has them: none, once, or once for each expert."""
    path, each, _ = names[0].partition(f".{EACH}.")
    if not each:
        if present := tuple(name for name in names if _has(block, name)):
            yield present
    elif _has(block, path):
        for index, _ in block.get_submodule(path).named_children():
            yield tuple(name.replace(EACH, index) for name in names)


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_EXPERT = f"mlp.experts.{EACH}"


def _gated(attention_norm: str | None, mlp_norm: str | None) -> tuple[InputGroup, ...]:
    """Attention and gated MLP, behind a norm each, if they are named."""
    return (
        InputGroup(_QKV, attention_norm),
        InputGroup(("self_attn.o_proj",)),
        InputGroup(("mlp.gate_proj", "mlp.up_proj"), mlp_norm),
        InputGroup(("mlp.down_proj",)),
    )


def _plain(
    qkv: str, out: str, first: str, second: str, attention_norm: str, mlp_norm: str | None
) -> tuple[InputGroup, ...]:
    """Attention from one matrix and an MLP of two; without `mlp_norm` both read what `attention_norm` gives."""
    if mlp_norm is None:
        return (InputGroup((qkv, first), attention_norm), InputGroup((out,)), InputGroup((second,)))
    return (
        InputGroup((qkv,), attention_norm),
        InputGroup((out,)),
        InputGroup((first,), mlp_norm),
        InputGroup((second,)),
    )


_GATED_CHAINS = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))

_LLAMA = Family("model.layers", _gated("input_layernorm", "post_attention_layernorm"), _GATED_CHAINS)
_GEMMA = Family("model.layers", _gated("input_layernorm", "pre_feedforward_layernorm"), _GATED_CHAINS, norm_offset=1.0)
_POST_NORM = Family(
    "model.layers",
    _gated(None, None),
    _GATED_CHAINS,
    remark="this model's norms stand after attention and MLP: no norm feeds a linear, so none takes column scales",
)
_OPT = Family(
    blocks="model.decoder.layers",
    groups=(
        InputGroup(_QKV, norm="self_attn_layer_norm"),
        InputGroup(("self_attn.out_proj",)),
        InputGroup(("fc1",), norm="final_layer_norm"),
        InputGroup(("fc2",)),
    ),
    chains=(("self_attn.v_proj", "self_attn.out_proj"),),
    learns_scales=False,
    act_scope="tensor",
    rounded_outputs=_QKV,
)
_PHI3 = Family(
    "model.layers",
    (
        InputGroup(("self_attn.qkv_proj",), "input_layernorm"),
        InputGroup(("self_attn.o_proj",)),
        InputGroup(("mlp.gate_up_proj",), "post_attention_layernorm"),
        InputGroup(("mlp.down_proj",)),
    ),
)
_GPT2 = Family("transformer.h", _plain("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"))
_GPT_NEOX = Family(
    "gpt_neox.layers",
    _plain(
        *("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        *("input_layernorm", "post_attention_layernorm"),
    ),
)
_MIXTURE = Family(
    "model.layers",
    (
        *_LLAMA.groups,
        InputGroup((f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"), "post_attention_layernorm", readers=("mlp.gate",)),
        InputGroup((f"{_EXPERT}.down_proj",)),
    ),
    (*_GATED_CHAINS, (f"{_EXPERT}.up_proj", f"{_EXPERT}.down_proj")),
)


def _falcon(config: Any) -> Family:
    """Attention and MLP beside each other behind one norm (7B) or one each (40B), or one after the other (RW)."""
    norms: tuple[str, str | None] = ("input_layernorm", "post_attention_layernorm")
    if config.parallel_attn or config.new_decoder_architecture:
        norms = ("input_layernorm", None)
        if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
            norms = ("ln_attn", "ln_mlp")
    linears = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return Family("transformer.h", _plain(*linears, *norms))


def _opt(config: Any) -> Family:
    """OPT's own ReLU passes positive factors; what else was made in its shape may have a GELU, which does not."""
    return replace(_OPT, chains=(*_OPT.chains, ("fc1", "fc2"))) if config.activation_function == "relu" else _OPT


def _stablelm(config: Any) -> Family:
    """As LLaMA, but where attention and MLP stand beside each other both read what the one norm gives."""
    if not config.use_parallel_residual:
        return _LLAMA
    groups = (
        InputGroup((*_QKV, "mlp.gate_proj", "mlp.up_proj"), "input_layernorm"),
        InputGroup(("self_attn.o_proj",)),
        InputGroup(("mlp.down_proj",)),
    )
    return Family("model.layers", groups, _GATED_CHAINS)


FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    "falcon": _falcon,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTURE,
    "olmo2": _POST_NORM,
    "opt": _opt,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _MIXTURE,
    "smollm3": _LLAMA,
    "stablelm": _stablelm,
}


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises BellbitError, listing what is supported."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BellbitError(
            f"the architecture {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}; "
            "--allow-unknown quantizes the linears of any decoder, without folding column scales"
        )
    return family if isinstance(family, Family) else family(config)


def linear_names(model: Any, family: Family) -> list[str]:
    """Full names of the linears that are quantized, block after block, in the order in which their inputs come."""
    return [
        f"{family.blocks}.{index}.{name}"
        for index, block in model.get_submodule(family.blocks).named_children()
        for group in family.groups_of(block)
        for name in group.linears
    ]


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


def by_norm(groups: Iterable[InputGroup]) -> dict[str, list[InputGroup]]:
    """The groups behind each norm: one, or all experts."""
    found: dict[str, list[InputGroup]] = {}
    for group in groups:
        if group.norm is not None:
            found.setdefault(group.norm, []).append(group)
    return found


def fold_column_scales(
    block: nn.Module, groups: Sequence[InputGroup], scales: Tensor, norm_offset: float = 0.0
) -> None:
    """W ← W·diag(T) for all that reads a norm's output, weight and bias of it ← /T. The function is unchanged.

    groups: all behind that norm. scales: T, float (in,), nowhere zero. norm_offset: of the family. In place.
    """
    assert groups[0].norm is not None
    norm = block.get_submodule(groups[0].norm)
    readers = [name for group in groups for name in group.linears] + list(groups[0].readers)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            offset = norm_offset if name == "weight" else 0.0
            parameter.copy_((offset + parameter) / scales - offset)  # 16-bit values are promoted to float32
        for name in readers:
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
