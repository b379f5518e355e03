import pytest
import torch

from bellbit.core.activations import quantize_activations


def test_by_hand():
    x = torch.tensor([[31.0, -10.4, 0.6], [3.1, 0.04, -3.1]])
    expected = torch.tensor([[31.0, -10.0, 1.0], [3.1, 0.0, -3.1]])
    torch.testing.assert_close(quantize_activations(x, 6), expected)
    per_tensor = torch.tensor([[31.0, -10.0, 1.0], [3.0, 0.0, -3.0]])
    torch.testing.assert_close(quantize_activations(x, 6, "tensor"), per_tensor)


def test_sixteen_bits_change_nothing_and_zeros_stay_finite():
    x = torch.randn(3, 4)
    assert quantize_activations(x, 16) is x
    assert torch.equal(quantize_activations(torch.zeros(2, 4), 8), torch.zeros(2, 4))


def test_sixteen_bit_inputs_get_the_codes_of_float32():
    x = torch.randn(200, 64).bfloat16()
    codes = x.float() / (x.float().abs().amax(dim=1, keepdim=True) / 127)
    assert torch.equal(quantize_activations(x, 8), (codes.round() * (x.float().abs().amax(1, True) / 127)).bfloat16())


@pytest.mark.parametrize("bits", [6, 8])
def test_error_is_at_most_half_a_step(bits):
    x = torch.randn(50, 64)
    step = x.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((quantize_activations(x, bits) - x).abs() <= step / 2 * 1.0001).all()
