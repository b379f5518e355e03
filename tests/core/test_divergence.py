import math

import pytest
import torch

from bellbit.core.divergence import divergences


@pytest.mark.parametrize("slope", [False, True])
def test_two_tokens_by_hand(slope):
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    found = divergences(student, teacher, slope)
    assert float(found) == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    if slope:
        torch.testing.assert_close(student, torch.tensor([[0.5 - 0.75, 0.5 - 0.25]]))


def test_the_slope_is_the_derivative():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 30, generator=generator) for _ in range(2))
    given = student.clone().requires_grad_()
    log_q, log_p = given.log_softmax(-1), teacher.log_softmax(-1)
    want = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    want.sum().backward()
    torch.testing.assert_close(divergences(student, teacher, True), want.detach())
    torch.testing.assert_close(student, given.grad)
