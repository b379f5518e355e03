"""llama.cpp on the same model: its own types of 1 to 3 bits, with importance matrix, and our Q1_0 files run by it.

Needs a C++ compiler, cmake and llama.cpp's source, which is vendor/llama.cpp of what
`pip download --no-deps --no-binary llama-cpp-python llama-cpp-python` brings. Types: quantized by its tools from the
model's F16 file, embedding and head left F16, with an importance matrix of the train part of wiki-sample; rows for
`bellbit compare MODEL OUT --methods file:…`, which this prints. Where rows are no multiple of 256 llama.cpp takes
another, wider type by itself: the measured bits tell. Where it has none, as for Q1_0, it refuses.
Ours: quantized to 1.125 bits, exported, and compared by its perplexity tool with the same weights unpacked to F16.
"""

import os
import re
import subprocess
from pathlib import Path

import torch

import bellbit
from bellbit.data import load_corpus
from bellbit.exporting import export_gguf
from bellbit.inspection import inspect
from bellbit.loading import load_model, load_tokenizer, locate
from bellbit.packed.gguf_export import export
from bellbit.packed.linear import packed_linears
from common import note, parser, row, show

TYPES = ("Q1_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "Q2_K")
KL_BAR = 1e-3
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")


def tools(source):
    """Build what is not there; paths by name."""
    build = source / "build"
    if not all((build / "bin" / name).exists() for name in TOOLS):
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMA_CURL=OFF",
            "-DBUILD_SHARED_LIBS=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
        ]
        subprocess.run(["cmake", "-S", source, "-B", build, *options], check=True)
        subprocess.run(["cmake", "--build", build, "-j", str(os.cpu_count()), "--target", *TOOLS], check=True)
    return {name: build / "bin" / name for name in TOOLS}


class Refused(SystemExit):
    """A tool failed, which ends the benchmark unless it may; with what the tool said."""


def called(*command):
    """What a tool printed. Raises Refused if it failed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise Refused(f"{command[0]} failed:\n" + (done.stdout + done.stderr)[-2000:])
    return done.stdout + done.stderr


def dense_gguf(spec, out):
    """A model as an F16 file, weights of packed layers unpacked."""
    location = locate(spec)
    model = load_model(location, "auto" if location.gguf is None else "float32")
    for name, layer in packed_linears(model).items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight.data = layer.packed.dequantize()
        if layer.bias is not None:
            dense.bias.data = layer.bias.float()
        model.set_submodule(name, dense)
    export(model, load_tokenizer(location), out, embedding="F16")


def rivals(tool, model, work, arguments):
    """Files of llama.cpp's types, but of those that it refuses; those that are there already are kept."""
    text = work / "calib.txt"
    text.write_text(load_corpus("wiki-sample", "train").text)
    source, matrix = work / "f16.gguf", work / "imatrix.gguf"
    if not source.exists():
        dense_gguf(model, source)
    if not matrix.exists():
        options = ("-c", arguments.seq_len, "--chunks", arguments.samples, "-ngl", 0)
        called(tool["llama-imatrix"], "-m", source, "-f", text, "-o", matrix, *options)
    kept = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")
    made = []
    for kind in TYPES:
        out = work / f"{kind}.gguf"
        try:
            if not out.exists():
                called(tool["llama-quantize"], "--imatrix", matrix, *kept, source, out, kind)
        except Refused as refused:
            out.unlink(missing_ok=True)
            note(f"{kind} is refused: " + " ".join(str(refused).split("\n")[-4:]))
            continue
        note(f"{out}: {inspect(locate(str(out))).linears.bits_per_weight:.3f} bits per weight of linears")
        made.append(f"file:{out}")
    return made


def divergence(tool, model, work, arguments):
    """Mean KL from our checkpoint, unpacked to F16, to its Q1_0 file, both run by llama.cpp."""
    out, text = work / "ours", work / "test.txt"
    if not out.exists():
        size = {"samples": arguments.samples, "seq_len": arguments.seq_len}
        bellbit.quantize(model, out, "bellbit", bpw=1.125, effort=arguments.effort, resume=True, **size)
    bits = inspect(locate(str(out))).linears.bits_per_weight
    export_gguf(out, work / "ours.gguf", embedding="F16", overwrite=True)
    dense_gguf(str(out), work / "ours-f16.gguf")
    text.write_text(load_corpus("wiki-sample", "test").text)
    options = ("-f", text, "-c", 512, "--chunks", 8, "-ngl", 0, "--kl-divergence-base", work / "base.bin")
    called(tool["llama-perplexity"], "-m", work / "ours-f16.gguf", *options)
    said = called(tool["llama-perplexity"], "-m", work / "ours.gguf", *options, "--kl-divergence")
    found = re.search(r"Mean\s+KLD:\s+([-\d.e]+)", said)
    if found is None:
        raise SystemExit("llama-perplexity told no divergence:\n" + said[-2000:])
    return bits, float(found[1])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("source", type=Path, help="llama.cpp's source")
    arguments.add_argument("model", help="a model whose widths are multiples of 256, for all types to be possible")
    arguments.add_argument("work", type=Path, help="files go there")
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument("--seq-len", type=int, default=1024)
    arguments.add_argument("--effort", default="balanced")
    arguments.add_argument("--only-types", action="store_true", help="not our own file")
    arguments = arguments.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tool = tools(arguments.source)
    note("rows: " + ",".join(rivals(tool, arguments.model, arguments.work, arguments)))
    if arguments.only_types:
        return
    bits, found = divergence(tool, arguments.model, arguments.work, arguments)
    show(
        [
            row("stored bits per weight", bits, 1.125, at_most=True),
            row("1000 × mean KL, Q1_0 in llama.cpp from unpacked F16", 1000 * found, 1000 * KL_BAR, at_most=True),
        ],
        arguments.json,
    )


if __name__ == "__main__":
    main()
