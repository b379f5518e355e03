"""What holds for any weight: every method, over shapes, group sizes, types, and inputs and rows that are all zero."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bellbit import kernels
from bellbit.core.activations import quantize_activations
from bellbit.core.hessian import accumulate, inverse_factor, new_hessian
from bellbit.packed.layouts import LAYOUTS
from bellbit.ptq.methods import METHODS, OWN_OPTIONS, Settings

EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of the largest sum of magnitudes. Measured: 1e-5 (1e-7 with 16-bit activations), 5.7e-3, 3.8e-4
NEAR = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@st.composite
def layers(draw):
    """A weight (out, in), what goes into it (tokens, in), and which of its inputs and rows are zero."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(2, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dead = torch.rand(columns, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    empty = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    size = 10.0 ** draw(st.integers(-4, 2))
    weight = size * torch.randn(rows, columns, generator=generator).masked_fill(empty[:, None], 0)
    inputs = torch.randn(draw(st.integers(1, 400)), columns, generator=generator).masked_fill(dead, 0)
    return weight.to(draw(st.sampled_from(DTYPES))), inputs


def quantized(method, weight, inputs, **options):
    hessian = new_hessian(weight.shape[1])
    accumulate(hessian, inputs, 1)
    chosen = Settings(method, **options)
    factor = inverse_factor(hessian) if METHODS[method].calibrates else None
    return METHODS[method].quantize(weight.float(), factor, chosen)


@pytest.mark.parametrize("method", sorted(METHODS))
@EXAMPLES
@given(layers(), st.sampled_from([2, 16, 64, 100, 128, 1000]), st.integers(1, 4))
def test_any_weight_is_stored_as_what_it_is_used_as(method, layer, group, bits):
    weight, inputs = layer
    own = {"bits": bits, "bpw": bits + 0.125, "block_size": group}
    packed = quantized(method, weight, inputs, **{o: own[o] for o in own if method in OWN_OPTIONS[o]})
    values = packed.dequantize()
    assert values.shape == weight.shape and values.isfinite().all()
    stored = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert packed.bits_per_weight == pytest.approx(8 * stored / math.prod(weight.shape))
    again = LAYOUTS[packed.layout].build(packed.shape, packed.options, packed.tensors)
    assert torch.equal(again.dequantize(), values)
    spec = LAYOUTS[packed.layout].spec(packed.shape, packed.options)
    assert {name: (s.shape, s.dtype) for name, s in spec.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed.tensors.items()
    }
    if not weight.any():
        assert values.abs().max() < 1e-4, "of nothing comes next to nothing"  # half of the least scale: 3.05e-5


@pytest.mark.parametrize("method", sorted(METHODS))
@EXAMPLES
@given(layers(), st.sampled_from(DTYPES), st.sampled_from([16, 8, 6]))
def test_a_packed_product_is_that_of_the_dense_weight(method, layer, dtype, act_bits):
    weight, inputs = layer
    packed = quantized(method, weight, inputs)
    x = inputs.to(dtype)
    found = kernels.linear(x, packed, None, act_bits, "token")
    values, rounded = packed.dequantize().double(), quantize_activations(x, act_bits).double()
    wanted = rounded @ values.t()
    scale = float((rounded.abs() @ values.abs().t()).max())
    assert found.dtype == dtype and found.shape == wanted.shape
    error = (found.double() - wanted).abs()
    empty = ~values.any(dim=1)  # uniform grids have scale 1 there, and kernels take codes from the grid's middle
    assert float(error.masked_fill(empty, 0).max()) <= NEAR[dtype] * scale + 1e-30
    assert float(error.masked_fill(~empty, 0).max()) <= 1e-6 * float(rounded.abs().sum(dim=1).max())  # measured: 3e-8


@EXAMPLES
@given(layers(), st.sampled_from([16, 8, 6]), st.sampled_from(["token", "tensor"]))
def test_rounded_activations_are_near_and_stay_as_they_are(layer, bits, scope):
    _, x = layer
    once = quantize_activations(x, bits, scope)
    largest = x.abs().amax(dim=-1, keepdim=True) if scope == "token" else x.abs().amax()
    steps = 2 ** (bits - 1) - 1
    assert ((once - x).abs() <= largest / steps * 0.5001).all()
    torch.testing.assert_close(quantize_activations(once, bits, scope), once, rtol=1e-6, atol=0)
