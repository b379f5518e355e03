"""Packed kernels against torch's float32 product: one token, small batches, a prompt; and against memory itself.

Layers of 4096 × 11008, several of them in turn, so that neither the dense nor the packed ones stay in a cache.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

from bellbit.core.activations import quantize_activations
from bellbit.kernels import native
from bellbit.packed.bits import pack_bits
from bellbit.packed.codebook2 import Codebook2
from bellbit.packed.planes import Bellbox, Sign128
from common import median_ratio, note, parser, rounds, row, show

ROWS, COLUMNS = 11008, 4096
PROMPT = 512
BARS = {("codebook2", 16): 7, ("codebook2", 8): 10, ("sign128", 16): 14, ("sign128", 8): 20}
BANDWIDTH_BAR, PROMPT_BAR = 0.6, 0.9


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def codebook2():
    return Codebook2(
        shape=(ROWS, COLUMNS),
        block_size=128,
        scale_bits=16,
        codes=random_bytes(ROWS, COLUMNS // 4),
        scales=torch.rand(ROWS, COLUMNS // 128, 7).half(),
        salient=random_bytes(COLUMNS // 8),
    )


def sign128():
    return Sign128.pack(torch.rand(ROWS, COLUMNS) < 0.5, torch.rand(ROWS, COLUMNS // 128))


def bellbox(width):
    return Bellbox.pack(random_bytes(ROWS, COLUMNS) % 2**width, torch.rand(ROWS), width, half=width <= 2)


def bit_serial(x, weight):
    """A6 by AND and population count over a 1-bit `bellbox` weight: a function of no arguments, checked here once.

    None if there is no compiler.
    """
    codes = quantize_activations(native.rotate(x), 6)[0]
    step = codes.abs().max() / 31
    codes = (codes / step).round().int()
    bits = (codes[None] >> torch.arange(6, dtype=torch.int32)[:, None]) & 1
    planes, sums = pack_bits(bits.bool()), torch.empty(ROWS, dtype=torch.int32)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bitserial.so"
        source = Path(__file__).with_name("bitserial.cpp")
        try:
            flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC"]
            subprocess.run(["c++", *flags, source, "-o", library], check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        multiply = ctypes.CDLL(str(library)).multiply
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight.codes, planes)]
    sizes = [ctypes.c_int64(n) for n in (ROWS, COLUMNS // 64, 6, int(codes.sum()))]

    def run():
        multiply(*pointers, *sizes, ctypes.c_void_p(sums.data_ptr()))
        return sums * (weight.scales / 2 * step)

    torch.testing.assert_close(run(), native.linear(x, weight, None, 6)[0], rtol=1e-4, atol=1e-4)
    return run


def main():
    arguments = parser(__doc__).parse_args()
    torch.manual_seed(0)
    note(f"{native.chosen()} kernels, {torch.get_num_threads()} threads")
    # 4 dense layers are 720 MB; 8 packed ones 41 to 130 MB: past the last-level cache of 32 MB on the machine measured
    dense = [torch.randn(ROWS, COLUMNS) for _ in range(4)]
    layouts = {
        "codebook2": [codebook2() for _ in range(4)],
        "sign128": [sign128() for _ in range(8)],
        "bellbox, 1 bit": [bellbox(1) for _ in range(8)],
        "bellbox, 2 bits": [bellbox(2) for _ in range(8)],
        "bellbox, 4 bits": [bellbox(4) for _ in range(4)],
    }
    memory = torch.ones(1 << 28)  # 1 GiB, in no cache: its sum is bound by how fast memory is read
    x = torch.randn(1, COLUMNS)
    rows = []

    def plain():
        for weight in dense:
            torch.nn.functional.linear(x, weight)

    def packed(batch, weights, act_bits):
        def run():
            for weight in weights:
                native.linear(batch, weight, None, act_bits)

        return run

    cases = [(name, act_bits) for name in layouts for act_bits in (16, 8)]
    works = [plain, memory.sum, *(packed(x, layouts[name], act_bits) for name, act_bits in cases)]
    reference, reading, *measured = rounds(works, repeats=41)
    reference, speed = reference / len(dense), memory.nbytes / reading
    note(
        f"float32: {1e3 * float(reference.median()):.2f} ms a layer; memory is read at {speed.median() / 1e9:.1f} GB/s"
    )
    for (name, act_bits), seconds in zip(cases, measured, strict=True):
        weights = layouts[name]
        each = seconds / len(weights)
        what = f"one token, {name}, A{act_bits}"
        note(f"{what}: {1e3 * float(each.median()):.2f} ms a layer")
        rows.append(row(what, median_ratio(reference, each), BARS.get((name, act_bits))))
        if act_bits == 8:
            stored = sum(tensor.nbytes for weight in weights for tensor in weight.tensors.values())
            bar = BANDWIDTH_BAR if name == "sign128" else None
            rows.append(row(f"{what}: share of read bandwidth", median_ratio(stored / seconds, speed), bar))
    threads, weight = torch.get_num_threads(), layouts["bellbox, 1 bit"][0]
    if serial := bit_serial(x, weight):
        torch.set_num_threads(1)
        by_bits, by_integers = rounds([serial, lambda: native.linear(x, weight, None, 6)], repeats=41)
        torch.set_num_threads(threads)
        what = "one token, bellbox, 1 bit, A6, one thread: integers / AND and population count"
        rows.append(row(what, median_ratio(by_bits, by_integers), None))
    for tokens in (2, 4, 8, 16, PROMPT):
        batch = torch.randn(tokens, COLUMNS)
        works = [packed(batch, weights[:1], 16) for weights in layouts.values()]
        reference, *measured = rounds(
            [lambda batch=batch: torch.nn.functional.linear(batch, dense[0]), *works], repeats=9
        )
        for name, seconds in zip(layouts, measured, strict=True):
            bar = PROMPT_BAR if tokens == PROMPT else None
            rows.append(row(f"{tokens} tokens, {name}, A16", median_ratio(reference, seconds), bar))
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
