"""BBQ against its rivals on real text: one small LLaMA trained from its first step with every quantizer and width.

5 decoder blocks of width 128 (1.07 million parameters besides embedding and head), 3072 byte pairs learned from the
text, 1024 steps of 8 × 256 tokens, weights and activations quantized alike, one seed for all. Text: the train part of
wiki-sample, the Free On-line Dictionary of Computing and the Jargon File (Debian's packages dict-foldoc and
dict-jargon); perplexity on the test part of wiki-sample, 8 windows at a time as in training (BBQ's rms is of all
tokens that meet). Hours on two cores: a run is resumed where it stopped, a
result is kept as it comes, and a second start goes on from there.
"""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch
from transformers.models.llama import LlamaConfig

from bellbit.core import bellbox
from bellbit.core.baselines import scaled_gradient
from bellbit.data import evaluation_windows, load_corpus
from bellbit.evaluate import perplexity
from bellbit.fetch import cache_dir
from bellbit.kernels import rotate
from bellbit.qat.settings import Settings
from bellbit.qat.train import Diverged, train
from bellbit.quantizers import METHODS
from common import note, parser, row, show

PACKAGES = {"foldoc": "dict-foldoc=20230119-1", "jargon": "dict-jargon=4.4.7-3.1"}
VOCABULARY, LENGTH, BATCH, STEPS, LR = 3072, 256, 8, 1024, 2e-3
CONDITIONS = {
    "vocabulary": VOCABULARY,
    "length": LENGTH,
    "batch": BATCH,
    "steps": STEPS,
    "lr": LR,
    "packages": PACKAGES,
}
COMPARED = ("bbq", "quest", "lsq")
OTHERS = ("bbq-fast", "seq", "n2uq", "nf")
ENTROPIES = {2: 1.95, 4: 3.9}  # the least that BBQ's weights must have, bits


def ablated(rotated=True, normalised=True, learned=True, **changes):
    """BBQ with a part left out."""

    def apply(q, x):
        gamma = scaled_gradient(q.gamma if learned else q.gamma.detach(), x.numel() ** -0.5)
        constant = None if normalised else x.new_ones((), dtype=torch.float32)
        return bellbox.bellbox(x, gamma, q.width, q.channels is not None, constant, rotate if rotated else None)[0]

    if not normalised:
        changes["codes"] = lambda q, v: bellbox.normal_codes(v, q.width)
    return replace(METHODS["bbq"], apply=apply, rotates=rotated, **changes)


ABLATIONS = {
    "bbq-without-hadamard": ablated(rotated=False),
    "bbq-without-rms": ablated(normalised=False),
    "bbq-gamma-fixed": ablated(learned=False),
    "bbq-gamma-from-1": ablated(start=lambda x, width, channels: {"gamma": x.new_ones(())}),
}
METHODS.update(ABLATIONS)


def specs(methods):
    return [f"{method}:{width}" for width in (2, 4, 3, 1) for method in methods if width in METHODS[method].widths]


RUNS = [*specs(COMPARED[:1]), "none", *specs(COMPARED[1:]), *(f"{name}:2" for name in ABLATIONS), *specs(OTHERS)]


def dictionary(name):
    """Entries of a dictionary in Debian's package for dictd, one paragraph a line, without the marks of links."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", PACKAGES[name]], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        files = Path(folder) / "usr/share/dictd"
        text = gzip.decompress((files / f"{name}.dict.dz").read_bytes())
        index = (files / f"{name}.index").read_text(encoding="utf-8").splitlines()

    def number(digits):  # base 64, most significant first
        return int.from_bytes(base64.b64decode(digits.rjust(8, "A")), "big")

    places = {tuple(map(number, line.split("\t")[1:])) for line in index if not line.startswith("00-database")}
    entries = [text[start : start + size].decode(errors="replace") for start, size in sorted(places)]
    paragraphs = [re.split(r"\n\s*\n", re.sub("[{}]", "", entry)) for entry in entries]
    return ["\n\n".join(" ".join(paragraph.split()) for paragraph in entry) for entry in paragraphs]


def prepare_folder(folder):
    """Text, tokenizer and model's shape, the same for all runs."""
    text = folder / "text.jsonl"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = [*load_corpus("wiki-sample", "train").documents, *dictionary("foldoc"), *dictionary("jargon")]
        note(f"{len(documents)} documents, {sum(map(len, documents)):,} characters")
        partial = text.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        partial.replace(text)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        initializer_range=0.02 * (640 / 128) ** 0.5,  # to rows of 128 what the recipe's .02 is to its shortest of 640
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ).save_pretrained(folder / "model")


def run(folder, spec, seed):
    """Train and measure, in a process of its own."""
    torch.set_num_threads(1)
    settings = Settings(
        preset=None,
        model=str(folder / "model/config.json"),
        weights=spec,
        activations=spec,
        data=str(folder / "text.jsonl"),
        tokenizer=f"train:{VOCABULARY}",
        tokens=STEPS * BATCH * LENGTH,
        seq_len=LENGTH,
        batch=BATCH,
        micro_batch=BATCH,
        lr=LR,
        seed=seed,
        log_every=32,
        save_every=128,
    )
    state = folder / f"{spec}-{seed}".replace(":", "-")
    try:
        trained = train(state, settings, resume=True)
    except Diverged as error:
        return {"diverged": str(error)}
    windows = evaluation_windows(load_corpus("wiki-sample", "test"), trained.tokenizer, LENGTH)
    found = {"perplexity": perplexity(trained.model, windows).perplexity, "loss": trained.run.loss}
    if spec != "none":
        found["entropy"] = trained.run.entropy
    shutil.rmtree(state)
    return found | {"tokens": trained.run.tokens, "seconds": trained.run.seconds}


def run_apart(folder, spec, seed):
    command = [sys.executable, __file__, "--run", spec, "--seed", str(seed), "--work", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(answer.stdout.splitlines()[-1])


def measure(folder, results_file, wanted, seed, jobs):
    """Fill in what the results file lacks, {"conditions": …, "seeds": {seed: {run: result}}}, some runs at a time."""
    results: dict = (
        json.loads(results_file.read_text()) if results_file.exists() else {"conditions": CONDITIONS, "seeds": {}}
    )
    if results["conditions"] != CONDITIONS:
        raise SystemExit(f"{results_file} was measured with {results['conditions']}; move it away to measure anew")
    of_seed = results["seeds"].setdefault(str(seed), {})
    lock = Lock()

    def one(spec):
        note(f"training {spec}, seed {seed}")
        found = run_apart(folder, spec, seed)
        note(f"{spec}, seed {seed}: {found}")
        with lock:
            of_seed[spec] = found
            results_file.parent.mkdir(parents=True, exist_ok=True)
            results_file.write_text(json.dumps(results, indent=2) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [spec for spec in wanted if spec not in of_seed]))
    return results["seeds"]


def cell(found, spec):
    """Entropy of the weights' codes / perplexity, as the paper's tables have it."""
    if spec not in found:
        return ""
    result = found[spec]
    return "diverged" if "diverged" in result else f"{result['entropy']:.2f}/{result['perplexity']:.1f}"


def table(found):
    """Markdown."""
    methods = [method for method in (*COMPARED, *OTHERS) if any(f"{method}:{b}" in found for b in (1, 2, 3, 4))]
    lines = ["| bits | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for width in (4, 3, 2, 1):
        lines.append(f"| {width} | " + " | ".join(cell(found, f"{m}:{width}") or "–" for m in methods) + " |")
    ablations = [f"{name} {cell(found, f'{name}:2')}" for name in ABLATIONS if f"{name}:2" in found]
    plain = found.get("none", {}).get("perplexity")
    return "\n".join([*lines, "", f"none: {plain:.1f}" if plain else "", *ablations])


def draw(found, path):
    """Perplexity over bits, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for method in (*COMPARED, *OTHERS):
        points = [(b, found.get(f"{method}:{b}", {}).get("perplexity")) for b in (1, 2, 3, 4)]
        points = [point for point in points if point[1]]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=method, linewidth=2.5 if method == "bbq" else 1)
    if "none" in found:
        axis.axhline(found["none"]["perplexity"], color="#7f8c8d", linestyle="--", label="not quantized")
    axis.set(xlabel="bits of weights and activations", ylabel="perplexity", yscale="log", xticks=(1, 2, 3, 4))
    for numbers in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        numbers("{x:.0f}")
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def rows_of(found, seed):
    """The bars, for what is there."""
    worst = {spec: result.get("perplexity", float("inf")) for spec, result in found.items()}
    rows = []
    for better, worse in (("bbq", "quest"), ("quest", "lsq")):
        for width in (1, 2, 3, 4):
            a, b = worst.get(f"{better}:{width}"), worst.get(f"{worse}:{width}")
            if a and b and a < float("inf"):
                rows.append(row(f"seed {seed}: {better}:{width} / {worse}:{width}", a / b, 1, at_most=True))
    for width, least in ENTROPIES.items():
        if f"bbq:{width}" in found:
            rows.append(row(f"seed {seed}: entropy of bbq:{width}", found[f"bbq:{width}"]["entropy"], least))
    for name in ABLATIONS:
        if "bbq:2" in worst and f"{name}:2" in worst:
            rows.append(row(f"seed {seed}: {name}:2 / bbq:2", worst[f"{name}:2"] / worst["bbq:2"], 1))
    return rows


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--results", type=Path, default=Path("benchmarks/results/qat.json"))
    arguments.add_argument("--figure", type=Path, default=Path("docs/figures/qat.png"))
    arguments.add_argument("--work", type=Path, default=cache_dir() / "qat", help="text and the state of runs")
    arguments.add_argument("--jobs", type=int, default=2, help="runs beside one another, one thread each")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", help="runs, as bbq:2,quest:2; otherwise all")
    arguments.add_argument("--run", help="one run in this process; its result as JSON")
    arguments = arguments.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.work, arguments.run, arguments.seed)))
        return
    prepare_folder(arguments.work)
    wanted = arguments.only.split(",") if arguments.only else RUNS
    results = measure(arguments.work, arguments.results, wanted, arguments.seed, arguments.jobs)
    for seed, found in results.items():
        note(f"seed {seed}\n{table(found)}")
    draw(results["0"], arguments.figure)
    show([line for seed, found in results.items() for line in rows_of(found, seed)], arguments.json)


if __name__ == "__main__":
    main()
