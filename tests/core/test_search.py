"""The fast structural search returns the plain search's masks."""

import pytest
import torch

import oracle
from bellbit.core.search import find_masks, saliency


@pytest.mark.parametrize("ordinary_order", [1, 2])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (7, 128), (48, 128), (300, 64), (33, 51)])
def test_masks_are_the_plain_searchs(rows, columns, signed, ordinary_order):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    scores = weight if signed else weight.square() * torch.linspace(0.5, 2, columns)
    salient, sparse = find_masks(scores, ordinary_order)
    expected_salient, expected_sparse = oracle.find_masks(scores, ordinary_order)
    assert torch.equal(salient, expected_salient)
    assert torch.equal(sparse, expected_sparse & ~expected_salient)


@pytest.mark.parametrize("ordinary_order", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (4, 2), (9, 5)])
def test_where_many_masks_are_perfect_the_one_found_is(rows, columns, ordinary_order):
    """Two binary numbers fit two values exactly: rounding noise picks among masks of no error."""
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).square()

    def error(salient, sparse):
        whole = salient.expand_as(scores)
        fit = oracle.binarize_masked(scores, whole, 2)
        for mask in (~whole & ~sparse, ~whole & sparse):
            fit = fit + oracle.binarize_masked(scores, mask, 1)
        return float((scores - fit).square().mean())

    found, expected = find_masks(scores, ordinary_order), oracle.find_masks(scores, ordinary_order)
    assert error(*found) <= error(*expected) + 1e-6


def test_a_single_column_has_no_salient_one():
    salient, sparse = find_masks(torch.tensor([[1.0], [2.0]]), 1)
    assert not salient.any()
    assert sparse.shape == (2, 1)


def test_saliency_by_hand():
    weight = torch.tensor([[2.0, -3.0]])
    assert torch.equal(saliency(weight, torch.tensor([2.0, 1.0]), "hessian"), torch.tensor([[1.0, 9.0]]))
    assert torch.equal(saliency(weight, None, "magnitude"), weight)
