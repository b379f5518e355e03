import torch

from bellbit.core.hessian import accumulate, inverse_factor, new_hessian


def test_accumulation_is_two_over_n_times_xtx():
    x = torch.randn(6, 5, 7)
    hessian = new_hessian(7)
    for batch in (x[:2], x[2:3], x[3:]):
        accumulate(hessian, batch, samples=6)
    flat = x.reshape(-1, 7)
    torch.testing.assert_close(hessian, 2 / 6 * flat.T @ flat)


def test_factor_of_the_damped_inverse():
    x = torch.randn(100, 12, dtype=torch.float64)
    hessian = x.T @ x
    factor = inverse_factor(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.damping == 0.01


def test_dead_inputs_are_reported_and_harmless():
    x = torch.randn(50, 6)
    x[:, 2] = 0
    factor = inverse_factor(x.T @ x)
    assert factor.dead.tolist() == [False, False, True, False, False, False]
    assert factor.upper.isfinite().all()


def test_damping_is_raised_tenfold_when_needed():
    # the least eigenvalue is −0.05 of the mean diagonal: 1 % does not help, 10 % does
    factor = inverse_factor(torch.tensor([[1.0, 1.05], [1.05, 1.0]]))
    assert factor.damping == 0.1


def test_beyond_repair_only_the_diagonal_is_used():
    factor = inverse_factor(torch.tensor([[1.0, 9.0], [9.0, 4.0]]))
    assert factor.damping is None
    torch.testing.assert_close(factor.upper, torch.diag(torch.tensor([1.0, 0.5])))
