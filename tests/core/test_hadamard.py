import pytest
import torch

from bellbit.core.hadamard import block_sizes, hadamard, sylvester


def test_the_matrix_of_order_four():
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double() / 2
    assert torch.equal(sylvester(4), expected)


def test_blocks_of_any_width():
    assert block_sizes(576) == [128] * 4 + [64]
    assert block_sizes(100) == [64, 32, 4]
    assert all(sum(block_sizes(width)) == width for width in range(1, 400))


@pytest.mark.parametrize("width", [1, 2, 100, 128, 576])
def test_it_is_orthogonal_and_its_own_inverse(width):
    x = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    y = hadamard(x)
    assert y.dtype == torch.float64
    assert torch.allclose(hadamard(y), x, atol=1e-12)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1), rtol=1e-12)


def test_blocks_do_not_mix():
    x = torch.zeros(1, 192)
    x[0, 130] = 1
    y = hadamard(x)
    assert not y[0, :128].any() and torch.allclose(y[0, 128:].abs(), torch.full((64,), 0.125))
