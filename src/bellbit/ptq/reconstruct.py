"""Block reconstruction: codes, scales and norms of one decoder block trained towards what the float block gave."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bellbit.ptq.fit import Plan, fit


def robust_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖y − ŷ‖² / ‖y‖²: some tokens' norms are a thousand times the others' and say no more.

    output, target: (..., tokens, width). Returns a float32 scalar.
    """
    target = target.float()
    return ((output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


def reconstruct(
    block: nn.Module,
    call: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    plan: Plan,
    report: Callable[[float], None],
) -> list[float]:
    """Train a block in place.

    block: with `LatentLinear`s. call: the block on hidden states (1, length, width). inputs: (windows, length, width)
    from the quantized blocks before; targets: of the same shape, from the float chain. Returns the mean error on the
    windows held back, before training and after every epoch.
    """

    def error(index: int) -> Tensor:
        window = slice(index, index + 1)
        return robust_error(call(inputs[window]), targets[window])

    return fit(block, error, plan, lambda done, _: report(done))
