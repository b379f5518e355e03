"""Distillation: what is trainable of a whole quantized model, towards the logits of the full-precision one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.ptq.reconstruct import Rates, cosine, parameter_groups, training

TOKENS_AT_ONCE = 256  # through the head: two arrays of logits of 256 × 49152 are 100 MB


class _Divergence(torch.autograd.Function):
    """Mean KL(teacher ‖ student) in nats over tokens, from hidden states and the head, without whole arrays of logits.

    ∂/∂(student's hidden state) = (softmax(student) − softmax(teacher))·W_head / tokens; the head has none.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for out, own, other in zip(*(t.split(TOKENS_AT_ONCE) for t in (gradient, student, teacher)), strict=True):
            p = torch.log_softmax((other.to(head.dtype) @ head.t()).float(), dim=-1)
            q = torch.log_softmax((own.to(head.dtype) @ head.t()).float(), dim=-1)
            share = p.exp()
            total += (share * (p - q)).sum()
            out.copy_((q.exp_().sub_(share)).to(head.dtype) @ head)
        ctx.save_for_backward(gradient.div_(len(student)))
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * upstream, None, None


def divergence(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over tokens, nats; differentiable in the student's hidden states.

    student, teacher: last hidden states, as they enter the head, (tokens, width). head: (vocabulary, width).
    """
    return _Divergence.apply(student, teacher, head)  # type: ignore[no-untyped-call]


@torch.no_grad()
def teacher_states(model: Any, windows: Tensor, bf16: bool) -> Tensor:
    """Last hidden states of the full-precision model, what a few tens of thousands of logits come from: bfloat16 or
    the model's dtype, (windows, length, width)."""
    states = []
    for window in windows:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
            states.append(model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0])
    return torch.stack(states)


@torch.enable_grad()
def distill(
    model: Any,
    windows: Tensor,
    states: Tensor,
    held_back: int,
    steps: int,
    rates: Rates,
    bf16: bool,
    generator: torch.Generator,
    report: Callable[[float, float], None],
) -> tuple[float, float]:
    """Train scales and norms, and with a rate for them the latents, one window a step; the best state stays.

    windows: int64 (n, length). states: of the teacher on them. held_back: how many windows, the last, are not trained
    on. report: told the share of steps and the last divergence held back. Returns that before and after.
    """
    train = len(windows) - held_back
    head = model.get_output_embeddings().weight.detach()
    if bf16:
        head = head.bfloat16()

    def error(index: int) -> Tensor:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
            own = model.base_model(input_ids=windows[index : index + 1], use_cache=False).last_hidden_state[0]
        return divergence(own, states[index], head)

    def held() -> float:
        with torch.no_grad():
            return sum(float(error(i)) for i in range(train, len(windows))) / held_back

    groups = parameter_groups(model, rates)
    tuned = [p for group in groups for p in group["params"]]
    first = best = held()
    kept = [p.detach().clone() for p in tuned]
    with training(model, groups) as optimizer:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
        for step in range(steps):
            if step % train == 0:
                order = torch.randperm(train, generator=generator).tolist()
            error(order[step % train]).backward()
            nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % train == 0 or step + 1 == steps:
                now = held()
                if now < best:
                    best = now
                    kept = [p.detach().clone() for p in tuned]
            report((step + 1) / steps, best)
    with torch.no_grad():
        for p, value in zip(tuned, kept, strict=True):
            p.copy_(value)
    return first, best
