"""A training step of llama-tiny with bbq:2 weights and activations against the unquantized step: time and memory.

And the rotation of BBQ against the product with a dense block-diagonal matrix, by blocks of 128.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bellbit.core.hadamard import sylvester
from bellbit.kernels import native
from bellbit.memory import peak_memory, release_memory
from bellbit.qat import prepare
from bellbit.qat.presets import preset
from common import median_ratio, note, parser, rounds, row, show

BATCH, LENGTH, VOCABULARY = 16, 256, 4096
BARS = {"eager": 1.6, "compiled": 1.25, "memory": 1.5}
METHODS = ("none", "bbq:2", "quest:2", "lsq:2", "seq:2", "n2uq:2")


def make(method, compiled=False):
    """A function that does one step."""
    torch.manual_seed(0)
    specials = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = AutoModelForCausalLM.from_config(preset("llama-tiny").config(VOCABULARY, LENGTH, specials)).train()
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    if method != "none":
        prepare(model, method, method)
        model(tokens[:1], labels=tokens[:1])  # the quantizers' first values
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    network = torch.compile(model) if compiled else model

    def step():
        network(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_of_a_step(method):
    """Bytes that the third step takes beyond what lies there between steps; run in a process of its own."""
    step = make(method)
    step(), step()
    release_memory()  # what the allocator keeps of the steps before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, at what is there
    before = peak_memory()
    step()
    return peak_memory() - before


def memory(method):
    command = [sys.executable, __file__, "--step", method]
    # freed memory goes back at once, so that the peak is of what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(answer.stdout)


def main():
    if "--step" in sys.argv:
        arguments = argparse.ArgumentParser()
        arguments.add_argument("--step")
        print(peak_of_a_step(arguments.parse_args().step))
        return
    arguments = parser(__doc__).parse_args()
    rows = []
    plain, *others = rounds([make(method) for method in METHODS], repeats=9)
    note(f"unquantized step: {1e3 * float(plain.median()):.0f} ms")
    for method, times in zip(METHODS[1:], others, strict=True):
        bar = BARS["eager"] if method == "bbq:2" else None
        rows.append(row(f"step with {method} / unquantized", median_ratio(times, plain), bar, at_most=True))
    plain, ours = rounds([make("none", compiled=True), make("bbq:2", compiled=True)], repeats=9)
    rows.append(row("the same compiled, bbq:2", median_ratio(ours, plain), BARS["compiled"], at_most=True))
    least, ours = memory("none"), memory("bbq:2")
    note(f"memory of a step: {least / 1e6:.0f} MB unquantized, {ours / 1e6:.0f} MB with bbq:2")
    rows.append(row("memory of a step, bbq:2 / unquantized", ours / least, BARS["memory"], at_most=True))
    for width in (256, 4096):
        x = torch.randn(1024, width)
        matrix = sylvester(128, x.dtype)
        works = [partial(torch.matmul, x.view(-1, 128), matrix), partial(native.rotate, x)]
        by_blocks, ours = rounds(works, repeats=25)
        rows.append(row(f"rotation at width {width}: blocks of 128 / ours", median_ratio(by_blocks, ours), 1))
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
