import itertools

import pytest
import torch
from test_compensate import problem

from bellbit.core.arb import alternate, calibrate, nearest_pair
from bellbit.core.binarize import BinarizedBlock, binarize_block, reconstruct_block


def binarized(rows=20, columns=64, seed=0):
    weight, hessian = problem(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    salient = torch.rand(columns, generator=generator) < 0.2
    return weight, hessian, binarize_block(weight, salient, weight.abs() > 0.8)


def test_one_round_on_a_row_by_hand():
    weight = torch.tensor([[1.0, 2.0, 6.0, -1.0]])
    none = torch.zeros(4, dtype=torch.bool)
    block = BinarizedBlock(torch.tensor([[False, True, True, False]]), none[None], torch.zeros(1, 7), none)
    block.scales[0, :2] = torch.tensor([1.0, 2.0])
    found = alternate(weight, block, rounds=1)
    # W − αB − μ = (2, −1, 3, 0), mean 1: μ = 2; B∘(W − μ) = (1, 0, 4, 3): α = 2; signs of W − μ = (−1, 0, 4, −3)
    assert found.scales[0, :2].tolist() == [2.0, 2.0]
    assert found.signs.tolist() == [[False, True, True, False]]


def test_alternation_never_raises_the_squared_error():
    weight, _, block = binarized()
    refined = [alternate(weight, block, rounds) for rounds in range(16)]
    errors = [float((weight - reconstruct_block(found)).square().sum()) for found in refined]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[15] < 0.97 * errors[0]


def test_calibration_never_raises_the_output_error_and_ends_at_least_squares():
    weight, hessian, block = binarized()

    def error(block):
        difference = weight - reconstruct_block(block)
        return float(((difference @ hessian) * difference).sum())

    errors = [error(calibrate(weight, block, hessian, rounds)) for rounds in (0, 1, 2, 5, 15, 3000)]
    assert errors == sorted(errors, reverse=True)
    # the numbers of row 0 by least squares: its reconstruction is linear in them
    unit = [block._replace(scales=torch.eye(7)[[i] * len(weight)]) for i in range(7)]
    design = torch.stack([reconstruct_block(u)[0] for u in unit], dim=1).double()
    root = torch.linalg.cholesky(hessian.double()).t()
    solution = torch.linalg.lstsq(root @ design, root @ weight[0].double()).solution
    found = calibrate(weight, block, hessian, 3000).scales[0].double()
    torch.testing.assert_close(design @ found, design @ solution, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_of_four_sums(seed):
    generator = torch.Generator().manual_seed(seed)
    values, a, b = torch.randn(3, 5, 8, generator=generator)
    first, second = nearest_pair(values, a, b)
    found = torch.where(first, a, -a) + torch.where(second, b, -b)
    brute = torch.stack([s * a + t * b for s in (1, -1) for t in (1, -1)])
    assert torch.equal((values - found).abs(), (values - brute).abs().amin(dim=0))
