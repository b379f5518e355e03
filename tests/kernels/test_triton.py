"""The Triton kernels in Triton's interpreter, on CPU tensors; and that they compile for GPUs, where none is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bellbit.kernels
from bellbit.core import bellbox
from bellbit.core.activations import quantize_activations
from bellbit.core.binarize import binarize_block
from bellbit.core.compensate import blocks
from bellbit.core.hadamard import hadamard
from bellbit.kernels import reference
from bellbit.kernels import triton as kernels
from bellbit.packed.codebook2 import Codebook2
from bellbit.packed.planes import Bellbox, Sign128, Symmetric, unpack_codes
from bellbit.qat import convert, prepare

SHAPES = [(1, 128), (5, 200), (33, 7), (3, 383), (40, 300), (2, 1)]
TOLERANCE = 1e-5  # of the largest output; measured 6e-7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def largest_error(actual, expected):
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_formula(shape, width, dtype):
    x = (3 * torch.randn(shape)).to(dtype)
    x[0] = 0  # rounds to the even code
    v = hadamard(x.double())
    for running in (None, torch.tensor(0.4)):
        inverse = running if running is not None else bellbox.inverse_rms(v, by_row=False)
        u = v * inverse.double()
        expected = bellbox.normal_codes(u.clone(), width)
        planes = kernels.quantize(x, width, running)
        assert planes.shape == (width, shape[0], -(-shape[1] // 8))
        differ = unpack_codes(planes, shape[1]) != expected
        nearest = (u[..., None] - kernels._thresholds(width, x.device)).abs().amin(-1)
        assert not bool((differ & (nearest > 1e-5)).any())  # what differs lies on a threshold, but for rounding
        assert torch.equal(unpack_codes(planes, shape[1])[0], expected[0].float())
        spare = -shape[1] % 8
        assert int(planes[..., -1].max()) < 2 ** (8 - spare)  # unused bits are 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width_x", "width_w", "half"), [(1, 1, True), (2, 3, False), (4, 4, False), (3, 2, True)])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 5, 128), (37, 70, 200), (3, 64, 9)])
def test_product_of_codes(tokens, rows, columns, width_x, width_w, half, bias):
    codes = torch.randint(0, 2**width_w, (rows, columns), dtype=torch.uint8)
    weight = Bellbox.pack(codes, torch.rand(rows), width_w, half)
    x, gamma, inverse = torch.randn(tokens, columns), torch.tensor(1.7), torch.tensor(0.9)
    offset = torch.randn(rows) if bias else None
    levels, _ = bellbox.bellbox(x, gamma, width_x, False, inverse)
    expected = torch.nn.functional.linear(levels, weight.levels(), offset)
    actual = kernels.codes_linear(x, gamma, inverse, width_x, weight, offset)
    assert largest_error(actual, expected) <= TOLERANCE


def sign128(rows, columns):
    return Sign128.pack(torch.rand(rows, columns) < 0.5, torch.rand(rows, -(-columns // 128)))


def symmetric(rows, columns, width, group_size=128):
    levels = torch.randint(0, 2**width, (rows, columns)) - (2**width - 1) / 2
    return Symmetric.pack(levels, torch.rand(rows, -(-columns // group_size)) + 0.01, width, group_size)


def codebook2(rows, columns, block_size, scale_bits):
    weight, salient = torch.randn(rows, columns), torch.rand(columns) < 0.2
    parts = [
        binarize_block(weight[:, part], salient[part], weight[:, part].abs() > 1)
        for part in blocks(columns, block_size)
    ]
    return Codebook2.pack(parts, block_size, scale_bits)


torch.manual_seed(0)
WEIGHTS = [
    sign128(40, 256),
    sign128(7, 200),
    sign128(3, 5),
    symmetric(40, 256, 1),
    symmetric(33, 200, 3),
    symmetric(5, 70, 7, 48),
    symmetric(5, 300, 2, 1024),
    codebook2(33, 256, 128, 16),
    codebook2(5, 300, 128, 8),
    codebook2(9, 130, 48, 16),
    codebook2(2, 64, 256, 8),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: f"{w.layout}-{w.shape[0]}x{w.shape[1]}")
@pytest.mark.parametrize(("tokens", "dtype", "act_bits"), [((1,), torch.float32, 16), ((2, 3), torch.bfloat16, 8)])
def test_few_tokens_times_a_packed_weight(weight, tokens, dtype, act_bits):
    x, bias = torch.randn(*tokens, weight.shape[1]).to(dtype), torch.randn(weight.shape[0])
    assert kernels.supports(x, weight)
    rounded = quantize_activations(x, act_bits)  # to x's dtype, by either kernel
    exact = reference.linear(rounded.double(), weight, bias.double())
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    for offset in (bias, None):
        expected = exact if offset is not None else exact - bias
        error = largest_error(kernels.linear(x, weight, offset, act_bits), expected)
        assert error <= TOLERANCE + rounding
    assert not kernels.supports(x.expand(17, *x.shape), weight)


def test_what_the_kernels_cannot_decode_is_left_to_the_reference():
    x = torch.randn(1, 48)
    assert not kernels.supports(x, symmetric(2, 48, 8))  # twice a level is up to 255
    assert not kernels.supports(x, symmetric(2, 48, 2, 24))
    assert not kernels.supports(x, codebook2(2, 48, 24, 16))


@pytest.mark.parametrize("activations", ["bbq:2", "bbq-fast:4"])
def test_a_packed_layer_on_a_gpu_multiplies_codes(activations, monkeypatch):
    model, x = torch.nn.Sequential(torch.nn.Linear(200, 40)), torch.randn(3, 5, 200)
    prepare(model, "bbq:3", activations)(x)
    convert(model.eval())
    expected = model(x)
    monkeypatch.setattr(bellbit.kernels, "_gpu_kernels", lambda x: kernels)
    monkeypatch.setattr(reference, "linear", None)
    assert largest_error(model(x), expected) <= TOLERANCE


@pytest.mark.slow
def test_kernels_compile_for_gpus():
    program = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, str(program)], env=environment, check=True, timeout=600)
