from typing import get_args

import pytest
import torch

from bellbit.core.columns import Estimate, column_scales


def test_columns_that_differ_by_a_factor_alone_become_alike():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(40, 1, generator=generator) + 0.5, torch.rand(200, generator=generator) + 0.5
    signs = torch.where(torch.rand(40, 200, generator=generator) < 0.5, -1.0, 1.0)
    scales = column_scales(rows * columns * signs, torch.rand(200, generator=generator), "rank1")
    for group in (slice(0, 128), slice(128, 200)):
        alike = (columns * scales)[group]
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=1e-4, atol=0)


@pytest.mark.parametrize("estimate", get_args(Estimate))
def test_scales_are_positive_with_geometric_mean_one_and_dead_columns_keep_theirs(estimate):
    weight = torch.randn(30, 150, generator=torch.Generator().manual_seed(0))
    weight[:, 7] = 0
    scales = column_scales(weight, torch.ones(150), estimate)
    assert bool((scales > 0).all())
    assert scales[7] == 1
    assert float(scales.log().mean()) == pytest.approx(0, abs=1e-6)


def test_maxima_are_ltdbs_start():
    weight = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    scales = column_scales(weight, torch.tensor([9.0, 1.0]), "maxima")
    assert float(scales[0] / scales[1]) == pytest.approx(3**0.85 / (2 / 4) ** 0.15)
