"""Time and memory for every decoder block of a model with LLaMA-2-7B's shapes and random weights.

The checkpoint is made shard by shard, quantized in a process of its own, and removed. Linux only: the peak of every
block is taken by setting back the kernel's own count.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from bellbit.ptq.blocks import skeleton
from common import note, parser, row, show
from conftest import byte_tokenizer

SAMPLES, SEQ_LEN = 16, 512
COMMON = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES = {  # hidden, inner, heads, of them for keys, blocks
    "llama-2-7b": (4096, 11008, 32, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40, 40),
    "llama-2-70b": (8192, 28672, 64, 8, 80),
    "tinyllama-1.1b": (2048, 5632, 32, 4, 22),
}
BAR, GROWTH = 6.0, 0.01  # GiB; GiB a block

CHILD = """
import json, sys, time
from dataclasses import asdict
import bellbit
from bellbit.memory import peak_memory
from bellbit.planning import plan
marks, last = [], [None]
def peak():
    found = peak_memory()
    open("/proc/self/clear_refs", "w").write("5")
    return found
def progress(share, text):
    stage = text.partition(":")[0]
    if stage != last[0]:
        last[0] = stage
        marks.append((stage, time.perf_counter(), peak()))
        print(stage, round(marks[-1][2] / 2**30, 3), file=sys.stderr, flush=True)
told, out = json.loads(sys.argv[1]), sys.argv[2]
planned = plan(**told)
report = bellbit.quantize(out=out, progress=progress, **told)
progress(1, "end")
print(json.dumps({
    "marks": marks, "bits": report.bits_per_weight, "bytes": report.checkpoint_bytes, "plan": asdict(planned)
}))
"""


def config_of(shape, blocks=None):
    hidden, inner, heads, keys, depth = SHAPES[shape]
    return LlamaConfig(
        **COMMON,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        num_hidden_layers=blocks or depth,
        architectures=["LlamaForCausalLM"],
    )


def make(folder, config):
    """A checkpoint of random bfloat16 weights, one file for each block."""
    torch.manual_seed(0)
    shards: dict[str, list] = {}
    for name, parameter in skeleton(config, torch.bfloat16).named_parameters():
        part = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(part, []).append((name, parameter.shape))
    placed = {}
    for part, tensors in shards.items():
        file = f"model-{part}.safetensors"
        made = {}
        for name, shape in tensors:
            noise = torch.randn(shape, dtype=torch.bfloat16)
            made[name] = 1 + 0.1 * noise if len(shape) == 1 else 0.02 * noise
            placed[name] = file
        save_file(made, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def measure(config, told):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        make(model, config)
        command = [sys.executable, "-c", CHILD, json.dumps({"model": str(model), **told}), f"{folder}/out"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    stages = {}
    for (stage, start, _), (_, stop, peak) in zip(found["marks"], found["marks"][1:], strict=False):
        stages[stage] = {"seconds": round(stop - start, 1), "peak_gib": round(peak / 2**30, 3)}
    planned = found["plan"]
    return {
        "stages": stages,
        "bits_per_weight": found["bits"],
        "checkpoint_bytes": found["bytes"],
        "planned_gib": round(sum(planned["memory"].values()) / 2**30, 3),
        "planned_seconds": round(sum(planned["seconds"].values())),
        "planned_bytes": planned["output_bytes"],
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    arguments.add_argument("--blocks", type=int, default=4, choices=range(2, 81), metavar="2…80")
    arguments.add_argument("--method", default="dbellquant")
    arguments.add_argument("--samples", type=int, default=SAMPLES)
    arguments.add_argument("--seq-len", type=int, default=SEQ_LEN)
    arguments.add_argument("--offload", action="store_true")
    arguments.add_argument("--ltdb-steps", type=int, default=20, help="of 200, of dbellquant; only time depends on it")
    arguments.add_argument("--results", type=Path, default=Path("benchmarks/results/scaling.json"))
    arguments = arguments.parse_args()
    names = ("method", "samples", "seq_len", "offload", *(("ltdb_steps",) if arguments.method == "dbellquant" else ()))
    told = {name: getattr(arguments, name) for name in names}
    found = measure(config_of(arguments.shape, arguments.blocks), told)
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    case = {"shape": arguments.shape, "blocks": arguments.blocks, **told}
    known[", ".join(f"{name} {value}" for name, value in case.items())] = found
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(known, indent=2) + "\n")
    for stage, numbers in found["stages"].items():
        note(f"{stage}: {numbers['seconds']} s, at most {numbers['peak_gib']} GiB")
    blocks = [numbers for stage, numbers in found["stages"].items() if stage.startswith("block ")]
    peaks = [numbers["peak_gib"] for numbers in blocks[1:]]
    seconds = [numbers["seconds"] for numbers in blocks[1:]]
    growth = (peaks[-1] - peaks[0]) / max(1, len(peaks) - 1)
    peak = max(stage["peak_gib"] for stage in found["stages"].values())
    took = sum(stage["seconds"] for stage in found["stages"].values())
    show(
        [
            row("peak, GiB", peak, BAR, at_most=True),
            row("peak / plan", peak / found["planned_gib"], None),
            row("seconds / plan", took / found["planned_seconds"], None),
            row("bytes / plan", found["checkpoint_bytes"] / found["planned_bytes"], None),
            row("growth from block 2 on, GiB a block", growth, GROWTH, at_most=True),
            row("slowest block over fastest, from block 2 on", max(seconds) / min(seconds), 1.2, at_most=True),
        ],
        arguments.json,
    )


if __name__ == "__main__":
    main()
