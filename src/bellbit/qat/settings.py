"""What a training run is told: its settings, where they come from, and what of them cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bellbit.errors import BellbitError, first_line
from bellbit.files import write_text
from bellbit.processes import processes
from bellbit.qat.presets import preset as find_preset
from bellbit.quantizers import parse

MAY_CHANGE = ("log_every", "save_every", "report_to")  # between a run and its resumption


@dataclass(frozen=True)
class Settings:
    """A run; what is None comes from the preset.

    preset, model: the architecture, by name or as a transformers config.json. tokens: seen in all. batch: sequences a
    step, over all processes; micro_batch: of them at a time in one process, at most 16 if None. report_to: a tracker of
    transformers.
    """

    preset: str | None = "llama-tiny"
    model: str | None = None
    weights: str = "bbq:2"
    activations: str = "bbq:2"
    data: str = "wiki-sample"
    tokenizer: str | None = None
    tokens: int | None = None
    seq_len: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    lr: float | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    log_every: int = 10
    save_every: int = 200
    report_to: str = "none"


@dataclass(frozen=True)
class Resolved(Settings):
    """Settings with no number left open."""

    tokens: int = 0
    seq_len: int = 0
    batch: int = 0
    micro_batch: int = 0
    lr: float = 0.0
    tokenizer: str = ""


def resolve(settings: Settings) -> Resolved:
    """Fill in from the preset, and check what can be checked before anything is read."""
    if (settings.preset is None) == (settings.model is None):
        raise BellbitError("give either --preset or --model")
    for spec in (settings.weights, settings.activations):
        parse(spec)
    found: dict[str, Any] = {"seq_len": 512, "batch": 512, "lr": 1e-3, "tokens": None, "tokenizer": "train:4096"}
    if settings.preset is not None:
        chosen = find_preset(settings.preset)
        found |= {name: getattr(chosen, name) for name in ("seq_len", "batch", "lr", "tokens")}
        if chosen.rows is not None:
            found["tokenizer"] = "meta-llama/Llama-2-7b-hf"
    world = processes().num_processes
    values = {name: value for name, value in asdict(settings).items() if value is not None}
    if "micro_batch" not in values:
        share = max(1, int(values.get("batch", found["batch"])) // world)
        found["micro_batch"] = max(size for size in range(1, 17) if share % size == 0)
    resolved = Resolved(**{"preset": None, **found, **values})
    for name in ("tokens", "seq_len", "batch", "micro_batch", "lr", "log_every", "save_every"):
        value = getattr(resolved, name)
        if value is None or value <= 0:
            raise BellbitError(f"--{name.replace('_', '-')} {value} is not possible; give a positive number")
    if resolved.batch % (resolved.micro_batch * world):
        raise BellbitError(
            f"--batch {resolved.batch} is no multiple of --micro-batch {resolved.micro_batch} × {world} process(es)"
        )
    return resolved


def keep(state: Path, settings: Settings, resume: bool) -> None:
    """Write the settings beside the training state, or compare them with those of the run to resume."""
    file = state / "settings.json"
    now = asdict(settings) | {"config": _config_of(settings)}
    if resume and file.exists():
        before = json.loads(file.read_text())
        for name in now:
            if name not in MAY_CHANGE and before.get(name) != now[name]:
                raise BellbitError(
                    f"--resume: {name} was {before.get(name)!r} in {state} and is {now[name]!r} now; give the same, or "
                    "start again without --resume"
                )
        return
    if state.exists() and not resume and any(state.glob("checkpoint-*")):
        raise BellbitError(f"{state} holds a run already: --resume goes on with it; remove it to start again")
    # perhaps of a run with other settings that did not come to its first checkpoint
    for stale in ("tokenizer", "text"):
        shutil.rmtree(state / stale, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(now, indent=2) + "\n")


def _config_of(settings: Settings) -> Any:
    """What the file given by --model says; None for a preset."""
    if settings.model is None:
        return None
    try:
        return json.loads(Path(settings.model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BellbitError(f"cannot read --model {settings.model}, a config.json: {first_line(error)}") from None


def check_tracker(name: str) -> None:
    """Raise BellbitError if transformers cannot report to `name` here."""
    from transformers.integrations import get_available_reporting_integrations

    known = ["none", *get_available_reporting_integrations()]
    if name not in known:
        raise BellbitError(f"--report-to {name} is unknown or not installed; here are {', '.join(known)}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Fields of `Settings` from a YAML file.

    Raises BellbitError for a field that there is not, or a value that does not fit it.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise BellbitError(f"cannot read the recipe {path}: {first_line(error)}") from None
    kinds = {field.name: str(field.type).split(" ")[0] for field in fields(Settings)}
    if not isinstance(found, dict) or (strange := sorted(set(found) - set(kinds))):
        what = f"there is no {strange[0]!r}" if isinstance(found, dict) else "it is no table of fields"
        raise BellbitError(f"the recipe {path} does not fit: {what}; fields are {', '.join(kinds)}")
    return {name: _of_kind(path, name, value, kinds[name]) for name, value in found.items()}


def _of_kind(path: Path, name: str, value: Any, kind: str) -> Any:
    """A recipe's value as `kind` says; YAML takes 1e-3 and 2M for text."""
    try:
        if name == "tokens" and value is not None:
            return count(str(value))
        if value is None or (kind in ("str", "bool") and type(value).__name__ == kind):
            return value
        if kind == "float" or (kind == "int" and type(value) is int):
            return float(value) if kind == "float" else value
    except (TypeError, ValueError):
        pass
    raise BellbitError(f"the recipe {path} does not fit: {name} is {value!r}, not of the kind {kind}")


def count(text: str) -> int:
    """A number of tokens, as 2000000, 2M or 3B. Raises BellbitError for anything else."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    try:
        return round(float(text if factor == 1 else text[:-1]) * factor)
    except ValueError:
        raise BellbitError(f"--tokens {text!r} is no number; give 2000000, 2M or 3B") from None
