"""Generating from the demo's checkpoint against the unquantized model in float32, memory against the file's size.

Takes a checkpoint of the demo model (`make demo` leaves one in demo-out). Beside it llama.cpp on the model's 4-bit
file, if the package xllamacpp is there.
"""

import json
import subprocess
import sys
from pathlib import Path

from bellbit.demo import MODEL, PROMPT
from bellbit.loading import locate
from common import note, parser, row, show

TOKENS = 128
SPEED_BAR, MEMORY_BAR = 4, 1.15

# Each in a process of its own: what one leaves behind would count against the next.
SPEED = """
import json, statistics, sys, time, torch
from bellbit.generate import generate
from bellbit.loading import load_model, load_tokenizer, locate
location = locate(sys.argv[1])
model, tokenizer = load_model(location, "float32"), load_tokenizer(location)
def run():
    if sys.argv[3] == "transformers":
        inputs = tokenizer(sys.argv[2], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=N, min_new_tokens=N, do_sample=False, pad_token_id=0)
    else:
        generate(model, tokenizer, sys.argv[2], max_new_tokens=N)
seconds = []
for _ in range(4):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
print(json.dumps(N / statistics.median(seconds[1:])))
""".replace("N", str(TOKENS))

MEMORY = """
import json, sys
import torch, transformers, bellbit, bellbit.packed.hf, transformers.models.llama.modeling_llama
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
model = transformers.AutoModelForCausalLM.from_pretrained
before = resident()
model = model(sys.argv[1])
loaded = resident() - before
with torch.no_grad():
    model(torch.arange(2)[None])  # touches every page that is mapped only
print(json.dumps([loaded, resident() - before]))
"""

LLAMA_CPP = """
import json, sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.cpuparams.n_threads = sys.argv[1], 512, int(sys.argv[3])
server = xllamacpp.Server(parameters)
def run():
    return server.handle_completions({"prompt": sys.argv[2], "max_tokens": N, "temperature": 0, "ignore_eos": True})
run()
print(json.dumps(run()["timings"]["predicted_per_second"]))
""".replace("N", str(TOKENS))


def child(code, *arguments):
    """What a child process prints last, as JSON; None if it fails."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        note(done.stderr.strip().splitlines()[-1])
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--checkpoint", default="demo-out")
    arguments = arguments.parse_args()
    checkpoint = arguments.checkpoint
    size = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
    plain = child(SPEED, MODEL, PROMPT, "transformers")
    ours = child(SPEED, checkpoint, PROMPT, "bellbit")
    stock = child(SPEED, checkpoint, PROMPT, "transformers")
    loaded, touched = child(MEMORY, checkpoint)
    note(f"tokens a second: float32 {plain:.1f}, bellbit {ours:.1f}, transformers on the checkpoint {stock:.1f}")
    note(f"checkpoint {size / 1e6:.1f} MB, resident {loaded / 1e6:.1f} MB, after a token {touched / 1e6:.1f} MB")
    rows = [
        row("generate 128 tokens / float32 under transformers", ours / plain, SPEED_BAR),
        row("the same by transformers' own generate", stock / plain, None),
        row("resident memory after loading / bytes of the checkpoint", loaded / size, MEMORY_BAR, at_most=True),
        row("the same after a first token", touched / size, MEMORY_BAR, at_most=True),
    ]
    location = locate(MODEL)
    if (speed := child(LLAMA_CPP, str(Path(location.path) / location.gguf), PROMPT, "2")) is not None:
        rows.append(row("llama.cpp on the 4-bit file / float32 under transformers", speed / plain, None))
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
