"""How far one distribution over the vocabulary is from another."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def divergences(student: Tensor, teacher: Tensor, slope: bool) -> Tensor:
    """KL(teacher ‖ student) of every row of logits, nats: float32 (n,).

    student, teacher: float32 (n, vocabulary), scratch afterwards. With `slope` the student's become the derivative by
    them, softmax(student) − softmax(teacher).
    """
    p, q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    share = p.exp()
    found = p.sub_(q).mul_(share).sum(dim=-1)
    if slope:
        torch.sub(q.exp_(), share, out=student)
    return found
