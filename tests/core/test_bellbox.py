"""BBQ's quantizer: codes near uniform on normal input, its own gradients against autograd of the composed formula."""

import pytest
import torch

from bellbit.core.bellbox import SMALLEST_RMS, bellbox, inverse_rms, normal_codes, zero_point
from bellbit.core.hadamard import hadamard

# SPEC §3: where Φ passes from one code to the next.
THRESHOLDS = {
    2: [-0.6744897501960818, 0, 0.6744897501960818],
    3: [-1.1503493803760083, -0.6744897501960818, -0.3186393639643752, 0, 0.3186393639643752, 0.6744897501960818,
        1.1503493803760083],
}  # fmt: skip


def composed(v, gamma, width, by_row, running=None):
    """The formula as the paper writes it, with autograd through every step."""
    square = v.square().mean(dim=-1, keepdim=True) if by_row else v.square().mean()
    inverse = 1 / square.sqrt().clamp_min(SMALLEST_RMS) if running is None else running
    scaled = 2**width * torch.special.ndtr(v * inverse) - 0.5
    codes = scaled + (scaled.round().clamp(0, 2**width - 1) - scaled).detach()
    return gamma / 2 ** (width - 1) * (codes - zero_point(width))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(6, 256), (2, 5, 100), (3, 1), (1, 7)])
@pytest.mark.parametrize("live", [True, False])
def test_gradients_are_those_of_the_formula(width, shape, live):
    generator = torch.Generator().manual_seed(width)
    by_row = len(shape) == 2
    v = (torch.randn(shape, generator=generator) * 3 + 0.1).requires_grad_()
    gamma = torch.rand((shape[0], 1) if by_row else (), generator=generator).add_(0.5).requires_grad_()
    grad = torch.randn(shape, generator=generator)
    running = None if live else torch.tensor(0.4)
    expected = composed(v, gamma, width, by_row, running)
    wanted = torch.autograd.grad(expected, (v, gamma), grad)
    y, inverse = bellbox(v, gamma, width, by_row, running, None)
    found = torch.autograd.grad(y, (v, gamma), grad)
    assert torch.equal(inverse, inverse_rms(v, by_row) if live else running)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    for actual, theirs in zip(found, wanted, strict=True):
        assert float((actual - theirs).abs().max()) <= 2e-6 * float(theirs.abs().max()) + 1e-6  # measured 4e-7


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_codes_of_normal_input_are_equally_likely(width):
    codes = normal_codes(torch.randn(200_000, generator=torch.Generator().manual_seed(0)), width)
    shares = torch.bincount(codes.long(), minlength=2**width) / codes.numel()
    assert float((shares * 2**width - 1).abs().max()) < 0.03  # measured 0.02 at 4 bits, sampling alone


@pytest.mark.parametrize("width", THRESHOLDS)
def test_codes_change_at_the_published_thresholds(width):
    for code, threshold in enumerate(THRESHOLDS[width]):
        below, above = normal_codes(torch.tensor([threshold - 1e-5, threshold + 1e-5]), width).tolist()
        assert (below, above) == (code, code + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_row", [True, False])
def test_rows_of_zeros_and_large_numbers_stay_finite(dtype, by_row):
    v = torch.zeros(3, 128, dtype=dtype)
    v[1] = 100
    v[2, 0] = 60_000
    v.requires_grad_()
    gamma = torch.ones((3, 1) if by_row else (), requires_grad=True)
    y, _ = bellbox(v, gamma, 2, by_row, rotate=None)
    y.sum().backward()
    assert y.dtype == v.grad.dtype == dtype and gamma.grad.dtype == torch.float32
    assert all(bool(t.isfinite().all()) for t in (y, v.grad, gamma.grad))


def test_the_rotation_is_part_of_it():
    x, gamma = torch.randn(4, 200, requires_grad=True), torch.ones(4, 1)
    grad = torch.randn(4, 200)
    expected = torch.autograd.grad(composed(hadamard(x), gamma, 3, True), x, grad)[0]
    found = torch.autograd.grad(bellbox(x, gamma, 3, True)[0], x, grad)[0]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())  # measured 8e-7


def test_it_keeps_its_input_and_one_tensor_of_bytes():
    v, gamma = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True), torch.ones(64, 1, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bellbox(v, gamma, 2, True)
    assert sum(t.nbytes for t in kept) <= v.nbytes + v.numel() + 2 * 64 * 4
