"""The compiled kernels against the reference: every instruction set of this machine, layouts, ragged shapes."""

import pytest
import torch

from bellbit import quantize_weight
from bellbit.core import divergence, grid
from bellbit.core.activations import quantize_activations
from bellbit.core.hadamard import hadamard
from bellbit.kernels import native, reference
from bellbit.packed.planes import Bellbox, Symmetric

pytestmark = pytest.mark.skipif(not native.available(), reason="built without a compiler")

TOLERANCE = 1e-5  # of the largest output; measured 6e-7
ROUNDED_TOLERANCE = 2e-4  # codebook2 with rounded activations: weights are rounded to 15 or 16 bits; measured 5e-5
SHAPES = [(5, 128), (7, 576), (3, 100), (9, 2), (4, 17), (16, 300), (3, 1100)]
TOKENS = [1, 2, 5, 16, 17, 40]


@pytest.fixture(params=native.available())
def instruction_set(request):
    before = native.chosen()
    native.choose(request.param)
    yield request.param
    native.choose(before)


def bellbox(rows, columns, width, generator):
    codes = torch.randint(0, 2**width, (rows, columns), dtype=torch.uint8, generator=generator)
    return Bellbox.pack(codes, torch.rand(rows, generator=generator), width, half=width <= 2, rotated=width != 1)


def symmetric(rows, columns, width, generator, group=128):
    levels = torch.randint(0, 2**width, (rows, columns), generator=generator) - (2**width - 1) / 2
    return Symmetric.pack(levels, torch.rand(rows, -(-columns // group), generator=generator), width, group)


def weights(rows, columns):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    dense = torch.randn(rows, columns, generator=generator)
    packed = [quantize_weight(dense, None, "rtn", bits=bits) for bits in (1, 2, 3, 8)]
    packed += [quantize_weight(dense, None, "sign")]
    packed += [symmetric(rows, columns, width, generator) for width in (1, 2, 3, 4, 5)]
    packed += [symmetric(rows, columns, width, generator, group) for width in (1, 2) for group in (256, 1024)]
    packed += [quantize_weight(dense, None, "rtn", bits=3, block_size=256)]
    packed += [bellbox(rows, columns, width, generator) for width in (1, 2, 3, 4)]
    packed += [
        quantize_weight(dense, None, metric="magnitude", compensate=False, block_size=block_size, scale_bits=scale_bits)
        for block_size in (128, 96)
        for scale_bits in (16, 8)
    ]
    return packed


def check(actual, expected, what, tolerance=TOLERANCE):
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    assert error <= tolerance, f"{what}: {error:.2g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(instruction_set, shape):
    for weight in weights(*shape):
        assert native.supports(weight)
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, shape[1], generator=generator)
            bias = torch.randn(shape[0], generator=generator)
            for act_bits, scope in ((16, "token"), (8, "token"), (6, "tensor")):
                if isinstance(weight, Bellbox):  # the same rotated input: a rounding of it else flips single codes
                    rounded = quantize_activations(native.rotate(x) if weight.rotated else x, act_bits, scope)
                    expected = torch.nn.functional.linear(rounded, weight.levels(), bias)
                else:
                    expected = reference.linear(x, weight, bias, act_bits, scope)
                actual = native.linear(x, weight, bias, act_bits, scope)
                rounds = weight.layout == "codebook2" and act_bits < 16
                what = (weight.layout, tokens, act_bits, scope)
                check(actual, expected, what, ROUNDED_TOLERANCE if rounds else TOLERANCE)


def test_integer_sums_are_exact(instruction_set):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-126, 127, (3, 300), generator=generator).float()
    x[:, 0] = 127  # the step is 1, so that x is its own code
    dense = torch.where(torch.rand(6, 300, generator=generator) < 0.5, -0.25, 0.25)
    weight = quantize_weight(dense, None, "sign")
    assert torch.equal(weight.dequantize(), dense)
    assert torch.equal(native.linear(x, weight, None, 8), x @ dense.t())


@pytest.mark.parametrize("width", [1, 2, 17, 100, 128, 300, 576])
def test_rotation(instruction_set, width):
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width))
    check(native.rotate(x), hadamard(x), width)
    check(native.rotate(native.rotate(x)), x, width)
    x.requires_grad_()
    grad = torch.randn(2, 3, width)
    native.rotate(x).backward(grad)
    check(x.grad, hadamard(grad), width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_in_training(instruction_set, shape, width, dtype):
    """The same weights to the last bit; derivatives as those of the reference on the weights' own values."""
    generator = torch.Generator().manual_seed(shape[1])
    latent = 2 * torch.randn(shape, generator=generator)
    latent[0, 0], latent[-1, -1] = 0.0, 100.0
    scales = torch.rand(shape[0], -(-shape[1] // 128), generator=generator) + 0.01
    upstream = torch.randn(shape, generator=generator).to(dtype)

    def run(function, dtype):
        given = latent.clone().requires_grad_(), scales.clone().requires_grad_()
        weight = function(*given, width, dtype, 128)
        weight.backward(upstream.to(dtype))
        return weight.detach(), given[0].grad, given[1].grad

    actual, wrt_latent, wrt_scales = run(native.straight_through, dtype)
    assert torch.equal(actual, run(grid.straight_through, dtype)[0])
    _, exact_latent, exact_scales = run(grid.straight_through, torch.float32)
    check(wrt_latent, exact_latent, "latents")
    check(wrt_scales, exact_scales, "scales", TOLERANCE if dtype == torch.float32 else 2**-8)  # weights are rounded


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)], ids=str)
def test_divergences_of_logits(instruction_set, shape):
    generator = torch.Generator().manual_seed(shape[1])
    student, teacher = (10 * torch.randn(shape, generator=generator) for _ in range(2))
    teacher[0, 0] = 200.0  # the shares of all others are nothing
    exact = student.double()
    want = divergence.divergences(exact, teacher.double(), slope=True)
    found = native.divergences(student.clone(), teacher.clone(), slope=False)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-5)  # measured 3.7e-6
    assert torch.equal(native.divergences(student, teacher, slope=True), found)
    torch.testing.assert_close(student.double(), exact, rtol=0, atol=1e-6)  # measured 1.4e-7


def test_frozen_latents_get_no_gradient(instruction_set):
    latent, scales = torch.randn(4, 200), torch.ones(4, 2, requires_grad=True)
    weight = native.straight_through(latent, scales, 1, torch.bfloat16, 128)
    weight.sum().backward()  # whose gradient is one number, spread over the weight
    signs = latent.sign() / 2
    assert latent.grad is None
    assert torch.equal(scales.grad, torch.stack([signs[:, :128].sum(dim=1), signs[:, 128:].sum(dim=1)], dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(instruction_set, dtype):
    """The product is computed in float32 and rounded once: nearer to the truth than the reference in 16 bits."""
    weight = quantize_weight(torch.randn(24, 200, generator=torch.Generator().manual_seed(0)), None, "rtn", bits=4)
    x = torch.randn(2, 1, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = native.linear(x, weight, None)
    assert actual.dtype == dtype and actual.shape == (2, 1, 24)
    exact = reference.linear(x.float(), weight, None)
    assert torch.allclose(actual.float(), exact, rtol=2**-8, atol=1e-4)  # half a unit of bfloat16's last place


def test_bad_activations_give_nan_as_the_reference_does(instruction_set):
    weight = quantize_weight(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), None, "sign")
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 128)
        x[0, 5] = bad
        for act_bits in (16, 8):
            assert not native.linear(x, weight, None, act_bits).isfinite().any()


def test_empty_input():
    weight = quantize_weight(torch.randn(4, 128), None, "sign")
    assert native.linear(torch.empty(0, 128), weight, None).shape == (0, 4)


def test_thread_count_does_not_change_the_result():
    weight = quantize_weight(torch.randn(999, 512, generator=torch.Generator().manual_seed(0)), None, "sign")
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native.linear(x, weight, None, 8))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("weight", weights(6, 160), ids=lambda weight: weight.layout)
def test_operators_are_seen_through_by_torch(weight):
    arguments = native._ARGUMENTS[type(weight)](weight)
    operator = getattr(torch.ops.bellbit, weight.layout).default
    for bias in (None, torch.randn(6)):
        torch.library.opcheck(operator, (torch.randn(2, 3, 160), *arguments, bias, 8, False))


def test_export_keeps_the_operator():
    from bellbit.packed.linear import PackedLinear

    layer = PackedLinear.holding(quantize_weight(torch.randn(8, 64), None, "sign"))
    program = torch.export.export(layer, (torch.randn(2, 64),))
    assert "bellbit.sign128" in str(program.graph)
    x = torch.randn(2, 64)
    assert torch.equal(program.module()(x), layer(x))


def test_wrong_shapes_are_refused():
    weight = quantize_weight(torch.randn(4, 128), None, "sign")
    with pytest.raises(ValueError, match="the input has 64 columns, the weight 128"):
        native.linear(torch.randn(1, 64), weight, None)
    with pytest.raises(ValueError, match="expected a contiguous"):
        torch.ops.bellbit.sign128(torch.randn(1, 256), weight.blocks, 256, None, 16, False)
    with pytest.raises(ValueError, match="there are no 'sse9' kernels here"):
        native.choose("sse9")


def test_blocks_that_the_kernels_cannot_do_go_to_the_reference():
    weight = quantize_weight(torch.randn(4, 60), None, metric="magnitude", compensate=False, block_size=20)
    assert not native.supports(weight)
    from bellbit import kernels

    x = torch.randn(2, 60)
    assert torch.equal(kernels.linear(x, weight, None), reference.linear(x, weight, None))


def test_a_gradient_is_the_references():
    from bellbit import kernels

    weight = quantize_weight(torch.randn(4, 64), None, "sign")
    x = torch.randn(2, 64, requires_grad=True)
    kernels.linear(x, weight, None).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize().sum(dim=0).expand(2, 64), atol=1e-6)
