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


def median_seconds(work, repeats=15):
    """Median over repeats, the first run not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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


def read_bandwidth(repeats=9):
    """Bytes a second that all threads together read: the sum of 1 GiB of float32, which is in no cache."""
    memory = torch.ones(1 << 28)
    return memory.nbytes / median_seconds(memory.sum, repeats)


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
    x = torch.randn(1, COLUMNS)
    rows = []
    bandwidth = read_bandwidth()
    reference = median_seconds(lambda: [torch.nn.functional.linear(x, w) for w in dense]) / len(dense)
    note(f"memory is read at {bandwidth / 1e9:.1f} GB/s; torch float32 at {dense[0].nbytes / reference / 1e9:.1f} GB/s")
    for name, weights in layouts.items():
        for act_bits in (16, 8):
            seconds = median_seconds(lambda w=weights, a=act_bits: [native.linear(x, v, None, a) for v in w])
            seconds /= len(weights)
            rows.append(row(f"one token, {name}, A{act_bits}", reference / seconds, BARS.get((name, act_bits))))
            if act_bits == 8:
                share = sum(t.nbytes for t in weights[0].tensors.values()) / seconds / bandwidth
                bar = BANDWIDTH_BAR if name == "sign128" else None
                rows.append(row(f"one token, {name}, A8: share of read bandwidth", share, bar))
    for tokens in (2, 4, 8, 16, PROMPT):
        batch = torch.randn(tokens, COLUMNS)
        repeats = 3 if tokens == PROMPT else 7
        reference = median_seconds(lambda b=batch: torch.nn.functional.linear(b, dense[0]), repeats)
        for name, weights in layouts.items():
            seconds = median_seconds(lambda b=batch, w=weights: native.linear(b, w[0], None), repeats)
            rows.append(
                row(f"{tokens} tokens, {name}, A16", reference / seconds, PROMPT_BAR if tokens == PROMPT else None)
            )
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
