import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bellbit import quantize_weight
from bellbit.core.binarize import BinarizedBlock, reconstruct_block
from bellbit.core.braq import braq
from bellbit.core.grid import ERRORS
from bellbit.core.partial import PartialBlock
from bellbit.core.rowcolumn import RowColumnBlock
from bellbit.core.uniform import UniformGroup, quantize_uniform
from bellbit.errors import BellbitError
from bellbit.packed.bits import pack_bits, packed_width, unpack_bits
from bellbit.packed.codebook2 import Codebook2, from_shared_exponent, round_scales, shared_exponent
from bellbit.packed.layouts import LAYOUTS
from bellbit.packed.partial import Partial
from bellbit.packed.plain import Float16, NormalFloat
from bellbit.packed.planes import Bellbox, Sign128, Symmetric, Uniform
from bellbit.packed.rowcolumn import RowColumn


def weight_of(rows=24, columns=320, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def packed_weight(rows=24, columns=320, **options):
    return quantize_weight(weight_of(rows, columns), None, metric="magnitude", compensate=False, **options)


@given(st.integers(1, 70), st.integers(0, 1000))
def test_unpacking_undoes_packing(columns, seed):
    bits = torch.rand(3, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(bits)
    assert packed.shape == (3, packed_width(columns))
    assert torch.equal(unpack_bits(packed, columns), bits)


def test_bit_order_is_least_significant_first():
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)).tolist() == [1, 2]


@pytest.mark.parametrize("columns", [1, 7, 64, 128, 129, 320])
@pytest.mark.parametrize("scale_bits", [16, 8])
def test_codebook2_stores_what_was_binarized(columns, scale_bits):
    parts = braq(
        weight_of(9, columns),
        None,
        metric="magnitude",
        compensate=False,
        store=lambda scales: round_scales(scales, scale_bits),
    )
    packed = Codebook2.pack(parts, 128, scale_bits)
    assert torch.equal(packed.dequantize(), torch.cat([reconstruct_block(part) for part in parts], dim=1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_stores_what_was_rounded(bits):
    weight = weight_of(9, 200)
    groups = quantize_uniform(weight, None, bits)
    packed = Uniform.pack(groups, bits, 128)
    expected = torch.cat([g.scale * (g.codes.float() - g.zero.float()) for g in groups], dim=1)
    assert torch.equal(packed.dequantize(), expected)
    # one step is at most the span over 2^b − 1; half of it is the most that rounding can lose, fp16 scale aside
    span = weight.amax().clamp_min(0) - weight.amin().clamp_max(0)
    assert (packed.dequantize() - weight).abs().max() <= 0.51 * span / (2**bits - 1)


def test_bits_are_those_of_the_specification():
    assert packed_weight(1000, 128).bits == pytest.approx({"signs": 1, "bitmap": 1 + 1 / 1000, "scales": 0.875})
    # a last block of 64 columns has the scales of a whole one: 2 + 112/64 = 3.75
    assert packed_weight(1000, 64).bits_per_weight == pytest.approx(3.75 + 1 / 1000)
    assert packed_weight(1000, 128, scale_bits=8).bits_per_weight == pytest.approx(2.5 + 1 / 1000)
    assert quantize_weight(weight_of(16, 256), None, "rtn", bits=3).bits == pytest.approx(
        {"codes": 3, "scales": 24 / 128}
    )


def test_bits_count_every_stored_byte():
    for packed in (packed_weight(), packed_weight(scale_bits=8), quantize_weight(weight_of(), None, "rtn", bits=5)):
        stored = sum(tensor.nbytes for tensor in packed.tensors.values())
        assert packed.bits_per_weight == pytest.approx(8 * stored / (24 * 320))
        specified = LAYOUTS[packed.layout].spec(packed.shape, packed.options)
        assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in specified.items()
        }


def test_nominal_bits_count_signs_only():
    packed = packed_weight()
    salient = int(unpack_bits(packed.salient, 320).sum())
    assert packed.nominal_bits == 1 + salient / 320
    assert quantize_weight(weight_of(), None, "rtn", bits=4).nominal_bits == 4


@given(st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_eight_bit_scales_are_within_half_a_step_of_the_largest(magnitude, seed):
    scales = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * magnitude
    integers, exponents = shared_exponent(scales)
    error = (from_shared_exponent(integers, exponents) - scales).abs()
    # the largest of a row uses 64 … 127 of the 127 steps, so half a step is at most 1/127 of it
    assert (error <= scales.abs().amax(dim=1, keepdim=True) / 127 * 1.01).all()
    assert integers.abs().amax(dim=1).min() >= 63


def test_scales_of_zero_survive_eight_bits():
    assert torch.equal(round_scales(torch.zeros(2, 7), 8), torch.zeros(2, 7))


def test_a_scale_too_large_for_float16_is_refused():
    with pytest.raises(BellbitError, match=r"does not fit float16.*--scale-bits 8"):
        round_scales(torch.full((1, 7), 1e5), 16)


def test_golden_bytes_of_nf_and_float16():
    packed = NormalFloat.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([2.0]), 2)
    assert packed.codes.tolist() == [[[0b1010]], [[0b1100]]] and packed.scales.tolist() == [2.0]
    assert packed.dequantize()[0].tolist() == pytest.approx([-2.0, 0.0, 0.8716, 2.0], abs=1e-4)
    assert packed.bits == pytest.approx({"codes": 4, "scales": 8}) and packed.nominal_bits == 2  # 4 columns take a byte
    plain = Float16.pack(torch.tensor([[1.0, -0.5]]))
    assert plain.values.view(torch.uint8).tolist() == [[0x00, 0x3C, 0x00, 0xB8]] and plain.bits == {"codes": 16}
    with pytest.raises(BellbitError, match="does not fit float16"):
        Float16.pack(torch.tensor([[1e5]]))


def test_golden_bytes_of_codebook2():
    """The stored bytes of one row of ten columns, as docs/format.md lays them out: a change here is a new format."""
    block = BinarizedBlock(
        signs=torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0, 0, 1]], dtype=torch.bool),
        second=torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1, 0]], dtype=torch.bool),
        scales=torch.tensor([[0.0, 1.0, -0.5, 2.0, 0.25, 4.0, 1.0]]),
        salient=torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1, 0], dtype=torch.bool),
    )
    packed = Codebook2.pack([block], block_size=128)
    assert {name: tensor.numpy().tobytes().hex() for name, tensor in packed.tensors.items()} == {
        "codes": "851b06",
        "scales": "0000003c00b800400034" + "0044003c",
        "salient": "0401",
    }
    expected = [[1.0, 1.0, -4.75, -2.5, 1.5, -2.5, 1.0, -1.0, -2.75, 1.0]]
    assert packed.dequantize().tolist() == expected
    eight = Codebook2.pack([block], block_size=128, scale_bits=8)
    assert eight.tensors["scales"].tolist() == [[[0, 16, -8, 32, 4, 64, 16]]]
    assert eight.tensors["exponents"].tolist() == [[129]]
    assert eight.dequantize().tolist() == expected


@pytest.mark.parametrize(
    ("method", "options"),
    [("arb", {}), ("arb-x", {}), ("arb-rc", {}), ("arb-rc", {"bitmap": False}), ("pb-llm", {}), ("bellbit", {})],
)
@pytest.mark.parametrize("columns", [7, 128, 200])
def test_rivals_are_the_same_after_storage_and_every_byte_counts(method, options, columns):
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(1))
    packed = quantize_weight(weight_of(12, columns), x.t() @ x, method, **options)
    dense = packed.dequantize()
    assert dense.shape == (12, columns)
    again = LAYOUTS[packed.layout].build(packed.shape, packed.options, packed.tensors)
    assert torch.equal(again.dequantize(), dense)
    stored = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert packed.bits_per_weight == pytest.approx(8 * stored / dense.numel())


@pytest.mark.parametrize(("bpw", "width"), [(1.125, 1), (1.5, 1), (2.0, 1), (2.07, 2), (3.0, 2), (4.0, 3)])
def test_one_weight_alone_stays_within_the_limit_too(bpw, width):
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
    weight = weight_of(128, 256)
    packed = quantize_weight(weight, x.t() @ x, "bellbit", bpw=bpw)
    assert packed.nominal_bits == width and packed.bits_per_weight <= bpw
    rest = weight - packed.dequantize()
    lost, whole = (float(((w @ (x.t() @ x)) * w).sum()) for w in (rest, weight))
    assert lost < 1.1 * ERRORS[width] * whole  # a bell's, and compensation gains more


def test_rowcolumn_by_hand():
    """Two rows, four columns, the last two salient; every number a power of two, so that float16 is exact."""
    signs = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    residual = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    salient = torch.tensor([0, 0, 1, 1], dtype=torch.bool)
    for split in (False, True):
        zone = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]], dtype=torch.bool) & (~salient | split)
        rows = torch.tensor([[1.0, 2, 4, 0.5, 8, 0.25], [2.0, 1, 2, 0.5, 1, 0.125]])[:, : 6 if split else 4]
        columns = torch.tensor([[1.0, 2, 1, 2], [4, 8, 1, 2], [0, 0, 1, 0.5], [0, 0, 1, 0.5]])[: 4 if split else 2]
        packed = RowColumn.pack([RowColumnBlock(signs, zone, residual, rows, columns, salient)], 128, split)
        plain = [[1, -16, 4.5, -7], [-4, -8, 1.5, 5]]
        mixed = [[1, -16, 4.5, -3.875], [-4, -8, 0.875, 5]]
        assert packed.dequantize().tolist() == (mixed if split else plain)
        assert packed.nominal_bits == 1.5
        assert (packed.count, packed.residual is None) == (2 * split, not split)


def test_partial_by_hand():
    salient = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    signs = torch.tensor([[0, 1, 0], [1, 0, 0]], dtype=torch.bool)
    codes = torch.tensor([[7, 0, 0], [0, 0, 255]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 0.25, -1.0], [2.0, 1.0, -128.0]])
    packed = Partial.pack([PartialBlock(salient, signs, codes, scales)], 128)
    assert packed.dequantize().tolist() == [[0.75, 0.5, -0.5], [2.0, -128.0, 127.0]]
    assert packed.signs.tolist() == [0b101] and packed.codes.tolist() == [7, 0, 255]
    assert packed.nominal_bits == 1 + 7 * 0.5


def test_golden_bytes_of_uniform():
    group = UniformGroup(
        codes=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 7]], dtype=torch.uint8),
        scale=torch.tensor([[0.5]]),
        zero=torch.tensor([[3]], dtype=torch.uint8),
    )
    packed = Uniform.pack([group], width=3, group_size=128)
    assert packed.codes.tolist() == [[[0b10101010, 1]], [[0b11001100, 1]], [[0b11110000, 1]]]
    assert packed.dequantize().tolist() == [[-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0]]


def test_sign128_is_q1_0_byte_for_byte():
    """Per 128 columns a little-endian float16 d, then 16 bytes of bits, least significant first, 1 for +d."""
    signs = torch.zeros(1, 256, dtype=torch.bool)
    signs[0, [0, 9, 128 + 127]] = True
    weight = Sign128.pack(signs, torch.tensor([[1.0, 0.5]]))
    expected = bytes([0x00, 0x3C, 0x01, 0x02] + [0] * 14 + [0x00, 0x38] + [0] * 15 + [0x80])
    assert bytes(weight.blocks[0].tolist()) == expected
    assert weight.bits == {"signs": 1.0, "scales": 0.125} and weight.bits_per_weight == 1.125
    assert torch.equal(
        weight.dequantize(), torch.where(signs, 1.0, -1.0) * torch.tensor([1.0, 0.5]).repeat_interleave(128)
    )


def test_sign128_with_a_short_block():
    dense = weight_of(3, 200)
    weight = quantize_weight(dense, None, "sign")
    assert weight.blocks.shape == (3, 18 + 2 + 9)
    assert weight.bits_per_weight == pytest.approx(8 * 29 / 200)
    scale = dense[:, 128:].abs().mean(dim=1, keepdim=True).half().float()
    assert torch.equal(weight.dequantize()[:, 128:], torch.where(dense[:, 128:] >= 0, scale, -scale))


def test_sign128_of_one_short_row():
    weight = Sign128.pack(torch.tensor([[True, False, True]]), torch.tensor([[0.5]])).dequantize()
    assert weight.tolist() == [[0.5, -0.5, 0.5]]


def test_the_sign_methods_scale_is_the_best_one():
    """Given the signs, mean |w| has the least squared error: moving it either way is worse."""
    dense = weight_of(4, 128)
    quantized = quantize_weight(dense, None, "sign").dequantize()
    error = (dense - quantized).square().sum(dim=1)
    for factor in (0.99, 1.01):
        assert bool(((dense - factor * quantized).square().sum(dim=1) > error).all())


@pytest.mark.parametrize(("width", "levels"), [(1, [-0.5, 0.5]), (2, [-1.5, -0.5, 0.5, 1.5]), (3, [-4.0, 3.0])])
def test_bellbox_levels(width, levels):
    codes = torch.tensor([[0, 2**width - 1]]) if width == 3 else torch.arange(2**width)[None]
    weight = Bellbox.pack(codes.to(torch.uint8), torch.tensor([2.0]), width, half=width <= 2)
    assert (weight.levels() / 2).tolist() == [levels]


def test_bellbox_meets_rotated_input():
    """(x·H)·Ŵᵀ equals x times what `dequantize` gives, in any width."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (5, 200), dtype=torch.uint8, generator=generator)
    weight = Bellbox.pack(codes, torch.rand(5, generator=generator), 2, half=True)
    x = torch.randn(3, 200, generator=generator)
    from bellbit.kernels import reference

    assert torch.allclose(reference.linear(x, weight, None), x @ weight.dequantize().t(), atol=1e-4)
    assert weight.bits_per_weight == 2 + 32 / 200


def test_scales_of_symmetric_are_steps_between_the_largest_and_the_smallest():
    levels = torch.tensor([[-1.5, 0.5], [1.5, -0.5], [0.5, 0.5]])
    scales = torch.tensor([[8.0], [8 * 2**-0.3], [0.25]])
    weight = Symmetric.pack(levels, scales, 2)
    assert weight.octaves.tolist() == pytest.approx([3, 5 / 255])
    assert weight.steps.flatten().tolist() == [0, 15, 255]  # .3 · 255 / 5 = 15.3
    assert weight.scales.flatten().tolist() == pytest.approx([8, 8 * 2 ** (-15 * 5 / 255), 0.25])
    torch.testing.assert_close(weight.dequantize(), levels * weight.scales)
    assert weight.bits == {"codes": 8.0, "scales": 4 + 64 / 6}  # bytes of two columns

    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(-4 * torch.rand(100, 10, generator=generator))
    weight = Symmetric.pack(torch.full((100, 1280), 0.5), scales, 2)
    assert float((weight.scales / scales).log2().abs().max()) < 2.001 / 255
    assert weight.bits_per_weight == 2 + 8 / 128 + 64 / 128000
    equal = Symmetric.pack(levels, torch.full((3, 1), 0.75), 2)
    assert equal.scales.flatten().tolist() == pytest.approx([0.75] * 3)
