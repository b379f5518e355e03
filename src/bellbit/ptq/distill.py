"""Distillation: what is trainable of a whole quantized model, towards the logits of the full-precision one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bellbit.ptq.fit import Plan, fit
from bellbit.ptq.resume import Saved

TOKENS_AT_ONCE = (
    128  # through the head: an array of logits of 128 × 49152 is 25 MB, and malloc maps anew what is over 32
)


class _Divergence(torch.autograd.Function):
    """Mean KL(teacher ‖ student) in nats over tokens, from hidden states and the head, without whole arrays of logits.

    ∂/∂(student's hidden state) = (softmax(student) − softmax(teacher))·W_head / tokens; the head has none. Where
    logits are z = c·tanh(h/c), each has the factor 1 − (z/c)² besides.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, cap: float | None) -> Tensor:
        gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for out, own, other in zip(*(t.split(TOKENS_AT_ONCE) for t in (gradient, student, teacher)), strict=True):
            p = _logits(other, head, cap).log_softmax(dim=-1)
            q = _logits(own, head, cap)
            slope = None if cap is None else 1 - (q / cap).square()
            q = q.log_softmax(dim=-1)
            share = p.exp()
            total += p.sub_(q).mul_(share).sum()
            wrt_logits = q.exp_().sub_(share)
            out.copy_((wrt_logits if slope is None else wrt_logits.mul_(slope)).to(head.dtype) @ head)
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
def teacher_states(
    model: Any, windows: Tensor, bf16: bool, report: Callable[[float], None] = lambda done: None
) -> Tensor:
    """Last hidden states, as they enter the head: (windows, length, width), in bfloat16 with `bf16`.

    They are what all logits come from, at a hundredth of their size.
    """
    states = []
    for window in windows:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
            found = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0]
        states.append(found.bfloat16() if bf16 else found)
        report(len(states) / len(windows))
    return torch.stack(states)


def distill(
    model: Any,
    windows: Tensor,
    states: Tensor,
    plan: Plan,
    bf16: bool,
    report: Callable[[float, float], None],
    saved: Saved,
) -> list[float]:
    """Train scales and norms of a whole model, and with a rate for them the latents, in place.

    windows: int64 (n, length). states: of the teacher on them. Returns the mean divergence on the windows held back,
    nats, before training and after every epoch.
    """
    head = model.get_output_embeddings().weight.detach().to(states.dtype)

    def error(index: int) -> Tensor:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
            own = model.base_model(input_ids=windows[index : index + 1], use_cache=False).last_hidden_state[0]
        return divergence(own, states[index], head, logit_cap(model.config))

    return fit(model, error, plan, report, saved)
