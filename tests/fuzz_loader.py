"""Mutated checkpoints: each must be refused by a BellbitError, or load and run. `scripts/check-kernels.sh fuzz` runs
10 000 of them over kernels with the address and undefined behaviour sanitizers; tests/packed/test_fuzz.py some.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers.models.llama import LlamaConfig

from bellbit import quantize_weight
from bellbit.errors import BellbitError
from bellbit.loading import load_model, locate
from bellbit.packed.checkpoint import write_shards
from bellbit.packed.linear import PackedLinear
from bellbit.packed.plain import NormalFloat
from bellbit.packed.planes import Bellbox
from bellbit.packed.save import StoredTensors, quantization_config

EXTREMES = [0, 1, -1, 2, 7, 16, 128, 129, 2**31 - 1, 2**31, 2**63, -(2**63), 1e300, 0.5, True, None, "", "a", [], {}]
TOKENS = torch.arange(20)[None]


def make_checkpoint(folder):
    """A tiny LLaMA with every layout; ragged widths."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=40,
        intermediate_size=300,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=1,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    block = model.model.layers[0]
    weights = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj, block.self_attn.o_proj]
    weights += [block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj]
    makers = [
        lambda w: quantize_weight(w, None, metric="magnitude", compensate=False),
        lambda w: quantize_weight(w, None, metric="magnitude", compensate=False, scale_bits=8),
        lambda w: quantize_weight(w, None, metric="magnitude", compensate=False, block_size=48),
        lambda w: quantize_weight(w, None, "sign"),
        lambda w: Bellbox.pack(torch.randint(0, 8, w.shape, dtype=torch.uint8), torch.rand(len(w)), 3, half=False),
        lambda w: quantize_weight(w, None, "rtn", bits=2),
        lambda w: NormalFloat.pack(torch.randint(0, 8, w.shape, dtype=torch.uint8), torch.rand(len(w)), 3),
    ]
    names = {module: name for name, module in model.named_modules()}
    for linear, make in zip(weights, makers, strict=True):
        model.set_submodule(names[linear], PackedLinear.holding(make(linear.weight.data), act_bits=8))
    folder.mkdir()
    write_shards(StoredTensors(model), folder)
    model.config.quantization_config = quantization_config(model, "fuzz", "token", 8, {})
    model.config.save_pretrained(folder)


def mutate_bytes(data, rng):
    """Some bytes changed, cut out, doubled or cut off."""
    data = bytearray(data)
    kind = rng.choice(["flip", "flip", "flip", "cut", "remove", "double"])
    at = rng.randrange(min(len(data), rng.choice([8, 64, 4096, len(data)])))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            data[min(len(data) - 1, at + rng.randrange(64))] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "remove":
        del data[at : at + rng.choice([1, 2, 8, 64, 1024])]
    else:
        data[at:at] = data[at : at + rng.choice([1, 2, 8, 64, 1024])]
    return bytes(data)


def mutate_json(value, rng):
    """One value somewhere inside replaced, removed or given to a neighbour; returns the new value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.05:
            del value[key]
        elif kind < 0.1:
            value[rng.choice(sorted(value))] = value[key]
        else:
            value[key] = mutate_json(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        value[at] = mutate_json(value[at], rng)
        return value
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-128, -8, -1, 1, 8, 128])
    return rng.choice(EXTREMES)


def split_header(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def mutated(folder, copy, rng):
    """A copy of the checkpoint with one file changed."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    tensors, config = copy / "model.safetensors", copy / "config.json"
    if rng.random() < 0.7:  # without checksums changed bytes come through to the kernels
        header, data = split_header(tensors.read_bytes())
        del header["__metadata__"]["crc32"]
        encoded = json.dumps(header).encode()
        tensors.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    kind = rng.choice(["header", "header", "body", "bytes", "config", "config", "config bytes"])
    if kind == "bytes":
        tensors.write_bytes(mutate_bytes(tensors.read_bytes(), rng))
    elif kind == "config bytes":
        config.write_bytes(mutate_bytes(config.read_bytes(), rng))
    elif kind == "config":
        described = json.loads(config.read_text())
        described["quantization_config"] = mutate_json(described["quantization_config"], rng)
        config.write_text(json.dumps(described))
    else:
        header, data = split_header(tensors.read_bytes())
        if kind == "header":
            header = mutate_json(header, rng)
        else:
            data = mutate_bytes(data, rng)
        encoded = json.dumps(header).encode()
        tensors.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def run(count, seed, work):
    """Counts of refused and of running checkpoints among `count` mutated ones. Raises what is no BellbitError."""
    folder, copy = work / "whole", work / "mutated"
    make_checkpoint(folder)
    refused = ran = 0
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        mutated(folder, copy, rng)
        (work / "number").write_text(str(number))  # says where a crash was
        try:
            model = load_model(locate(str(copy)), "float32")
        except BellbitError:
            refused += 1
            continue
        with torch.no_grad():
            model(TOKENS % model.config.vocab_size)  # by panels
            model(TOKENS[:, :1] % model.config.vocab_size)  # by the packed kernels
        ran += 1
    return refused, ran


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        refused, ran = run(int(sys.argv[1]), int(sys.argv[2]), Path(place))
        print(f"{refused} mutated checkpoints were refused, {ran} ran")
