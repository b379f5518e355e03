"""The methods by name: what each needs from a block and how it turns one weight into a packed one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bellbit.core.activations import ACTIVATION_BITS, Scope
from bellbit.core.arb import alternate, calibrate
from bellbit.core.binarize import BinarizedBlock
from bellbit.core.braq import braq
from bellbit.core.columns import Estimate
from bellbit.core.grid import STEPS, first_codes
from bellbit.core.hessian import InverseFactor, inverse_factor
from bellbit.core.ltdb import EPSILON
from bellbit.core.partial import pb_llm
from bellbit.core.rowcolumn import arb_rc
from bellbit.core.search import METRICS, Metric
from bellbit.core.signs import round_to_signs
from bellbit.core.uniform import quantize_uniform
from bellbit.errors import BellbitError
from bellbit.packed.codebook2 import Codebook2, round_scales
from bellbit.packed.partial import Partial
from bellbit.packed.planes import SIGN_BLOCK, Sign128, Symmetric, Uniform
from bellbit.packed.rowcolumn import RowColumn
from bellbit.packed.tensor import PackedTensor, stored_bits
from bellbit.ptq.families import Family

Ltdb = Literal["auto", "learn", "smooth", "off"]
Effort = Literal["fast", "balanced", "best"]
ALL_SIGNS = 1.125  # --bpw that asks for one sign a weight, as llama.cpp's Q1_0 stores it
WIDE_GROUP = 1024  # columns that share a scale of signs under any other budget
RUNGS = ("text", "budget", "codes", "blocks", "tail", "distill")  # of the method bellbit, see docs/method.md
_BRAQ = ("dbellquant", "billm", "arb", "arb-x")
OWN_OPTIONS = {  # which methods heed an option; the others may not be given it
    "bits": ("gptq", "rtn"),
    "block_size": (*_BRAQ, "arb-rc", "pb-llm", "gptq", "rtn"),
    "scale_bits": _BRAQ,
    "metric": _BRAQ,
    "compensate": (*_BRAQ, "gptq"),
    "ltdb": ("dbellquant",),
    "ltdb_steps": ("dbellquant",),
    "epsilon": ("dbellquant",),
    "bpw": ("bellbit",),
    "effort": ("bellbit",),
    "rungs": ("bellbit",),
    "columns": ("bellbit",),
    "bitmap": ("arb-rc",),
}


@dataclass(frozen=True)
class Settings:
    """What a quantization run can be told. Raises BellbitError for a value that is not possible.

    bits: 1 … 8. act_bits: 16, 8 or 6, of bellbit 16. block_size: columns per block, or group.
    metric: of saliency. bitmap: whether the salient columns are split as well. OWN_OPTIONS says of which methods.
    compensate: feed each block's error into the next ones. epsilon, ltdb_steps: of the column scales.
    ltdb: learn column scales, only smooth (T = T⁰), or leave out; `auto` as the published reference does for the
    family. act_scope: one activation step per token or per tensor; `auto` likewise. scale_bits: 16 or 8.
    Of bellbit only: bpw, the most bits per quantized weight, all stored bits counted (at 1.125, in rows that 128 does
    not divide, a little more: their last scale has fewer signs); effort; rungs, those of RUNGS that are climbed, none
    for those of the effort; columns, which estimate of column scales is folded, if any.
    """

    method: str = "dbellquant"
    bits: int = 2
    act_bits: int = 16
    block_size: int = 128
    metric: Metric = "hessian"
    compensate: bool = True
    epsilon: float = EPSILON
    ltdb: Ltdb = "auto"
    ltdb_steps: int = 200
    scale_bits: int = 16
    act_scope: Scope | Literal["auto"] = "auto"
    bpw: float = 1.125
    effort: Effort = "balanced"
    rungs: tuple[str, ...] = ()
    columns: Estimate | Literal["none"] = "none"
    bitmap: bool = True

    def __post_init__(self) -> None:
        def require(holds: bool, option: str, value: object, allowed: str) -> None:
            if not holds:
                raise BellbitError(f"--{option} {value} is not possible; allowed: {allowed}")

        def one_of(option: str, value: object, allowed: tuple[object, ...]) -> None:
            require(value in allowed, option, value, ", ".join(map(str, allowed)))

        one_of("method", self.method, tuple(METHODS))
        one_of("act-bits", self.act_bits, ACTIVATION_BITS)
        one_of("metric", self.metric, METRICS)
        one_of("ltdb", self.ltdb, get_args(Ltdb))
        one_of("scale-bits", self.scale_bits, (16, 8))
        one_of("act-scope", self.act_scope, ("auto", *get_args(Scope)))
        one_of("effort", self.effort, get_args(Effort))
        one_of("columns", self.columns, ("none", *get_args(Estimate)))
        for rung in self.rungs:
            one_of("rungs", rung, RUNGS)
        require(ALL_SIGNS <= self.bpw <= 4.125, "bpw", self.bpw, "1.125 to 4.125")
        require(1 <= self.bits <= 8, "bits", self.bits, "1 to 8")
        require(self.block_size >= 2, "block-size", self.block_size, "2 and more")
        require(0 <= self.epsilon <= 1, "epsilon", self.epsilon, "0 to 1")
        require(self.ltdb_steps >= 0, "ltdb-steps", self.ltdb_steps, "0 and more")
        for option, methods in OWN_OPTIONS.items():
            if self.method not in methods and getattr(self, option) != getattr(Settings, option):
                name, those = option.replace("_", "-"), ", ".join(methods)
                raise BellbitError(f"--{name} is of the method {those}; leave it out for {self.method}")
        if METHODS[self.method].climbs:
            if not self.rungs:  # an epoch of distillation takes as long as one of all blocks
                usual = tuple(rung for rung in RUNGS if rung != "distill" or self.effort != "fast")
                object.__setattr__(self, "rungs", usual)  # the dataclass is frozen
            require(self.act_bits == 16, "act-bits", self.act_bits, f"16 with the method {self.method}")

    def resolved(self, family: Family) -> Settings:
        """The same with every `auto` that is read made definite for a family."""
        ltdb = self.ltdb
        if ltdb == "auto" and METHODS[self.method].transforms:
            ltdb = "learn" if family.learns_scales else "smooth"
        return replace(self, ltdb=ltdb, act_scope=family.act_scope if self.act_scope == "auto" else self.act_scope)

    @property
    def folds(self) -> bool:
        """Whether column scales are folded into norms; `ltdb` must have been resolved."""
        method = METHODS[self.method]
        return (method.climbs and self.columns != "none") or (method.transforms and self.ltdb != "off")

    @property
    def resolved_scope(self) -> Scope:
        """`act_scope`, which must have been resolved."""
        assert self.act_scope != "auto"
        return self.act_scope


Quantize = Callable[[Tensor, InverseFactor | None, Settings], PackedTensor]


@dataclass(frozen=True)
class Method:
    """quantize: (weight (out, in), factor of the inverse Hessian or None, settings) -> packed weight.

    transforms: whether column scales are folded in first. calibrates: whether it needs Hessians, hence text.
    saliency: whether it ranks columns by saliency. needs_factor: whether it cannot do without a Hessian.
    climbs: whether a model goes through `ptq.ladder`.
    """

    quantize: Quantize
    transforms: bool = False
    calibrates: bool = True
    saliency: bool = False
    needs_factor: bool = False
    climbs: bool = False


def _braq(ordinary_order: Literal[1, 2], refinement: Literal["none", "alternate", "calibrate"] = "none") -> Quantize:
    def quantize(weight: Tensor, factor: InverseFactor | None, settings: Settings) -> PackedTensor:
        gram = None
        if refinement == "calibrate":
            assert factor is not None
            gram = torch.cholesky_inverse(factor.upper, upper=True)

        def refine(current: Tensor, block: BinarizedBlock, columns: slice) -> BinarizedBlock:
            if refinement != "none":
                block = alternate(current, block)
            return block if gram is None else calibrate(current, block, gram[columns, columns])

        parts = braq(
            weight,
            factor,
            ordinary_order=ordinary_order,
            block_size=settings.block_size,
            metric=settings.metric,
            compensate=settings.compensate,
            refine=refine,
            store=lambda scales: round_scales(scales, settings.scale_bits),
        )
        return Codebook2.pack(parts, settings.block_size, settings.scale_bits)

    return quantize


def _uniform(weight: Tensor, factor: InverseFactor | None, settings: Settings) -> PackedTensor:
    groups = quantize_uniform(weight, factor if settings.compensate else None, settings.bits, settings.block_size)
    return Uniform.pack(groups, settings.bits, settings.block_size)


def _arb_rc(weight: Tensor, factor: InverseFactor | None, settings: Settings) -> PackedTensor:
    assert factor is not None
    parts = arb_rc(weight, factor, settings.bitmap, settings.block_size)
    return RowColumn.pack(parts, settings.block_size, settings.bitmap)


def _pb_llm(weight: Tensor, factor: InverseFactor | None, settings: Settings) -> PackedTensor:
    assert factor is not None
    return Partial.pack(pb_llm(weight, factor, settings.block_size), settings.block_size)


def _sign(weight: Tensor, factor: InverseFactor | None, settings: Settings) -> PackedTensor:
    return Sign128.pack(*round_to_signs(weight))


def _grid(weight: Tensor, factor: InverseFactor | None, settings: Settings) -> PackedTensor:
    widths = STEPS if settings.bpw > ALL_SIGNS else ()
    width = max((b for b in widths if bits_of_levels(weight.shape, b, settings.bpw) <= settings.bpw), default=1)
    return pack_levels(*first_codes(weight, factor, width, group_of(width, settings.bpw)), width, settings.bpw)


def pack_levels(levels: Tensor, scales: Tensor, width: int, bpw: float) -> PackedTensor:
    """A weight on the symmetric grid as it is stored under a budget of `bpw` for the model.

    Signs are `sign128` if it asks for nothing else. Otherwise all is `symmetric`, whose scales take little: that buys a
    second bit for the weights that gain most. levels: (out, in). scales: (out, groups of `group_of`).
    """
    if bpw <= ALL_SIGNS:
        return Sign128.pack(levels > 0, scales / 2)
    return Symmetric.pack(levels, scales, width, group_of(width, bpw))


def group_of(width: int, bpw: float) -> int:
    """How many columns share a scale where weights have `width` bits, under a budget of `bpw`.

    Trained signs need no scales for every 128, finer levels do. Divergence of five blocks on unseen windows, 1024 for
    128: .417 for .439 with 1.14 bits in all, .274 for .250 with two bits for every weight (docs/trials.md).
    """
    return WIDE_GROUP if width == 1 and bpw > ALL_SIGNS else SIGN_BLOCK


def bits_of_levels(shape: Sequence[int], width: int, bpw: float) -> float:
    """Bits per weight that `pack_levels` stores for a weight of `shape` (out, in)."""
    layout, options = (
        (Sign128, {}) if bpw <= ALL_SIGNS else (Symmetric, {"width": width, "group_size": group_of(width, bpw)})
    )
    return sum(stored_bits(layout, (shape[0], shape[1]), options).values())


METHODS: dict[str, Method] = {
    "bellbit": Method(_grid, climbs=True),
    "dbellquant": Method(_braq(ordinary_order=1), transforms=True, saliency=True),
    "billm": Method(_braq(ordinary_order=2), saliency=True),
    "arb": Method(_braq(ordinary_order=1, refinement="alternate"), saliency=True),
    "arb-x": Method(_braq(ordinary_order=1, refinement="calibrate"), saliency=True, needs_factor=True),
    "arb-rc": Method(_arb_rc, saliency=True, needs_factor=True),
    "pb-llm": Method(_pb_llm, saliency=True, needs_factor=True),
    "gptq": Method(_uniform),
    "rtn": Method(_uniform, calibrates=False),
    "sign": Method(_sign, calibrates=False),
}


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    method: str = "dbellquant",
    block_size: int = 128,
    metric: Metric = "hessian",
    compensate: bool = True,
    **options: Any,
) -> PackedTensor:
    """Quantize one weight by itself, without column scales.

    weight: float (out, in). hessian: undamped H = (2/n)·Σ XᵀX, (in, in); None only if nothing needs it: with
    `method="rtn"`, or with `compensate=False` and, where that is read, `metric="magnitude"`. options: other fields of
    `Settings` (`bits`, `scale_bits`).
    Returns a PackedTensor: see its `dequantize()` and `bits_per_weight`.
    Raises BellbitError for impossible settings, a missing or ill-shaped Hessian, and NaN or infinite input.
    """
    settings = Settings(method, block_size=block_size, metric=metric, compensate=compensate, **options)
    if not bool(weight.isfinite().all()):
        raise BellbitError("the weight holds NaN or infinite values")
    if hessian is None:
        ranked = METHODS[method].saliency and metric == "hessian"
        if METHODS[method].needs_factor or (METHODS[method].calibrates and (compensate or ranked)):
            raise BellbitError(
                f"{method} needs a Hessian; rtn and sign do without, gptq with compensate=False, and dbellquant, "
                "billm and arb with that and metric='magnitude'"
            )
        return METHODS[method].quantize(weight, None, settings)
    if hessian.shape != (weight.shape[1], weight.shape[1]) or not bool(hessian.isfinite().all()):
        raise BellbitError(
            f"the Hessian must be finite and {weight.shape[1]} × {weight.shape[1]} for a weight of shape "
            f"{tuple(weight.shape)}; it is {tuple(hessian.shape)}"
        )
    factor = inverse_factor(hessian.float()) if METHODS[method].calibrates else None
    return METHODS[method].quantize(weight, factor, settings)
