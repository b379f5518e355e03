"""Compile every Triton kernel for GPUs that need not be here, as test_triton.py has it done."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bellbit.kernels import triton as kernels

CASES = [(80, "bf16"), (90, "bf16"), (90, "fp32")]  # compute capability, and what x is
SCALAR = {"tokens", "rows", "columns", "row_bytes", "twice_zero_x", "twice_zero_w"}
SCALAR |= {"block_size", "blocks", "group_size", "groups"}


def compiled(kernel, target, pointers, **constants):
    """`pointers`: element types by name; everything else that is no constant is an int32."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = f"*{pointers[name]}"
        else:
            assert name in SCALAR, name
            types[name] = "i32"
    return triton.compile(ASTSource(kernel, types, constants), target=target)


def main():
    for capability, x in CASES:
        target = GPUTarget("cuda", capability, 32)
        precision = "ieee" if x == "fp32" else "tf32"
        stored = {"x": "u8", "weight": "u8", "scale": "fp32", "scales": "fp32", "bias": "fp32", "y": x}
        for width in (1, 4):
            pointers = {"x": x, "planes": "u8", "inverse": "fp32", "thresholds": "fp32"}
            compiled(kernels._quantize, target, pointers, WIDTH=width, ROWS=32, PRECISION=precision)
            for tokens in (16, 64):
                tile = {"TOKENS": tokens, "ROWS": 64, "COLUMNS": 64}
                compiled(kernels._multiply, target, stored, HAS_BIAS=True, WIDTH_X=width, WIDTH_W=width, **tile)
        few = {"x": x, "y": x, "bias": "fp32"}
        compiled(kernels._sign128, target, few | {"blocks": "u8"}, HAS_BIAS=True, ROWS=32)
        planes = few | {"codes": "u8", "steps": "u8", "octaves": "fp32"}
        for width in (1, 3):
            compiled(kernels._symmetric, target, planes, HAS_BIAS=True, ROWS=32, WIDTH=width, COLUMNS=128)
        for wide, scales in (
            (True, {"scales": "fp16", "exponents": "fp16"}),
            (False, {"scales": "i8", "exponents": "u8"}),
        ):
            pointers = few | {"codes": "u8", "salient": "u8"} | scales
            compiled(kernels._codebook2, target, pointers, HAS_BIAS=False, ROWS=32, WIDE=wide, COLUMNS=128)


if __name__ == "__main__":
    main()
