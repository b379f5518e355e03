"""The Triton kernels on a GPU against torch in bfloat16, and where they can be had gemlite and torch._int_mm.

Matrices of 11008 × 4096: one token times sign128 and codebook2, many tokens times BBQ's codes. Each result is compared
with the plain kernel first. Needs a GPU; does nothing without one.
"""

import importlib.util
from dataclasses import replace

import torch

from bellbit.core import bellbox
from bellbit.kernels import reference
from bellbit.packed.planes import Bellbox, unpack_codes
from common import note, parser, row, show
from kernels import codebook2, sign128

ROWS, COLUMNS = 11008, 4096
SETS = 8  # of weights, taken in turn: 8 bfloat16 matrices are more than a cache holds
TOLERANCE = 1e-2  # of the norm: outputs in bfloat16


def on_gpu(packed):
    return replace(packed, **{name: tensor.cuda() for name, tensor in packed.tensors.items()})


def milliseconds(works):
    """Median over rounds in which each call meets other weights."""
    from triton.testing import do_bench

    turn = iter(range(10**9))
    return do_bench(lambda: works[next(turn) % len(works)](), warmup=50, rep=200, return_mode="median")


def check(name, actual, expected):
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}: relative error {error}")


def plain(x):
    weights = [torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)]
    return milliseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def gemlite_rows(x, baseline):
    """gemlite's 1- and 2-bit weights, groups of 128, if it is there."""
    if importlib.util.find_spec("gemlite") is None:
        note("gemlite is not installed")
        return []
    from gemlite import DType, GemLiteLinear

    rows = []
    for bits in (1, 2):
        layers = []
        for _ in range(SETS):
            layer = GemLiteLinear(bits, 128, COLUMNS, ROWS, DType.BF16, DType.BF16)
            codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), device="cuda", dtype=torch.uint8)
            scales = torch.rand(ROWS * COLUMNS // 128, 1, device="cuda", dtype=torch.bfloat16)
            layer.pack(codes, scales, torch.full_like(scales, (2**bits - 1) / 2), None)
            layers.append(layer)
        time = milliseconds([lambda layer=layer: layer(x) for layer in layers])
        rows.append(row(f"{len(x)} token(s), gemlite {bits} bits: bfloat16 / it", baseline / time, None))
    return rows


def few_tokens(kernels):
    x = torch.randn(1, COLUMNS, device="cuda", dtype=torch.bfloat16)
    baseline = plain(x)
    note(f"1 token, bfloat16: {baseline * 1e3:.0f} µs")
    rows = []
    for make in (sign128, codebook2):
        weights = [on_gpu(make()) for _ in range(SETS)]
        name = weights[0].layout
        check(name, kernels.linear(x, weights[0], None), reference.linear(x.float(), weights[0], None))
        time = milliseconds([lambda w=w: kernels.linear(x, w, None) for w in weights])
        note(f"1 token, {name}: {time * 1e3:.0f} µs")
        rows.append(row(f"1 token, {name}: bfloat16 / ours", baseline / time, None))
    return rows + gemlite_rows(x, baseline)


def many_tokens(kernels, tokens):
    x = torch.randn(tokens, COLUMNS, device="cuda", dtype=torch.bfloat16)
    baseline = plain(x)
    gamma, inverse = torch.ones(1, device="cuda"), torch.ones((), device="cuda")
    bytes_x = torch.randint(-8, 8, (tokens, COLUMNS), device="cuda", dtype=torch.int8)
    bytes_w = torch.randint(-8, 8, (ROWS, COLUMNS), device="cuda", dtype=torch.int8).t()
    integers = milliseconds([lambda: torch._int_mm(bytes_x, bytes_w)])
    note(f"{tokens} tokens, bfloat16: {baseline * 1e3:.0f} µs; torch._int_mm: {integers * 1e3:.0f} µs")
    rows = []
    for width in (1, 2, 3, 4):
        codes = torch.randint(0, 2**width, (ROWS, COLUMNS), dtype=torch.uint8)
        weight = on_gpu(Bellbox.pack(codes, torch.rand(ROWS), width, half=width <= 2))
        levels = unpack_codes(kernels.quantize(x, width, inverse), COLUMNS) - bellbox.zero_point(width)
        expected = torch.nn.functional.linear(levels / 2 ** (width - 1), weight.levels())
        check(f"bellbox {width}", kernels.codes_linear(x, gamma, inverse, width, weight, None), expected)
        whole = milliseconds([lambda w=weight, b=width: kernels.codes_linear(x, gamma, inverse, b, w, None)])
        codes_alone = milliseconds([lambda b=width: kernels.quantize(x, b, inverse)])
        note(f"{tokens} tokens, bbq:{width}: {whole * 1e3:.0f} µs, of which codes {codes_alone * 1e3:.0f}")
        rows.append(row(f"{tokens} tokens, bbq:{width}: bfloat16 / ours", baseline / whole, None))
        rows.append(row(f"{tokens} tokens, bbq:{width}: _int_mm / our product", integers / (whole - codes_alone), None))
    return rows


def main():
    arguments = parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is here")
    from bellbit.kernels import triton as kernels

    note(torch.cuda.get_device_name())
    rows = few_tokens(kernels)
    for tokens in (512, 4096):
        rows += many_tokens(kernels, tokens)
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
