"""The quantizers against numbers that the reference code produced."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bellbit.qat import quantizer

# Relative to the largest entry. The reference keeps H in bfloat16: BBQ and QuEST differ by that.
TOLERANCES = {"bbq": 5e-4, "quest": 5e-4, "lsq": 1e-5, "seq": 1e-5, "n2uq": 1e-5}
PARAMETERS = {
    "bbq": {"gamma": "sx"},
    "quest": {},
    "lsq": {"step": "alpha_weight"},
    "seq": {"edge": "weight_clip_val"},
    "n2uq": {"start": "start", "lengths": "a", "scale1": "scale1", "scale2": "scale2"},
}
CASES = [
    (method, width, side)
    for method in PARAMETERS
    for width in (1, 2, 3, 4)
    for side in ("weight", "act")
    if (method, width) != ("lsq", 1)
]


@pytest.fixture(scope="module")
def numbers():
    return load_file(Path(__file__).parents[1] / "data" / "qat.safetensors")


def close(actual, expected, tolerance):
    error = (actual.detach().squeeze() - expected.squeeze()).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert float(error) <= tolerance, float(error)


@pytest.mark.parametrize(("method", "width", "side"), CASES, ids=str)
def test_reference_numbers(numbers, method, width, side):
    weight = side == "weight"
    x = numbers["w" if weight else "a"].clone().requires_grad_()
    module = quantizer(f"{method}:{width}", channels=len(x) if weight else None)
    y = module(x)
    y.backward(numbers["gw" if weight else "ga"])
    prefix, tolerance = f"{method}{width}_{side}", TOLERANCES[method]
    close(y, numbers[f"{prefix}/y"], tolerance)
    close(x.grad, numbers[f"{prefix}/grad_x"], tolerance)
    found = dict(module.named_parameters())
    expected = {} if method == "n2uq" and weight else PARAMETERS[method]
    assert set(found) == set(expected)
    for name, theirs in expected.items():
        close(found[name], numbers[f"{prefix}/param/{theirs}"], tolerance)
        close(found[name].grad, numbers[f"{prefix}/grad/{theirs}"], tolerance)
