"""Distillation: what is trainable of a whole quantized model, towards the logits of the full-precision one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.errors import BellbitError
from bellbit.kernels import divergences
from bellbit.ptq.fit import Plan, fit
from bellbit.ptq.resume import Saved
from bellbit.ptq.stream import acting, giving

# Through the head: an array of logits of 128 × 49152 is 25 MB, and malloc maps anew what is over 32.
TOKENS_AT_ONCE = 128
# One token of so many of a window is learned from in an epoch, in the next its neighbour: the head takes two thirds of
# the time of a step of the tail. Ladder with 32 + 32 windows up to the tail, divergence on other articles and Python's
# documentation: 2.267 and 3.460, with all tokens 2.259 and 3.459.
ONE_OF = 2
HEAD_TOKENS = 32  # that are looked at to see whether a model's head is as it is taken to be


class _Divergence(torch.autograd.Function):
    """Mean KL(teacher ‖ student) in nats over tokens, from hidden states and the head, without whole arrays of logits.

    ∂/∂(student's hidden state) = (softmax(student) − softmax(teacher))·W_head / tokens; the head has none. Where
    logits are z = c·tanh(h/c), each has the factor 1 − (z/c)² besides.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, cap: float | None) -> Tensor:
        gradient, trained = torch.empty_like(student), ctx.needs_input_grad[0]
        total = student.new_zeros((), dtype=torch.float32)
        for out, own, other in zip(*(t.split(TOKENS_AT_ONCE) for t in (gradient, student, teacher)), strict=True):
            logits = _logits(own, head, cap)
            slope = 1 - (logits / cap).square() if trained and cap is not None else None
            total += divergences(logits, _logits(other, head, cap), trained).sum()
            if trained:  # a product with the head that where nothing is trained would be for nothing
                out.copy_((logits if slope is None else logits.mul_(slope)).to(head.dtype) @ head)
        if trained:
            ctx.save_for_backward(gradient.div_(len(student)))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * upstream, None, None, None


def _logits(states: Tensor, head: Tensor, cap: float | None) -> Tensor:
    logits = (states.to(head.dtype) @ head.t()).float()
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def divergence(student: Tensor, teacher: Tensor, head: Tensor, cap: float | None = None) -> Tensor:
    """Mean KL(teacher ‖ student) over tokens, nats; differentiable in the student's hidden states.

    student, teacher: last hidden states, as they enter the head, (tokens, width). head: (vocabulary, width).
    cap: logits are cap·tanh(·/cap), as Gemma 2's.
    """
    return _Divergence.apply(student, teacher, head, cap)  # type: ignore[no-untyped-call]


def logit_cap(config: Any) -> float | None:
    """`cap` of a model."""
    return getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def check_head(model: Any, windows: Tensor) -> None:
    """Raise BellbitError if a model's logits are not its last hidden states times its head, within .1 %.

    Some architectures scale them, or have a bias. windows: token ids (samples, length), of which a few are read.
    """
    few = windows[:1, :HEAD_TOKENS]
    found = model(input_ids=few, use_cache=False).logits[0].float()
    head = model.get_output_embeddings().weight
    expected = _logits(last_states(model, few, 0, bf16=False), head, logit_cap(model.config))
    if not torch.allclose(found, expected, rtol=0, atol=1e-3 * float(found.abs().max())):
        raise BellbitError(
            f"the logits of a {model.config.model_type!r} are not its last hidden states times its head, which the "
            "rungs budget, tail and distill take for granted; leave them out with --rungs text,codes,blocks"
        )


@dataclass(frozen=True)
class Front:
    """The first decoder blocks of a model, and what comes out of the last of them for each window: they need not run.

    states: (windows, length, width). in_tuple: whether a block gives them in a tuple.
    """

    blocks: Sequence[nn.Module]
    states: Tensor
    in_tuple: bool

    def acting(self, window: int, device: torch.device) -> AbstractContextManager[None]:
        """Inside, they hand on what belongs to a window."""
        return acting(self.blocks, partial(giving, self.states[window : window + 1].to(device), self.in_tuple))


def last_states(model: Any, windows: Tensor, index: int, bf16: bool, front: Front | None = None) -> Tensor:
    """Last hidden states of one window, as they enter the head: (length, width)."""
    device = windows.device
    instead = front.acting(index, device) if front else nullcontext()
    with instead, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        states: Tensor = model.base_model(input_ids=windows[index : index + 1], use_cache=False).last_hidden_state[0]
    return states


@torch.no_grad()
def teacher_states(
    model: Any,
    windows: Tensor,
    bf16: bool,
    report: Callable[[float], None] = lambda done: None,
    front: Front | None = None,
) -> Tensor:
    """Last hidden states of all windows: (windows, length, width), in bfloat16 with `bf16`.

    They are what all logits come from, at a hundredth of their size.
    """
    states = []
    for index in range(len(windows)):
        found = last_states(model, windows, index, bf16, front)
        states.append(found.bfloat16() if bf16 else found)
        report(len(states) / len(windows))
    return torch.stack(states)


def distill(
    model: Any,
    trained: nn.Module,
    windows: Tensor,
    states: Tensor,
    plan: Plan,
    bf16: bool,
    report: Callable[[float, float], None],
    saved: Saved | None = None,
    kept_as: str = "fit",
    front: Front | None = None,
) -> list[float]:
    """Train the part `trained` of a model, in place: scales and norms, and with a rate for them latents.

    windows: int64 (n, length). states: of the teacher on them. saved, kept_as: see `fit`. Returns the mean divergence
    on the windows held back, nats, before training and after every epoch.
    """
    head = model.get_output_embeddings().weight.detach().to(states.dtype)

    def error(index: int, epoch: int | None) -> Tensor:
        own = last_states(model, windows, index, bf16, front)
        some = slice(None) if epoch is None else slice((index + epoch) % ONE_OF, None, ONE_OF)
        return divergence(own[some], states[index][some], head, logit_cap(model.config))

    return fit(trained, error, plan, report, saved, kept_as)
