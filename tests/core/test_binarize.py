import torch
from hypothesis import given
from hypothesis import strategies as st

from bellbit.core.binarize import BinarizedBlock, binarize_block, binary_term, reconstruct_block

NONE = torch.tensor([False])


def fit(weight, salient, sparse=None):
    sparse = torch.zeros_like(weight, dtype=torch.bool) if sparse is None else sparse
    return reconstruct_block(binarize_block(weight, salient, sparse))


def test_one_term_by_hand():
    weight = torch.tensor([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 0.0, 4.0]])
    # row 0: μ = 4, α = (3 + 1 + 1 + 3)/4 = 2; row 1: μ = 1, α = (1 + 1 + 1 + 3)/4 = 1.5
    expected = torch.tensor([[2.0, 2.0, 6.0, 6.0], [-0.5, -0.5, -0.5, 2.5]])
    assert torch.equal(fit(weight, NONE.expand(4)), expected)


def test_two_terms_by_hand():
    weight = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    # first term 2 2 6 6, residual −1 1 −1 1: the second term takes all of it
    assert torch.equal(fit(weight, ~NONE.expand(4)), weight)


def test_groups_have_their_own_numbers():
    weight = torch.tensor([[1.0, 3.0, 100.0, 300.0, 7.0]])
    sparse = torch.tensor([[False, False, True, True, False]])
    salient = torch.tensor([False, False, False, False, True])
    block = binarize_block(weight, salient, sparse)
    assert torch.equal(block.scales, torch.tensor([[2.0, 1.0, 200.0, 100.0, 7.0, 0.0, 0.0]]))
    assert torch.equal(reconstruct_block(block), weight)


def test_a_weight_at_the_mean_counts_as_positive():
    """One stored bit has no zero: sign(0) is +1, where `torch.sign` in the reference leaves the weight at μ."""
    mean, scale, positive = binary_term(torch.tensor([[-3.0, 0.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert (float(mean), float(scale), positive.tolist()) == (0.0, 2.0, [[False, True, True]])


def test_rows_without_entries_of_a_group_contribute_nothing():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    block = binarize_block(weight, NONE.expand(2), torch.tensor([[True, True], [False, False]]))
    assert torch.equal(block.scales[0, :2], torch.zeros(2))
    assert torch.equal(block.scales[1, 2:4], torch.zeros(2))
    assert isinstance(block, BinarizedBlock) and reconstruct_block(block).isfinite().all()


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_two_terms_are_never_worse_than_one_and_scales_are_optimal(seed, columns):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    everything = torch.ones_like(weight, dtype=torch.bool)
    mean, scale, positive = binary_term(weight, everything)
    sign = positive.double() * 2 - 1
    one = (weight - mean - scale * sign).square().sum()
    residual = weight - mean - scale * sign
    mean2, scale2, positive2 = binary_term(residual, everything)
    two = (residual - mean2 - scale2 * (positive2.double() * 2 - 1)).square().sum()
    assert two <= one + 1e-12
    # given signs and mean, α is the least-squares scale: the residual has no part along the signs
    centred = weight - mean
    torch.testing.assert_close(scale, (centred * sign).mean(dim=1, keepdim=True))
