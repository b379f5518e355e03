import pytest
import torch
from test_compensate import problem

from bellbit.core import grid
from bellbit.core.hessian import accumulate, inverse_factor, new_hessian


def output_error(weight, levels, scales, hessian):
    difference = weight - grid.spread(scales, weight.shape[1], 32) * levels
    return float(((difference @ hessian) * difference).sum())


def test_levels_are_half_integers_and_zero_goes_up():
    values = torch.tensor([-9.0, -1.5, -0.2, 0.0, 0.2, 1.0, 9.0])
    assert grid.nearest_levels(values, 1).tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    assert grid.nearest_levels(values, 2).tolist() == [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5]


def test_the_scale_of_signs_is_twice_the_weighted_mean_magnitude():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0, -6.0]])
    importance = torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0])
    scales = grid.fit_scales(weight, importance, width=1, group=3)
    # d = Σ h|w| / Σ h by group: (1 + 2 + 6) / 4 and (12 + 6) / 4
    assert scales.tolist() == [pytest.approx([4.5, 9.0])]


@pytest.mark.parametrize(("width", "least"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_scales_of_a_bell_come_near_the_best_uniform_quantizer(width, least):
    weight = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(0))
    scales = grid.fit_scales(weight, torch.ones(100_000), width, group=100_000)
    error = (weight - scales * grid.nearest_levels(weight / scales, width)).square().mean()
    assert float(error) == pytest.approx(least, rel=0.01)  # Max's table (1960)


def test_groups_of_zeros_and_a_short_last_group():
    weight = torch.zeros(2, 5)
    scales = grid.fit_scales(weight, torch.zeros(5), width=2, group=4)
    assert scales.shape == (2, 2)
    assert bool((scales.half() > 0).all())


@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_way_to_the_codes_is_better_than_the_one_before(width):
    weight, hessian = problem(rows=48, columns=96)
    factor = inverse_factor(hessian)
    sound = torch.cholesky_inverse(factor.upper, upper=True)
    scales = grid.fit_scales(weight, torch.ones(96), width, 32)
    errors = [output_error(weight, grid.nearest_levels(weight / grid.spread(scales, 96, 32), width), scales, sound)]
    levels, scales = grid.feedback_levels(weight, factor, width, 32)
    errors.append(output_error(weight, levels, scales, sound))
    scales = grid.refit_scales(weight, levels, scales, sound, 32)
    errors.append(output_error(weight, levels, scales, sound))
    levels, scales = grid.descend(weight, levels, scales, sound, width, group=32)
    errors.append(output_error(weight, levels, scales, sound))
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    assert errors[3] < 0.9 * errors[2]


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_weights_of_dead_inputs_get_the_nearest_code_and_do_not_decide_scales(size):
    """A grid without a zero cannot leave them out; the 1 that stands for their mean square is much or nothing."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(8, 200, generator=generator), size * torch.randn(400, 200, generator=generator)
    inputs[:, ::3] = 0
    hessian = new_hessian(200)
    accumulate(hessian, inputs, 1)
    factor = inverse_factor(hessian)
    levels, scales = grid.first_codes(weight, factor, 1)
    assert torch.equal(levels[:, ::3], grid.nearest_levels(weight[:, ::3], 1))
    rest = weight - grid.spread(scales, 200) * levels
    lost, whole = (float(((w @ hessian) * w).sum()) for w in (rest, weight))
    assert lost < 0.4 * whole
    assert 1.2 < float(scales.mean()) < 2.2  # 2·mean|w| = 1.6; with a 1 for the dead ones .01 at 1e-3


def test_refitted_scales_are_least_squares():
    weight, hessian = problem(rows=3, columns=40)
    levels = grid.nearest_levels(weight, 2)
    scales = grid.refit_scales(weight, levels, torch.ones(3, 2), hessian, 32)
    root = torch.linalg.cholesky(hessian.double()).t()
    for row in range(3):
        columns = torch.stack([levels[row]] * 2)
        columns[0, 32:] = columns[1, :32] = 0
        expected = torch.linalg.lstsq(root @ columns.double().t(), root @ weight[row].double()).solution
        torch.testing.assert_close(scales[row].double(), expected, rtol=1e-3, atol=1e-4)


def test_one_sweep_of_descent_is_that_of_a_plain_loop():
    weight, hessian = problem(rows=5, columns=40)
    scales = torch.full((5, 2), 0.8)
    start = grid.nearest_levels(weight / 0.8, 2)
    found, _ = grid.descend(weight, start, scales, hessian, 2, sweeps=1, group=32)
    levels = start.clone().double()
    for row in range(5):
        for j in range(40):
            candidates = []
            for level in (-1.5, -0.5, 0.5, 1.5):
                levels[row, j] = level
                difference = 0.8 * levels[row] - weight[row]
                candidates.append((float(difference @ hessian.double() @ difference), level))
            levels[row, j] = min(candidates)[1]
    assert torch.equal(found.double(), levels)


def test_codes_do_not_depend_on_how_many_columns_are_fed_back_together(monkeypatch):
    weight, hessian = problem(rows=5, columns=90)
    factor = inverse_factor(hessian)
    found = grid.first_codes(weight, factor, 2, 60)
    monkeypatch.setattr(grid, "TOGETHER", 16)
    assert torch.equal(grid.first_codes(weight, factor, 2, 60)[0], found[0])
    assert found[1].shape == (5, 2)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_the_grid(width, dtype):
    """In bfloat16, too, the code is that of the latent as it is, however near it lies to the edge of its cell."""
    latent = torch.cat([torch.linspace(-5, 5, 301), torch.tensor([0.9999, 1.0, 1.0001, -1e-30, 1e-30, 0.0])])[None]
    scales = torch.tensor([[0.5, 2.0, 1.0]])
    found = grid.straight_through(latent, scales, width, dtype)
    assert torch.equal(found.float(), grid.nearest_levels(latent, width) * grid.spread(scales, latent.shape[1]))


def test_straight_through_gradients():
    latent = torch.tensor([[0.2, -1.7, 0.6]], requires_grad=True)
    scales = torch.tensor([[2.0, 3.0]], requires_grad=True)
    weight = grid.straight_through(latent, scales, 2, torch.float32, group=2)
    assert weight.tolist() == [[1.0, -3.0, 1.5]]
    weight.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert latent.grad.tolist() == [[2.0, 20.0, 300.0]]
    assert scales.grad.tolist() == [[0.5 - 15.0, 50.0]]
