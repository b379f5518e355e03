import pytest
import torch

import oracle
from bellbit.core.ltdb import _Descent, initial_scales, learn_block, learn_column_scales


def layer(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    return weight * 0.05, torch.randn(columns, generator=generator).exp() * 3


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 5), (40, 128), (17, 64)])
def test_losses_and_gradient_are_autograds(rows, columns):
    weight, maxima = layer(rows, columns)
    weight = weight.double()
    scales = initial_scales(weight, maxima, 0.85).double().requires_grad_()
    dtnp, dtmd = oracle.dual_bell_losses(weight, scales)
    (expected,) = torch.autograd.grad(dtnp, scales)
    found_dtnp, found_dtmd, gradient = _Descent(weight).losses_and_gradient(scales.detach())
    assert found_dtnp == pytest.approx(dtnp.item(), rel=1e-9)
    assert found_dtmd == pytest.approx(dtmd.item(), rel=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 7, 60])
def test_scales_are_the_plain_loops(steps):
    weights = [layer(rows, 200, seed)[0] for seed, rows in enumerate((64, 32, 48))]
    maxima = layer(1, 200, 9)[1]
    expected = oracle.learn_column_scales(weights, maxima, steps=steps)
    torch.testing.assert_close(learn_column_scales(weights, maxima, steps=steps), expected, rtol=1e-4, atol=0)


def test_start_by_hand():
    weight = torch.tensor([[0.5, -4.0], [0.25, 1.0]])
    scales = initial_scales(weight, torch.tensor([16.0, 9.0]), 0.5)
    torch.testing.assert_close(scales, torch.tensor([(16 / 0.5) ** 0.5, (9 / 4) ** 0.5]))


def test_dead_columns_and_rows_leave_finite_scales():
    weight, maxima = layer(20, 40)
    weight[:, 3] = 0
    weight[5] = 0
    maxima[7] = 0
    scales = learn_column_scales([weight], maxima, steps=30)
    assert scales.isfinite().all() and (scales != 0).all()


@pytest.mark.parametrize("tiny", [0.0, 1e-21, 1e-25])
def test_a_row_of_next_to_nothing_does_not_stop_the_others(tiny):
    weight, maxima = layer(32, 128)
    expected = learn_column_scales([weight], maxima, steps=30)
    appended = torch.cat([weight, tiny * torch.randn(1, 128)])
    start = initial_scales(weight, maxima, 0.85)
    moved = learn_column_scales([appended], maxima, steps=30) - start
    # the mean over 33 rows instead of 32 makes the steps a little smaller
    torch.testing.assert_close(moved, expected - start, rtol=0.1, atol=0.05 * float((expected - start).abs().max()))
    assert moved.abs().max() > 0


def test_scales_carry_no_graph():
    weight, maxima = layer(8, 16)
    assert not learn_column_scales([torch.nn.Parameter(weight)], maxima, steps=2).requires_grad


def test_the_first_step_is_always_taken():
    weight, maxima = layer(20, 40)
    start = initial_scales(weight, maxima, 0.85)
    _, _, gradient = _Descent(weight).losses_and_gradient(start)
    torch.testing.assert_close(learn_block(weight, start, 1), start - 0.01 * gradient)
