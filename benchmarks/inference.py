"""Generating from the demo's checkpoint against the unquantized model in float32, memory against the file's size.

Takes a checkpoint of the demo model (`make demo` leaves one in demo-out). Beside it llama.cpp on the model's 4-bit
file, if the package xllamacpp is there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import bellbit
from bellbit.demo import MODEL, PROMPT
from bellbit.exporting import export_gguf
from bellbit.loading import locate
from common import note, parser, row, show

TOKENS = 128
PROMPT_TOKENS = 384
SPEED_BAR, MEMORY_BAR = 4, 1.15

# Each in a process of its own: what one leaves behind would count against the next.
SPEED = """
import json, statistics, sys, time, torch
from bellbit.generate import generate
from bellbit.loading import load_model, load_tokenizer, locate
location = locate(sys.argv[1])
model, tokenizer = load_model(location, "float32"), load_tokenizer(location)
model.generation_config.eos_token_id = None  # all write COUNT tokens
def run():
    if sys.argv[3] == "transformers":
        inputs = tokenizer(sys.argv[2], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
    else:
        generate(model, tokenizer, sys.argv[2], max_new_tokens=COUNT)
seconds = []
for _ in range(4):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
prompt = torch.arange(1000, 1000 + READ)[None]
reading = []
with torch.no_grad():
    for _ in range(4):
        start = time.perf_counter()
        model(prompt, logits_to_keep=1)
        reading.append(time.perf_counter() - start)
print(json.dumps([COUNT / statistics.median(seconds[1:]), READ / statistics.median(reading[1:])]))
""".replace("READ", str(PROMPT_TOKENS)).replace("COUNT", str(TOKENS))

MEMORY = """
import json, sys
import torch, transformers, bellbit, bellbit.packed.hf, transformers.models.llama.modeling_llama
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
model = transformers.AutoModelForCausalLM.from_pretrained
tiny = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
with torch.no_grad():
    transformers.LlamaForCausalLM(tiny)(torch.arange(2)[None])  # the libraries' own code and buffers
before = resident()
model = model(sys.argv[1])
loaded = resident() - before
with torch.no_grad():
    model(torch.arange(2)[None])  # touches every page that is mapped only
print(json.dumps([loaded, resident() - before]))
"""

LLAMA_CPP = """
import json, sys, xllamacpp
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads = sys.argv[1], 512, int(sys.argv[3])
server = xllamacpp.Server(parameters)
def run(prompt, count):
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return server.handle_completions(request)["timings"]
run(sys.argv[2], COUNT)
answer = [run(sys.argv[2], COUNT)["predicted_per_second"], run(list(range(1000, 1384)), 1)["prompt_per_second"]]
open(sys.argv[4], "w").write(json.dumps([*answer, resident() - before]))
""".replace("COUNT", str(TOKENS))


def child(code, *arguments):
    """What a child process prints last, as JSON; None if it fails."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        note(done.stderr.strip().splitlines()[-1])
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def llama_cpp(file, folder):
    """Tokens a second, prompt tokens a second and resident bytes; None if llama.cpp is not there or fails."""
    answer = Path(folder) / "answer.json"
    command = [sys.executable, "-c", LLAMA_CPP, str(file), PROMPT, str(torch.get_num_threads()), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(answer.read_text()) if done.returncode == 0 else note(done.stderr[-300:])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--checkpoint", default="demo-out")
    arguments = arguments.parse_args()
    checkpoint = arguments.checkpoint
    size = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
    plain, plain_reading = child(SPEED, MODEL, PROMPT, "transformers")
    ours, reading = child(SPEED, checkpoint, PROMPT, "bellbit")
    stock, _ = child(SPEED, checkpoint, PROMPT, "transformers")
    loaded, touched = child(MEMORY, checkpoint)
    note(f"tokens a second: float32 {plain:.1f}, bellbit {ours:.1f}, transformers on the checkpoint {stock:.1f}")
    note(f"checkpoint {size / 1e6:.1f} MB, resident {loaded / 1e6:.1f} MB, after a token {touched / 1e6:.1f} MB")
    rows = [
        row("generate 128 tokens / float32 under transformers", ours / plain, SPEED_BAR),
        row("the same by transformers' own generate", stock / plain, None),
        row("resident memory after loading / bytes of the checkpoint", loaded / size, MEMORY_BAR, at_most=True),
        row("the same after a first token", touched / size, MEMORY_BAR, at_most=True),
    ]
    rows.append(row(f"a prompt of {PROMPT_TOKENS} tokens / float32 under transformers", reading / plain_reading, None))
    location = locate(MODEL)
    assert location.gguf is not None
    with tempfile.TemporaryDirectory() as folder:
        bellbit.quantize(MODEL, f"{folder}/signs", "sign")
        export_gguf(f"{folder}/signs", f"{folder}/signs.gguf")
        for name, file in (("4-bit", Path(location.path) / location.gguf), ("Q1_0", Path(folder) / "signs.gguf")):
            measured = llama_cpp(file, folder)
            if measured is None:
                continue
            speed, prompt_speed, memory = measured
            note(f"llama.cpp, {name} file of {file.stat().st_size / 1e6:.1f} MB: {memory / 1e6:.1f} MB resident")
            rows.append(row(f"llama.cpp, {name}: generate / float32 under transformers", speed / plain, None))
            rows.append(
                row(f"llama.cpp, {name}: prompt / float32 under transformers", prompt_speed / plain_reading, None)
            )
            rows.append(
                row(f"llama.cpp, {name}: resident memory / bytes of the file", memory / file.stat().st_size, None)
            )
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
