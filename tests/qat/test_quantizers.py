"""What every quantizer must bear: 16-bit inputs, zeros, casts, copies; and NF's levels."""

import copy
import io

import pytest
import torch

from bellbit.core.baselines import nf_levels
from bellbit.qat import convert, prepare, quantizer
from bellbit.quantizers import METHODS

SPECS = [f"{name}:{width}" for name, method in METHODS.items() for width in method.widths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [6, None])
@pytest.mark.parametrize("spec", SPECS)
def test_zeros_and_large_numbers_in_any_float(spec, channels, dtype):
    """Rows of zeros, and of numbers whose squares float16 cannot hold; also a first batch of nothing but zeros."""
    torch.manual_seed(0)
    x = torch.randn(6, 130)
    x[1] = 0
    x[2] *= 300
    for first in (x, torch.zeros_like(x)):
        module = quantizer(spec, channels)
        for values in (first, x):
            leaf = values.to(dtype).requires_grad_()
            y = module(leaf)
            y.float().square().sum().backward()
            assert y.dtype == leaf.grad.dtype == dtype
            assert bool(y.isfinite().all()) and bool(leaf.grad.isfinite().all())
            assert all(bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_little_is_kept_for_backward(spec):
    """Of an activation at most a byte an element besides itself."""
    x, kept = torch.randn(64, 256, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module = quantizer(spec)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x).sum().backward()
    kept.pop(x.data_ptr(), None)
    assert sum(kept.values()) <= x.numel() + 512  # of parameters and scalars


def model_of(weights, activations):
    torch.manual_seed(0)
    model = prepare(torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.Linear(24, 7)), weights, activations)
    model(torch.randn(5, 40))
    return model


@pytest.mark.parametrize("activations", ["bbq-fast:2", "lsq:3", "n2uq:2"])
def test_a_cast_keeps_what_is_learned_in_32_bits(activations):
    model = model_of("bbq:2", activations).bfloat16()
    learned = [p for name, p in model.named_parameters() if "quantizer" in name]
    assert learned and {p.dtype for p in learned} == {torch.float32}
    y = model.train()(torch.randn(5, 40).bfloat16())
    assert y.dtype == torch.bfloat16
    packed = convert(model).half()
    assert packed[0].input_quantizer.state_dict() and all(
        values.dtype == torch.float32 for values in packed[0].input_quantizer.state_dict().values()
    )


@pytest.mark.parametrize("converted", [False, True])
def test_models_are_copied_and_loaded(converted):
    model = model_of("bbq:2", "bbq-fast:3").eval()
    if converted:
        convert(model)
    x = torch.randn(5, 40)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(again(x), expected)


def test_nf_levels():
    """2 bits by hand: quantiles of δ, ½ and of two more up to 1 − δ, δ = (1/8 + 1/6)/2, over the largest."""
    normal = torch.distributions.Normal(0.0, 1.0)
    delta = (1 / 8 + 1 / 6) / 2
    quantiles = normal.icdf(torch.tensor([delta, 0.5, 0.75 - delta / 2, 1 - delta], dtype=torch.float64))
    torch.testing.assert_close(nf_levels(2), (quantiles / quantiles[3]).float())
    # 4 bits as QLoRA's paper prints them (arXiv 2305.14314, appendix E); measured 1.2e-7
    published = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803]
    torch.testing.assert_close(nf_levels(4)[:9], torch.tensor(published), rtol=0, atol=1e-6)
