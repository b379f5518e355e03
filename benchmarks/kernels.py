"""Packed kernels against torch's float32 product: one token, small batches, a prompt; and against memory itself.

Layers of 4096 × 11008, several of them in turn, so that neither the dense nor the packed ones stay in a cache.
"""

import statistics
import time

import torch

from bellbit.kernels import native
from bellbit.packed.codebook2 import Codebook2
from bellbit.packed.planes import Bellbox, Sign128
from common import note, parser, row, show

ROWS, COLUMNS = 11008, 4096
PROMPT = 512
BARS = {("codebook2", 16): 7, ("codebook2", 8): 10, ("sign128", 16): 14, ("sign128", 8): 20}
BANDWIDTH_BAR, PROMPT_BAR = 0.6, 0.9


def seconds_of(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def faster(reference, ours, repeats=15):
    """How many times faster `ours` is, and the median seconds of each.

    The median of the ratios of neighbouring runs, since the speed of a shared machine drifts.
    """
    reference(), ours()
    pairs = [(seconds_of(reference), seconds_of(ours)) for _ in range(repeats)]
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    return ratio, *(statistics.median(column) for column in zip(*pairs, strict=True))


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def codebook2():
    return Codebook2(
        shape=(ROWS, COLUMNS),
        block_size=128,
        scale_bits=16,
        signs=random_bytes(ROWS, COLUMNS // 8),
        second=random_bytes(ROWS, COLUMNS // 8),
        scales=torch.rand(ROWS, COLUMNS // 128, 7).half(),
        salient=random_bytes(COLUMNS // 8),
    )


def sign128():
    return Sign128.pack(torch.rand(ROWS, COLUMNS) < 0.5, torch.rand(ROWS, COLUMNS // 128))


def bellbox(width):
    return Bellbox.pack(random_bytes(ROWS, COLUMNS) % 2**width, torch.rand(ROWS), width)


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

    for name, weights in layouts.items():
        stored = sum(tensor.nbytes for weight in weights for tensor in weight.tensors.values())
        for act_bits in (16, 8):

            def packed(weights=weights, act_bits=act_bits):
                for weight in weights:
                    native.linear(x, weight, None, act_bits)

            ratio, reference, seconds = faster(plain, packed)
            ratio *= len(weights) / len(dense)
            rows.append(row(f"one token, {name}, A{act_bits}", ratio, BARS.get((name, act_bits))))
            ours, theirs = 1e3 * seconds / len(weights), 1e3 * reference / len(dense)
            note(f"{rows[-1]['name']}: {ours:.2f} ms, float32 {theirs:.2f} ms")
            if act_bits == 8:
                share, reading, _ = faster(memory.sum, packed)
                share *= stored / memory.nbytes
                bar = BANDWIDTH_BAR if name == "sign128" else None
                rows.append(row(f"one token, {name}, A8: share of read bandwidth", share, bar))
                note(f"memory is read at {memory.nbytes / reading / 1e9:.1f} GB/s")
    for tokens in (2, 4, 8, 16, PROMPT):
        batch = torch.randn(tokens, COLUMNS)
        for name, weights in layouts.items():
            ratio, *_ = faster(
                lambda b=batch: torch.nn.functional.linear(b, dense[0]),
                lambda b=batch, w=weights[0]: native.linear(b, w, None),
                repeats=5,
            )
            rows.append(row(f"{tokens} tokens, {name}, A16", ratio, PROMPT_BAR if tokens == PROMPT else None))
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
