import pytest
import torch
from test_compensate import problem

from bellbit.core.hessian import inverse_factor
from bellbit.core.rowcolumn import arb_rc, binarize, fit_term, one_term, reconstruct, two_terms


def test_scales_of_a_product_are_found_again():
    generator = torch.Generator().manual_seed(0)
    row, column = torch.rand(9, 1, generator=generator) + 0.5, torch.rand(1, 30, generator=generator) + 0.5
    signs = torch.where(torch.rand(9, 30, generator=generator) < 0.5, -1.0, 1.0)
    found, r, c = one_term(row * column * signs, torch.ones(9, 30, dtype=torch.bool))
    assert torch.equal(found, signs)
    torch.testing.assert_close(r * c, row * column)


def test_one_step_by_hand():
    weight, mask = torch.tensor([[1.0, -4.0], [2.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    row, column = fit_term(weight, mask, weight.sign(), torch.ones(2, 1), torch.tensor([[1.0, 2.0]]))
    assert row[:, 0].tolist() == pytest.approx([9 / 5, 2])  # (1·1 + 2·4) / (1 + 4), 2·1 / 1
    assert column[0].tolist() == pytest.approx([(1.8 + 4) / (3.24 + 4), 7.2 / 3.24])


def test_two_terms_are_better_than_one():
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(40, 50, generator=torch.Generator().manual_seed(1)) < 0.7

    def error(terms):
        return float((weight - sum(s * r * c for s, r, c in terms))[mask].square().sum())

    assert error(two_terms(weight, mask)) < 0.45 * error([one_term(weight, mask)])  # measured 0.34 of it


@pytest.mark.parametrize("split", [False, True])
def test_every_weight_has_the_terms_of_its_zone(split):
    weight, _ = problem(12, 40)
    salient = torch.arange(40) % 7 == 0
    zone = weight.abs() > 0.7
    block = binarize(weight, salient, zone, split)
    found = reconstruct(block)
    ordinary = ~salient.expand_as(weight)
    for mask in (ordinary & zone, ordinary & ~zone):
        signs, row, column = one_term(weight, mask)
        torch.testing.assert_close(found[mask], (signs * row * column)[mask])
    for mask in (~ordinary & zone, ~ordinary & ~zone) if split else (~ordinary,):
        torch.testing.assert_close(found[mask], sum(s * r * c for s, r, c in two_terms(weight, mask))[mask])


def test_the_bitmap_lowers_the_output_error():
    weight, hessian = problem(60, 200)
    errors = []
    for split in (False, True):
        quantized = torch.cat([reconstruct(block) for block in arb_rc(weight, inverse_factor(hessian), split)], dim=1)
        errors.append(float((((weight - quantized) @ hessian) * (weight - quantized)).sum()))
    assert errors[1] < errors[0]
