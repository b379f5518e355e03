"""What a run over the decoder blocks of a model did, and what it tells meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from bellbit.errors import BellbitError
from bellbit.packed.tensor import PackedTensor
from bellbit.ptq.families import InputGroup

Progress = Callable[[float, str], None]  # share done (0 … 1), what is being done


@dataclass
class GroupRecord:
    """What happened to one group of linears that share an input; for reports and figures.

    block, blocks: index of the decoder block and their number. before: weights by linear, as they came.
    act_absmax: input maxima before T (in,). scales: T (in,), if any. packed: the results.
    errors: relative output error by linear, tr(ΔHΔᵀ)/tr(WHWᵀ), or without a Hessian ‖Δ‖²/‖W‖².
    """

    block: int
    blocks: int
    group: InputGroup
    before: dict[str, Tensor]
    act_absmax: Tensor | None = None
    scales: Tensor | None = None
    packed: dict[str, PackedTensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


Observer = Callable[[GroupRecord], None]


@dataclass
class Run:
    """What a run over a model did. errors: as in GroupRecord, by full module name. bits, nominal, seconds: likewise;
    stored bits per weight, as papers count them, and what the linear took; where a block is trained, its share of that.

    fallbacks: linears that were rounded plainly because their Hessian was beyond repair, or, of an expert, that too few
    tokens reached; beyond_repair: how many of them the first.
    algorithm_seconds: spent outside the model's own forward passes and the accumulation of Hessians.
    """

    errors: dict[str, float] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    nominal: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    beyond_repair: int = 0
    algorithm_seconds: float = 0.0

    def add(self, block: str, other: Run) -> None:
        """What was done to the block of that name, whose linears `other` has without it."""
        for what in ("errors", "bits", "nominal", "seconds"):
            getattr(self, what).update({f"{block}.{linear}": x for linear, x in getattr(other, what).items()})
        self.fallbacks += [f"{block}.{linear}" for linear in other.fallbacks]
        self.beyond_repair += other.beyond_repair
        self.algorithm_seconds += other.algorithm_seconds

    def fall_back(self, linears: tuple[str, ...], broken: bool) -> None:
        """Count linears that are rounded plainly. broken: their Hessian is beyond repair, not missing."""
        self.fallbacks += linears
        self.beyond_repair += len(linears) * broken

    def check(self, most: float) -> None:
        """Raise BellbitError if more than `most` linears had Hessians beyond repair."""
        if self.beyond_repair > most:
            raise BellbitError(
                f"the Hessians of {self.beyond_repair} linears cannot be repaired by damping, the last that of "
                f"{self.fallbacks[-1]}; the calibration text is too uniform or the model broken: give other text, or "
                "--allow-fallbacks to round them plainly"
            )


Log = Callable[[str, Run], None]  # told of a block, by its name, and what was done to it
