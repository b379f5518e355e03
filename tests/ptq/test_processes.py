"""Quantization shared among processes, against one process that does it all."""

import os
import subprocess
import sys

import pytest
import torch

from bellbit.loading import load_model, locate
from bellbit.packed.linear import packed_linears
from bellbit.processes import dealt, owners

SAMPLES, SEQ_LEN = 9, 512  # three batches: of two processes one has more


def weights_of(out):
    layers = packed_linears(load_model(locate(str(out))))
    return {name: layer.packed.dequantize() for name, layer in layers.items()}


def test_alone_a_process_has_it_all():
    assert dealt(7, 2) == [0, 1, 2, 3, 4, 5, 6]
    assert owners({"a": 1.0, "b": 2.0}) == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "dbellquant", ["--ltdb-steps", "5", "--act-bits", "8"]),
        ("mixtral", "gptq", ["--bits", "3"]),
        ("opt", "billm", ["--offload"]),
    ],
)
def test_two_processes_give_the_weights_of_one(family, method, options, tiny_model, english, tmp_path):
    def run(out, *how):
        shape = ["--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--calib", str(english), "--json"]
        command = [sys.executable, *how, "-m", "bellbit", "quantize", str(tiny_model(family)), str(tmp_path / out)]
        done = subprocess.run(
            [*command, "--method", method, *options, *shape],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("one")
    told = run("two", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert told.count('"bits_per_weight"') == 1, "one process speaks"
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = (tmp_path / "two.quantize_log.jsonl").read_text().splitlines()
    assert len(lines) == len(one)
    assert not (tmp_path / "two.partial").exists()
