"""Block reconstruction: codes, scales and norms of one decoder block trained towards what the float block gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.ptq.latent import latent_linears

WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Rates:
    """Of Adam. latents: in units of the scale. relative: of scales and norms, as a share of their size."""

    latents: float
    relative: float


def parameter_groups(module: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """What a rung trains: latents and scales of its `LatentLinear`s, the weights and biases of its norms.

    A rate of 0 leaves that kind out.
    """
    linears = latent_linears(module).values()
    norms = [p for m in module.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)]
    groups: list[dict[str, Any]] = [
        {"params": [layer.latent for layer in linears], "lr": rates.latents},
        {"params": [layer.log_scales for layer in linears], "lr": rates.relative},
        *({"params": [norm], "lr": rates.relative * float(norm.detach().abs().mean())} for norm in norms),
    ]
    return [group for group in groups if group["lr"] > 0]


def cosine(step: int, steps: int) -> float:
    """Share of the largest rate: up in the first 5 % of the steps, then half a cosine down to nothing."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


@contextmanager
def training(module: nn.Module, groups: list[dict[str, Any]]) -> Iterator[torch.optim.Optimizer]:
    """An optimizer over `groups`; for the time of the context nothing else of the module has a gradient."""
    wanted = {id(p) for group in groups for p in group["params"]}
    before = {p: p.requires_grad for p in module.parameters()}
    for p in before:
        p.requires_grad_(id(p) in wanted)
    try:
        yield torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)
            p.grad = None


def robust_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖y − ŷ‖² / ‖y‖²: some tokens' norms are a thousand times the others' and say no more.

    output, target: (..., tokens, width). Returns a float32 scalar.
    """
    target = target.float()
    return ((output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.enable_grad()
def reconstruct(
    block: nn.Module,
    call: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    held_back: int,
    epochs: int,
    rates: Rates,
    bf16: bool,
    generator: torch.Generator,
    report: Callable[[float], None],
) -> tuple[float, float]:
    """Train a block in place, one window a step; the best state by the windows held back stays.

    block: with `LatentLinear`s. call: the block on hidden states (1, length, width). inputs: (windows, length, width)
    from the quantized blocks before; targets: of the same shape, from the float chain. held_back: how many windows, the
    last, are not trained on. Returns the error on them before and after.
    """
    train = len(inputs) - held_back
    steps = epochs * train
    groups = parameter_groups(block, rates)
    tuned = [p for group in groups for p in group["params"]]

    def error(index: int) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            return robust_error(call(inputs[index : index + 1]), targets[index : index + 1])

    def held() -> float:
        with torch.no_grad():
            return sum(float(error(i)) for i in range(train, len(inputs))) / held_back

    first = best = held()
    kept = [p.detach().clone() for p in tuned]
    with training(block, groups) as optimizer:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
        for step in range(steps):
            if step % train == 0:
                order = torch.randperm(train, generator=generator).tolist()
            error(order[step % train]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            report((step + 1) / steps)
            if (step + 1) % train == 0 and (now := held()) < best:
                best = now
                kept = [p.detach().clone() for p in tuned]
    with torch.no_grad():
        for p, value in zip(tuned, kept, strict=True):
            p.copy_(value)
    return first, best
