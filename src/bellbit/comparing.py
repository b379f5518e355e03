"""The map of methods: true bits, perplexity, nearness to full precision, time and memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import quote

from torch import Tensor

from bellbit.agreement import Agreement, logits_of_original
from bellbit.data import evaluation_windows, load_corpus
from bellbit.errors import BellbitError
from bellbit.evaluate import perplexity
from bellbit.files import write_text
from bellbit.inspection import inspect
from bellbit.loading import cpu_name, load_config, load_model, load_tokenizer, locate, window_length
from bellbit.memory import peak_memory
from bellbit.ptq.distill import teacher_states
from bellbit.ptq.effort import efforts, own_windows
from bellbit.ptq.methods import METHODS, Settings
from bellbit.ptq.quantize import log_file, partial_run, quantize
from bellbit.ptq.resume import Saved
from bellbit.ptq.run import Progress

NONE = "none"  # the model as it is
ROWS = "compare.rows"  # folder of checkpoints that are being made or measured, and of what a row says of those made
ORIGINAL = "compare.original"  # folder of what the model as it is gives, until all rows are measured
SEED = "seed"  # option of a row whose seed is not the request's
QUANTIZED = 0.95  # of a row's time, if it trains; only the progress bar depends on it
FILE = "file:"  # and a path: a checkpoint or .gguf file that is there already
DEFAULT = (
    NONE,
    "sign",
    "rtn:bits=2",
    "gptq:bits=2",
    "gptq:bits=2:block_size=64",
    "gptq:bits=3",
    "gptq:bits=3:block_size=64",
    "gptq:bits=4",
    "gptq:bits=4:block_size=64",
    "billm",
    "pb-llm",
    "arb",
    "arb-x",
    "arb-rc",
    "arb-rc:bitmap=no",
    "dbellquant",
    "bellbit",
    "bellbit:bpw=1.14",
    "bellbit:bpw=2.07",
    "bellbit:bpw=2.4",
    "bellbit:bpw=2.95",
)


@dataclass(frozen=True)
class Request:
    """What every row of a comparison shares. data: what perplexity is measured on, several as a,b.

    seq_len: of the windows, to calibrate and to measure. windows: at most so many to measure on.
    """

    model: str
    data: str
    seq_len: int | None
    windows: int | None
    calib: str
    samples: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One method. perplexity, divergence (mean KL from full precision, nats) and same_top (share of positions with the
    same likeliest token) are by text.

    seconds, peak_bytes: of quantization, all included but the seconds of text that an earlier run left in the cache;
    None for the model as it is, and the memory of a row that was cut off and went on. machine: its CPU. epochs: of each
    rung that trains, if any do.
    """

    spec: str
    bits_per_weight: float
    perplexity: dict[str, float]
    divergence: dict[str, float]
    same_top: dict[str, float]
    seconds: float | None
    peak_bytes: int | None
    machine: str | None = None
    epochs: dict[str, int] | None = None


def texts(data: str) -> list[str]:
    """What a comparison measures on, one by one."""
    return [data] if Path(data).is_file() else [text.strip() for text in data.split(",")]


def parse(spec: str) -> tuple[str, dict[str, Any], int | None]:
    """Method, its settings, and a seed if one is said, of `METHOD:option=value:…`, as `quantize` has them.

    A file has neither settings nor seed.

    Raises BellbitError for a method, option, value or file that there is not.
    """
    if spec.startswith(FILE):
        locate(spec.removeprefix(FILE))
        return spec, {}, None
    method, *pairs = spec.split(":")
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(Settings)} | {SEED: int}
    options: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        name = name.replace("-", "_")
        kind = kinds.get(name)
        if kind is None or name == "method":
            raise BellbitError(f"--methods {spec}: there is no option {name!r}; there are {', '.join(list(kinds)[1:])}")
        try:
            if kind is bool:
                options[name] = {"yes": True, "no": False, "true": True, "false": False}[value.lower()]
            else:
                options[name] = tuple(value.split("+")) if kind is tuple else kind(value)
        except (ValueError, KeyError):
            raise BellbitError(f"--methods {spec}: {value!r} is no value for {name}") from None
    seed = options.pop(SEED, None)
    if method != NONE:
        Settings(method, **options)
    return method, options, seed


def with_seeds(specs: Iterable[str], seeds: Sequence[int]) -> list[str]:
    """Every method once for each seed, the first of which is the request's own; those that calibrate nothing, and those
    that name a seed, once. No row twice.
    """
    asked = []
    for spec in specs:
        name, _, seed = parse(spec)
        more = seeds[1:] if seed is None and name in METHODS and METHODS[name].calibrates else ()
        asked += [_seedless(spec) if seed == seeds[0] else spec, *(f"{spec}:{SEED}={seed}" for seed in more)]
    return list(dict.fromkeys(asked))


def _seedless(spec: str) -> str:
    return re.sub(rf":{SEED}=-?\d+", "", spec)


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that differ in their seed alone together, by what they have in common."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_seedless(row.spec), []).append(row)
    return found


def most_own(specs: Iterable[str], samples: int) -> int:
    """Windows that the model writes itself beside `samples` of calibration text, in the row that takes most of them."""
    parsed = [parse(spec) for spec in specs]
    settings = [Settings(name, **options) for name, options, _ in parsed if name in METHODS]
    return max((own_windows(each, samples) for each in settings), default=0)


def compare(request: Request, specs: Iterable[str], out: Path, progress: Callable[[float, str], None]) -> list[Row]:
    """Measure what `out`/compare.json lacks, row by row, and return all rows asked for; a row cut off goes on.

    Raises BellbitError if that file is of another request, a text to measure on is not there, or a row fails.
    """
    wanted = list(specs)
    for spec in wanted:
        parse(spec)
    file = out / "compare.json"
    known = json.loads(file.read_text()) if file.exists() else {"request": asdict(request), "rows": {}}
    if known["request"] != asdict(request):
        raise BellbitError(f"{file} is of another comparison: {known['request']}; give another OUT, or remove it")
    if not known["rows"].keys() >= set(wanted):
        _evaluation_windows(request)  # now, and not when the first checkpoint is made
    out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        for folder in (ORIGINAL, ROWS):  # they may be of another request
            shutil.rmtree(out / folder, ignore_errors=True)
        write_text(file, json.dumps(known, indent=2) + "\n")
    for done, spec in enumerate(wanted):
        progress(done / len(wanted), spec)
        if spec not in known["rows"]:

            def report(share: float, text: str, done: int = done, spec: str = spec) -> None:
                progress((done + share) / len(wanted), f"{spec}: {text}")

            known["rows"][spec] = asdict(_measure_apart(request, spec, out, report))
            write_text(file, json.dumps(known, indent=2) + "\n")
    shutil.rmtree(out / ORIGINAL, ignore_errors=True)
    return [Row(**known["rows"][spec]) for spec in wanted]


def _measure_apart(request: Request, spec: str, out: Path, progress: Progress) -> Row:
    """In a process of its own, so that its peak of memory is this row's alone."""
    told = json.dumps({"request": asdict(request), "spec": spec, "out": str(out)})
    command = [sys.executable, "-m", "bellbit.comparing", told]
    row: Row | None = None
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if isinstance(said, dict):
                    row = Row(**said)
                else:
                    progress(*said)
        if process.returncode == 0 and row is not None:
            return row
        errors.seek(0)
        reason = (errors.read().strip().splitlines() or ["no output"])[-1]
        raise BellbitError(f"{spec}: {reason}")


def measure(request: Request, spec: str, out: Path, progress: Progress = lambda share, text: None) -> Row:
    """One row, here and now. out: an existing folder; the checkpoint is there until it is measured."""
    method, *_ = parse(spec)
    location = result = locate(request.model)
    checkpoint = out / ROWS / _file_name(spec)
    kept = Saved(out / ORIGINAL, resume=True)  # hidden states take a hundredth of the logits' size
    made: dict[str, Any] = {"bits_per_weight": 16.0, "seconds": None, "peak_bytes": None, "epochs": None}
    if spec.startswith(FILE):
        result = locate(spec.removeprefix(FILE))
        made["bits_per_weight"] = inspect(result).linears.bits_per_weight
    elif method != NONE:
        made = _make(request, spec, checkpoint, lambda share, text: progress(QUANTIZED * share, text))
        result = locate(str(checkpoint))
    original = load_model(location, "float32", load_config(location))
    model = original if result is location else load_model(result, "float32" if result.gguf else "auto")
    found: dict[str, Any] = {"perplexity": {}, "divergence": {}, "same_top": {}}
    for source, windows in _evaluation_windows(request).items():
        progress(QUANTIZED, f"measuring on {source}")
        if result is location:
            found["perplexity"][source] = perplexity(model, windows).perplexity
            found["divergence"][source], found["same_top"][source] = 0.0, 1.0
            continue
        states = kept.tensor(_file_name(source), partial(teacher_states, original, windows, bf16=False))
        nearness = Agreement(logits_of_original(original, windows, states))
        found["perplexity"][source] = perplexity(model, windows, watch=nearness.add).perplexity
        found["divergence"][source], found["same_top"][source] = nearness.divergence, nearness.same_top
    shutil.rmtree(checkpoint, ignore_errors=True)
    for file in (log_file(checkpoint), _made_file(checkpoint)):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or another row is unfinished
        checkpoint.parent.rmdir()
    return Row(spec, **made, **found, machine=cpu_name())


def _make(request: Request, spec: str, checkpoint: Path, progress: Progress) -> dict[str, Any]:
    """Quantize, and what a row says of that; not again what was made and could not be measured."""
    if (file := _made_file(checkpoint)).exists() and checkpoint.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    method, options, seed = parse(spec)
    cut_off = partial_run(checkpoint).exists()
    report = quantize(
        request.model,
        checkpoint,
        method,
        calib=request.calib,
        samples=request.samples,
        seq_len=request.seq_len,
        seed=request.seed if seed is None else seed,
        overwrite=True,
        resume=True,
        progress=progress,
        **options,
    )
    made = {
        "bits_per_weight": report.bits_per_weight,
        "seconds": report.seconds,
        "peak_bytes": None if cut_off else peak_memory(),
        "epochs": asdict(efforts(Settings(method, **options))) if METHODS[method].climbs else None,
    }
    write_text(file, json.dumps(made))
    return made


def _made_file(checkpoint: Path) -> Path:
    """Where what a row says of a checkpoint lies until it is measured."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


def _evaluation_windows(request: Request) -> dict[str, Tensor]:
    """Of each text to measure on: int64 (windows, length). Raises BellbitError if there is none."""
    location = locate(request.model)
    tokenizer, length = load_tokenizer(location), window_length(load_config(location), request.seq_len)
    return {
        source: evaluation_windows(load_corpus(source, "test"), tokenizer, length, request.windows)
        for source in texts(request.data)
    }


def _file_name(text: str) -> str:
    """That of no other text."""
    return quote(text, safe="=[]+,")


def _answer(told: str) -> None:
    """What `_measure_apart` asks of the other process: a line [share, text] now and again, and the row as the last."""
    asked = json.loads(told)
    request, spec, out = Request(**asked["request"]), asked["spec"], Path(asked["out"])
    with redirect_stdout(sys.stderr):  # libraries may write, too
        row = measure(request, spec, out, lambda *done: print(json.dumps(done), file=sys.__stdout__, flush=True))
    print(json.dumps(asdict(row)))


if __name__ == "__main__":
    try:
        _answer(sys.argv[1])
    except BellbitError as error:
        sys.exit(" ".join(str(error).split()))  # one line, see `_measure_apart`
