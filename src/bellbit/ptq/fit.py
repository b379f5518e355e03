"""The training loop of the ladder's rungs: Adam over latents, scales and norms, stopped by windows held back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.errors import BellbitError
from bellbit.ptq.latent import latent_linears
from bellbit.ptq.resume import Saved

WARM_UP = 0.05  # share of the steps
LARGEST_NORM = 1.0  # of the gradient
BETAS = (0.9, 0.95)
SEEDS = 2**32 - 5  # a CPU's generator hears 32 bits of a seed, so larger ones go by their remainder to this prime


@dataclass(frozen=True)
class Rates:
    """Of Adam. signs: of latents of one bit, in units of the scale; levels: of those of more. relative: of scales and
    norms, as a share of their size; of a norm's bias, of its weight's.

    A rate of 0 leaves that kind as it is.
    """

    signs: float
    levels: float
    relative: float


@dataclass(frozen=True)
class Plan:
    """windows: how many there are, of which the last `held_back` are not trained on. seed: of their order.

    norm_offset: of the family.
    """

    windows: int
    held_back: int
    epochs: int
    rates: Rates
    seed: int
    norm_offset: float = 0.0

    @property
    def trained(self) -> int:
        return self.windows - self.held_back


def is_norm(module: nn.Module) -> bool:
    """Whether a module is what normalizes hidden states, by its type's name."""
    return "Norm" in type(module).__name__


def parameter_groups(module: nn.Module, rates: Rates, norm_offset: float = 0.0) -> list[dict[str, Any]]:
    """What a rung trains: latents and scales of its `LatentLinear`s, the weights and biases of its norms."""
    linears = latent_linears(module).values()
    norms: list[Any] = [m for m in module.modules() if is_norm(m) and getattr(m, "weight", None) is not None]

    def size(norm: Any) -> float:
        return float((norm_offset + norm.weight.detach()).abs().mean())

    groups: list[dict[str, Any]] = [
        {"params": [layer.latent for layer in linears if layer.width == 1], "lr": rates.signs},
        {"params": [layer.latent for layer in linears if layer.width > 1], "lr": rates.levels},
        {"params": [layer.log_scales for layer in linears], "lr": rates.relative},
        *({"params": [p], "lr": rates.relative * size(m)} for m in norms for p in m.parameters(recurse=False)),
    ]
    return [group for group in groups if group["lr"] > 0 and group["params"]]


def squared_cosine(step: int, steps: int) -> float:
    """Share of the largest rate: up in the first 5 % of the steps, then the square of half a cosine down to nothing.

    Signs near zero settle only as the rate goes to nothing. Error held back of the demo model's first block after 2
    epochs of 226 × 1024 tokens, by the power of the cosine: .0666 (1), .0642 (2), .0647 (3), .0666 (5); .0735 with a
    line instead, .087 with exponentials to 1/30 and 1/3000.
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return ((1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2) ** 2


@torch.no_grad()
def clip(gradients: list[Tensor]) -> None:
    """Shorten what is longer than `LARGEST_NORM` in all; the rest is left alone, which saves a pass over memory."""
    norm = nn.utils.get_total_norm(gradients)
    if norm > LARGEST_NORM:
        torch._foreach_mul_(gradients, LARGEST_NORM / norm)


class _State:
    """Where a fit stands: what is trained, the best of it so far, and how many epochs are done."""

    def __init__(self, optimizer: torch.optim.Optimizer, saved: Saved | None, kept_as: str) -> None:
        self.optimizer, self.saved, self.kept_as = optimizer, saved, kept_as
        self.tuned: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.best: list[Tensor] = []
        self.errors: list[float] = []

    @property
    def epochs(self) -> int:
        return len(self.errors) - 1

    def add(self, error: float) -> None:
        """The error held back, before the first or after another epoch."""
        if not self.best and not math.isfinite(error):
            raise BellbitError(
                f"the error on the text held back is {error} before anything is trained: hidden states are no numbers, "
                "or too large for their type; is the model sound?"
            )
        if error < min(self.errors, default=math.inf):
            self.best = [p.detach().clone() for p in self.tuned]
        self.errors.append(error)
        if self.saved is None:
            return
        tensors = {f"best.{i}": p for i, p in enumerate(self.best)} | {f"now.{i}": p for i, p in enumerate(self.tuned)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        self.saved.keep(self.kept_as, tensors, errors=self.errors)

    @torch.no_grad()
    def restore(self) -> bool:
        """Go to where an earlier run stood; False if there was none."""
        if self.saved is None or (found := self.saved.load(self.kept_as)) is None:
            return False
        tensors, notes = found
        self.errors = notes["errors"]
        for i, p in enumerate(self.tuned):
            p.copy_(tensors[f"now.{i}"])
        self.best = [tensors[f"best.{i}"] for i in range(len(self.tuned))]
        state = self.optimizer.state_dict()
        for key in (key for key in tensors if key.startswith("adam.")):
            _, number, name = key.split(".")
            state["state"].setdefault(int(number), {})[name] = tensors[key]
        self.optimizer.load_state_dict(state)
        return True

    @torch.no_grad()
    def put_best(self) -> None:
        for p, value in zip(self.tuned, self.best, strict=True):
            p.copy_(value)


@torch.enable_grad()
def fit(
    module: nn.Module,
    error: Callable[[int, int | None], Tensor],
    plan: Plan,
    report: Callable[[float, float], None],
    saved: Saved | None = None,
    kept_as: str = "fit",
) -> list[float]:
    """Train a module in place, one window a step; the best state by the windows held back stays.

    error: of one window in some epoch, or in none where it is held back, a scalar. report: told the share of steps
    done and the least mean error held back. saved: keeps the state of every epoch under the name `kept_as`, and takes
    up one that it has. Returns that error before training and after epochs.
    Raises BellbitError if it is no number before training.
    """
    groups = parameter_groups(module, plan.rates, plan.norm_offset)
    flags = {p: p.requires_grad for p in module.parameters()}
    tuned = [p for group in groups for p in group["params"]]
    for p in flags:
        p.requires_grad_(any(p is t for t in tuned))
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    rates = [group["lr"] for group in groups]
    steps = plan.epochs * plan.trained

    def held() -> float:
        with torch.no_grad():
            return sum(float(error(i, None)) for i in range(plan.trained, plan.windows)) / plan.held_back

    state = _State(optimizer, saved, kept_as)
    if not state.restore():
        state.add(held())
    for epoch in range(state.epochs, plan.epochs):
        generator = torch.Generator().manual_seed((plan.seed + epoch) % SEEDS)
        order = torch.randperm(plan.trained, generator=generator)
        for step, index in enumerate(order.tolist(), start=epoch * plan.trained):
            error(index, epoch).backward()
            clip([p.grad for p in tuned if p.grad is not None])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * squared_cosine(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            report((step + 1) / steps, min(state.errors))
        state.add(held())
    state.put_best()
    for p, flag in flags.items():
        p.requires_grad_(flag)
        p.grad = None
    return state.errors
