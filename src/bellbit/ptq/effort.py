"""How much the ladder trains, in which pieces and at which rates; each figure with what it was chosen by."""

from __future__ import annotations

from dataclasses import dataclass

from bellbit.ptq.fit import Rates
from bellbit.ptq.methods import METHODS, Settings

# Tokens at most that a step of training sees. Divergence of the demo model on unseen windows of wiki-sample with five
# blocks reconstructed, 2 epochs of 120 × 1024 tokens: .751 with 1024 (106 s), .496 with 512 (97 s), .468 with 256 and
# lower rates (114 s; 512 with lower rates: .479).
PIECE = 512
# And a step of distillation, which must know long contexts: a fourth of an epoch from the same blocks leaves, on the
# four quarters of windows of 1024 tokens of test articles, 1.58, 1.66, 1.89, 2.14 with 512 tokens a step (120 steps),
# and 1.60, 1.71, 1.87, 1.87 with 1024 (60 steps, as long). The first half with 512 and then 1024: no better than 512.
DISTILLED_PIECE = 1024


@dataclass(frozen=True)
class Effort:
    """How much is trained, in epochs over all windows.

    blocks: of each block, twice as many of the first ones. tail: of the last ones together. distilled: of all together.
    """

    blocks: int
    tail: int
    distilled: int

    @property
    def whole(self) -> bool:
        """Whether something is trained after the last block was."""
        return self.tail + self.distilled > 0


EFFORTS = {
    "fast": Effort(blocks=1, tail=1, distilled=1),
    "balanced": Effort(blocks=2, tail=3, distilled=1),
    "best": Effort(blocks=6, tail=4, distilled=3),
}
# Blocks that are trained twice as long, as all that follow live with what these lose: of a divergence of 1.8 in the
# end, .33 is there after two. With 8 epochs for 2: .275 and .256 for .329 and .303 (unseen wiki-sample, own text).
FIRST_BLOCKS = 2
# How many are trained together in the end. From blocks of 2 epochs on 64 + 64 windows, divergence on unseen wiki-sample
# and own text of 2.74 and 1.69: after one epoch 2.10 and 1.38 with four (95 s), 2.18 and 1.40 with eight (117 s).
TAIL = 4
MOSTLY_SIGNS = 1.6  # bits per weight up to which most weights are signs
HELD_BACK = 16  # one piece of so many, at least one, is kept to stop by


@dataclass(frozen=True)
class Pace:
    """Rates of the rungs."""

    blocks: Rates
    tail: Rates
    distilled: Rates


# blocks, in the setting of PIECE: .476 with .015 and .05, .479 with .02 and .03, .496 with .03 and .03, .530 with .02
# and .01. tail, in the setting of TAIL, two epochs: 1.94 and 1.29; .01 and .015: 1.99 and 1.32; no latents and .015:
# 1.98 and 1.31. distilled, in the setting of DISTILLED_PIECE: 1.943 on unseen wiki-sample, 2.115 with .02.
SIGN_PACE = Pace(blocks=Rates(0.02, 0.005, 0.03), tail=Rates(0.0025, 0.0005, 0.01), distilled=Rates(0.0, 0.0, 0.01))
# blocks, one epoch at two bits: .251 with .005 and .02, .282 with .005 and .01 and with .01 and .02, .298 with .02 and
# .03. tail, two epochs at 2.4 bits, from .687 and .493 (unseen wiki-sample, own text): .604 and .442; .001 and .004:
# .611 and .445; .0025 and .003: .626 and .449; .0025 and .01: .629 and .452. distilled, from the last: .601 and .440
# with .003, nothing gained with .01. Beside signs, latents of more bits keep these rates.
FINER_PACE = Pace(blocks=Rates(0.02, 0.005, 0.02), tail=Rates(0.0025, 0.0005, 0.004), distilled=Rates(0.0, 0.0, 0.003))


def pace(bpw: float) -> Pace:
    """Under a budget of bits per weight; measured at 1.14 and 2.4, not between."""
    return SIGN_PACE if bpw < MOSTLY_SIGNS else FINER_PACE


def own_windows(settings: Settings, samples: int) -> int:
    """How many windows of its own text the model writes beside `samples` of calibration text: as many.

    Three times as many gain nothing in as many steps: .405 for .404 (docs/trials.md).
    """
    return samples if METHODS[settings.method].climbs and "text" in settings.rungs else 0


def efforts(settings: Settings) -> Effort:
    """What is trained on the rungs that are climbed."""
    effort = EFFORTS[settings.effort]
    return Effort(
        effort.blocks * ("blocks" in settings.rungs),
        effort.tail * ("tail" in settings.rungs),
        effort.distilled * ("distill" in settings.rungs),
    )
