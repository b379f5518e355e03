"""What the ladder trains in a decoder block, before it is trained: folded columns, first codes, latents.

docs/method.md explains the option `columns` and the rung `codes`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.columns import Estimate, column_scales
from bellbit.core.grid import first_codes
from bellbit.core.hessian import inverse_factor
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.collect import group_hessians
from bellbit.ptq.families import (
    Family,
    InputGroup,
    by_norm,
    fold_along_chain,
    fold_column_scales,
    shared_by_heads,
)
from bellbit.ptq.latent import LatentLinear
from bellbit.ptq.layers import relative_error, weight_of
from bellbit.ptq.methods import Settings, bits_of_levels, group_of
from bellbit.ptq.run import Run
from bellbit.ptq.stream import BlockStream, ignore

HESSIAN_PIECES = 128  # at most; what training starts from need not know all


def enter(
    block: nn.Module, blocks: Blocks, stream: BlockStream, settings: Settings, name: str, widths: dict[str, int]
) -> Run:
    """Give the linears of a block their column scales and first codes, as layers to be trained.

    blocks: to which it belongs. widths: by linear. Errors are those of the first codes.
    """
    family, config = blocks.family, blocks.model.config
    hessians = group_hessians(stream, block, family, settings, name, ignore, HESSIAN_PIECES)
    if settings.columns != "none":
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        fold_columns(block, family, hessians, settings.columns, head_dim)
    run = Run()
    for group in family.groups_of(block):
        hessian = hessians.pop(group, None)
        factor = inverse_factor(hessian) if hessian is not None and "codes" in settings.rungs else None
        if hessian is None or (factor is not None and factor.damping is None):
            run.fall_back(group.linears, broken=hessian is not None)
        for linear in group.linears:
            old: Any = block.get_submodule(linear)
            weight = old.weight.detach().float()
            width, bpw = widths[linear], settings.bpw
            levels, scales = first_codes(weight, factor, width, group_of(width, bpw))
            layer = LatentLinear.starting(weight, levels, scales, width, bpw, old.bias)
            block.set_submodule(linear, layer)
            run.errors[linear] = relative_error(weight, layer.weight(), hessian)
            run.bits[linear] = bits_of_levels(weight.shape, width, bpw)
            run.nominal[linear] = width
    return run


def fold_columns(
    block: nn.Module, family: Family, hessians: dict[InputGroup, Tensor], estimate: Estimate, head_dim: int
) -> None:
    """Scale the columns of every linear that something exact can be folded into, and `hessians` with them, in place."""
    groups = family.groups_of(block)
    chains = {second: (first, second) for first, second in family.chains_of(block)}

    def importance(behind: list[InputGroup]) -> Tensor:
        """Mean squares of the inputs, as far as they are known."""
        known = [hessians[group].diagonal() for group in behind if group in hessians]
        return torch.stack(known).sum(dim=0) if known else torch.ones_like(weight_of(block, behind[0].linears[0])[0])

    def rescale(behind: list[InputGroup], scales: Tensor) -> None:
        for group in behind:
            if group in hessians:
                hessians[group] /= scales[:, None] * scales

    for behind in by_norm(groups).values():
        weight = torch.cat([weight_of(block, name) for group in behind for name in group.linears])
        scales = column_scales(weight, importance(behind), estimate)
        fold_column_scales(block, behind, scales, family.norm_offset)
        rescale(behind, scales)
    for group in groups:
        if (chain := chains.get(group.linears[0])) is not None:
            weight = weight_of(block, chain[1])
            rows = len(weight_of(block, chain[0]))
            own = column_scales(*_heads_as_rows(weight, importance([group]), rows, head_dim), estimate)
            fold_along_chain(block, chain, own, head_dim)
            rescale([group], shared_by_heads(own, weight.shape[1], head_dim))


def _heads_as_rows(weight: Tensor, importance: Tensor, columns: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """A weight with the heads that read the same columns one below the other: (out·repeat, columns), and (columns,)."""
    repeat = weight.shape[1] // columns
    if repeat == 1:
        return weight, importance
    heads = weight.unflatten(1, (-1, repeat, head_dim)).transpose(1, 2)  # (out, repeat, heads, head_dim)
    return heads.reshape(-1, columns), importance.unflatten(0, (-1, repeat, head_dim)).mean(dim=1).flatten()
