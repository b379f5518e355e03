"""Peak memory of a quantization over its bound: the loaded model, one block, two sets of hidden states.

The demo model and setting, in a process of its own; the resident memory of the imported libraries is measured
first and taken off. The bound also grants 300 MB for what `ALLOWANCE` names.
"""

import json
import subprocess
import sys
import tempfile

from common import note, parser, row, show

ALLOWANCE = 300e6  # allocator slack, tokenizer, calibration text, one batch of activations of 2048 tokens

CHILD = """
import json, sys
import torch, transformers, bellbit
from bellbit import demo
from bellbit.memory import peak_memory as peak
from bellbit.ptq import quantize as q
import bellbit.packed.hf, gguf, transformers.models.llama.modeling_llama
base = peak()
sizes = {}
original = q.quantize_model
def spy(blocks, settings, windows, *rest):
    model, block = blocks.model, blocks.all[0]
    sizes["model"] = sum(p.nbytes for p in model.parameters())
    sizes["block"] = sum(p.nbytes for p in block.parameters())
    sizes["hidden"] = windows.numel() * model.config.hidden_size * 4
    sizes["opened"] = peak() - base
    return original(blocks, settings, windows, *rest)
q.quantize_model = spy
bellbit.quantize(demo.MODEL, sys.argv[1], calib=demo.TEXT, samples=demo.SAMPLES, seq_len=demo.SEQ_LEN, ltdb_steps=5)
print(json.dumps(sizes | {"peak": peak() - base}))
"""


def main():
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, f"{folder}/out"], capture_output=True, text=True, check=True
        )
    sizes = json.loads(done.stdout.strip().splitlines()[-1])
    note(", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in sizes.items()))
    bound = sizes["model"] + sizes["block"] + 2 * sizes["hidden"] + ALLOWANCE
    show([row("peak memory / bound", sizes["peak"] / bound, 1.0, at_most=True)], arguments.json)


if __name__ == "__main__":
    main()
