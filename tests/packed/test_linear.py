import pytest
import torch

from bellbit import kernels, quantize_weight
from bellbit.packed.linear import PackedLinear


def packed_weight(columns=200, method="dbellquant", **options):
    weight = torch.randn(17, columns, generator=torch.Generator().manual_seed(1))
    if method != "rtn":  # which needs no Hessian anyway
        options |= {"metric": "magnitude", "compensate": False}
    return quantize_weight(weight, None, method, **options)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("options", [{}, {"scale_bits": 8}, {"method": "rtn", "bits": 3}])
@pytest.mark.parametrize("columns", [128, 200, 61])
def test_kernel_is_the_product_with_the_dequantized_weight(tokens, options, columns):
    packed = packed_weight(columns, **options)
    x, bias = torch.randn(tokens, columns), torch.randn(17)
    torch.testing.assert_close(kernels.linear(x, packed, bias), x @ packed.dequantize().T + bias)


def test_activations_are_rounded_before_and_outputs_after():
    packed, x = packed_weight(method="rtn", bits=3), torch.randn(3, 200)
    layer = PackedLinear.holding(packed, act_bits=6, round_output=True)
    step = x.abs().amax(dim=1, keepdim=True) / 31
    y = (x / step).round() * step @ packed.dequantize().T
    step = y.abs().amax(dim=1, keepdim=True) / 31
    torch.testing.assert_close(layer(x), (y / step).round() * step)


def test_casting_and_moving_keep_the_stored_dtypes():
    layer = PackedLinear.holding(packed_weight(), bias=torch.zeros(17))
    before = {name: tensor.clone() for name, tensor in layer.packed.tensors.items()}
    layer.to(torch.bfloat16)
    for name, tensor in layer.packed.tensors.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 200, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_is_what_a_file_holds():
    layer = PackedLinear.holding(packed_weight(scale_bits=8))
    assert set(layer.state_dict()) == {"codes", "scales", "salient", "exponents"}
