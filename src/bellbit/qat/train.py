"""Pre-training on the Hugging Face Trainer: the parameter groups, schedule and metrics of BBQ's recipe."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from bellbit.data import load_corpus
from bellbit.errors import BellbitError
from bellbit.loading import first_line, load_config, locate, quiet
from bellbit.packed.linear import packed_linears
from bellbit.packed.save import check_output, quantization_config, round_unquantized, save_checkpoint
from bellbit.qat.layers import QuantLinear, convert, pack, prepare
from bellbit.qat.presets import preset as find_preset
from bellbit.qat.text import make_tokenizer, packed_sequences

WARM_UP, START, END = 0.1, 0.01, 0.1  # share of steps; learning rate at the first and the last step, of the largest
MAY_CHANGE = ("log_every", "save_every", "report_to")  # between a run and its resumption


@dataclass(frozen=True)
class Settings:
    """A run; what is None comes from the preset.

    preset, model: the architecture, by name or as a transformers config.json. tokens: seen in all. batch: sequences a
    step, over all processes; micro_batch: of them at a time in one process. report_to: trackers of transformers.
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
    micro_batch: int = 16
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
class Result:
    """What a run came to. loss: of the last step logged. entropy: mean bits of the weights' codes."""

    out: Path
    steps: int
    tokens: int
    loss: float
    seconds: float
    bits_per_weight: float
    entropy: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def pretrain(
    out: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[float], None] = lambda share: None,
) -> Result:
    """Train a model from its first step and save it packed as `out`; its training state lies beside, in `out`.training.

    resume: go on from there. report: told the share of steps done.
    Raises BellbitError for settings that are not possible or differ from those of the run to resume, too little text,
    or a loss that is no number.
    """
    quiet()
    import transformers

    settings = _resolve(settings)
    target = check_output(out, overwrite, "")
    state = target.with_name(target.name + ".training")
    assert settings.seq_len and settings.batch and settings.tokens
    steps = max(1, settings.tokens // (settings.batch * settings.seq_len))
    with _processes().main_process_first():  # the others read what it has written
        _keep_settings(state, settings, resume or not _processes().is_main_process)
        corpus = load_corpus(settings.data, "train")
        tokenizer = _tokenizer(state, settings, corpus)
        data = packed_sequences(corpus, tokenizer, settings.seq_len, settings.batch, state / "text")
    transformers.set_seed(settings.seed)
    model = _model(settings, tokenizer)
    prepare(model, settings.weights, settings.activations)
    trainer = _trainer(model, data, settings, state, steps, report)
    start = time.perf_counter()
    last = _last_checkpoint(state) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    measured = _measures(model)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model).cpu().float().eval()
        round_unquantized(model, {name for name, module in model.named_modules() if isinstance(module, QuantLinear)})
        convert(model)
        config = quantization_config(model, settings.weights, "token", 16, {"pretraining": asdict(settings)})
        save_checkpoint(model, tokenizer, config, target, overwrite, data[0]["input_ids"].long())
    bits = [layer.packed.bits_per_weight for layer in packed_linears(model).values()]
    return Result(
        target,
        steps,
        steps * settings.batch * settings.seq_len,
        losses[-1] if losses else math.nan,
        seconds,
        sum(bits) / max(len(bits), 1),
        measured.get("code_entropy", math.nan),
    )


def _resolve(settings: Settings) -> Settings:
    """Fill in from the preset, and check what can be checked before anything is read."""
    if (settings.preset is None) == (settings.model is None):
        raise BellbitError("give either --preset or --model")
    for spec in (settings.weights, settings.activations):
        if spec.partition(":")[0] == "nf" or (spec == "none") != (settings.weights == "none"):
            raise BellbitError(
                f"weights {settings.weights} with activations {settings.activations} cannot be saved packed; "
                "bellbit.qat.prepare trains them in Python"
            )
    found: dict[str, Any] = {"seq_len": 512, "batch": 512, "lr": 1e-3, "tokens": None, "tokenizer": "train:4096"}
    if settings.preset is not None:
        chosen = find_preset(settings.preset)
        found |= {name: getattr(chosen, name) for name in ("seq_len", "batch", "lr", "tokens")}
        if chosen.rows is not None:
            found["tokenizer"] = "meta-llama/Llama-2-7b-hf"
    values = {name: value for name, value in asdict(settings).items() if value is not None}
    resolved = Settings(**{"preset": None, **found, **values})
    for name in ("tokens", "seq_len", "batch", "micro_batch", "lr", "log_every", "save_every"):
        value = getattr(resolved, name)
        if value is None or value <= 0:
            raise BellbitError(f"--{name.replace('_', '-')} {value} is not possible; give a positive number")
    world = _processes().num_processes
    if resolved.batch % (resolved.micro_batch * world):
        raise BellbitError(
            f"--batch {resolved.batch} is no multiple of --micro-batch {resolved.micro_batch} × {world} process(es)"
        )
    return resolved


def _keep_settings(state: Path, settings: Settings, resume: bool) -> None:
    """Write the settings beside the training state, or compare them with those of the run to resume."""
    file = state / "settings.json"
    if resume and file.exists():
        before = json.loads(file.read_text())
        now = asdict(settings)
        for name in now:
            if name not in MAY_CHANGE and before.get(name) != now[name]:
                raise BellbitError(
                    f"--resume: {name} was {before.get(name)!r} in {state} and is {now[name]!r} now; give the same, or "
                    "start again without --resume"
                )
        return
    if state.exists() and not resume and any(state.glob("checkpoint-*")):
        raise BellbitError(f"{state} holds a run already: --resume goes on with it; remove it to start again")
    state.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(settings), indent=2) + "\n")


def _tokenizer(state: Path, settings: Settings, corpus: Any) -> Any:
    """That of the run if there is one already: learning it again could give another."""
    from transformers import AutoTokenizer

    folder = state / "tokenizer"
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = make_tokenizer(settings.tokenizer or "", corpus)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _model(settings: Settings, tokenizer: Any) -> Any:
    """Random weights: normal, σ = .02, and .02/√(2·layers) where a block adds to the residual stream."""
    from transformers import AutoModelForCausalLM

    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if settings.preset is not None:
        config = find_preset(settings.preset).config(len(tokenizer), specials)
    else:
        config = load_config(locate(str(Path(str(settings.model)).parent)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")):
                module.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the weights of linears alone: not the head, embeddings, norms, or what quantizers learn."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def one_cycle(step: int, steps: int) -> float:
    """Share of the largest learning rate: half a cosine up from 1/100, another down to 1/10."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        low, share = START, step / rise
        return low + (1 - low) * (1 - math.cos(math.pi * share)) / 2
    share = min(1.0, (step - rise) / max(1, steps - rise))
    return END + (1 - END) * (1 + math.cos(math.pi * share)) / 2


def _trainer(
    model: Any, data: Any, settings: Settings, state: Path, steps: int, report: Callable[[float], None]
) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Reporting(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, training: Any, control: Any, **_: Any) -> None:
            report(training.global_step / steps)

    class Checked(Trainer):  # type: ignore[misc]
        def training_step(self, network: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
            loss: Tensor = super().training_step(network, inputs, *rest, **named)
            if not bool(loss.isfinite()):
                raise BellbitError(
                    f"the loss is {float(loss)} after step {self.state.global_step}, first in {_culprit(network)}; the "
                    f"last checkpoint in {state} is whole. A smaller --lr may help"
                )
            return loss

        optimizer: Any
        lr_scheduler: Any

        def create_optimizer(self, *_: Any) -> Any:
            if self.optimizer is None:
                groups = parameter_groups(self.model, settings.weight_decay)
                self.optimizer = torch.optim.AdamW(groups, lr=settings.lr or 0, betas=(0.9, 0.95))
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer or self.optimizer, lambda step: one_cycle(step, num_training_steps)
                )
            return self.lr_scheduler

        def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
            super().log(logs | (_measures(model) if "loss" in logs else {}), *rest, **named)

    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=_accumulation(settings),
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        torch_compile=settings.compile,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to=settings.report_to,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_drop_last=True,
        disable_tqdm=True,
        ddp_broadcast_buffers=False,
        use_cpu=not torch.cuda.is_available(),
    )

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([row["input_ids"] for row in rows]).long()
        return {"input_ids": tokens, "labels": tokens}

    trainer = Checked(model, arguments, collate, data, callbacks=[Reporting()])
    trainer.remove_callback(PrinterCallback)
    return trainer


def _processes() -> Any:
    """accelerate's view of the processes that torchrun has started; gloo joins them where there is no GPU."""
    return PartialState(cpu=not torch.cuda.is_available())


def _accumulation(settings: Settings) -> int:
    """Micro-batches that one process sees per step."""
    return (settings.batch or 0) // (settings.micro_batch * _processes().num_processes)


def _last_checkpoint(state: Path) -> Path | None:
    """The newest one that is whole: its state file is written last."""
    for folder in sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return folder
        except (OSError, ValueError):
            continue
    return None


@torch.no_grad()
def _measures(model: nn.Module) -> dict[str, float]:
    """Entropy of the weights' codes in bits, and mean γ of weights and inputs: what tells whether training is sound."""
    entropies, gammas = [], {"weight": [], "input": []}  # type: ignore[var-annotated]
    for layer in (module for module in model.modules() if isinstance(module, QuantLinear)):
        if isinstance(layer.weight_quantizer, nn.Identity):
            continue
        counts = pack(layer).level_counts().double()
        shares = counts[counts > 0] / counts.sum()
        entropies.append(float(-(shares * shares.log2()).sum()))
        for side in gammas:
            gamma = getattr(getattr(layer, f"{side}_quantizer"), "gamma", None)
            if gamma is not None:
                gammas[side].append(float(gamma.mean()))
    found = {"code_entropy": entropies, **{f"gamma_{side}": values for side, values in gammas.items()}}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _culprit(network: nn.Module) -> str:
    """The first parameter that is not finite, or whose gradient is not."""
    for what in ("", "the gradient of "):
        for name, parameter in network.named_parameters():
            values = parameter.grad if what else parameter
            if values is not None and not bool(values.isfinite().all()):
                return what + name
    return "the loss itself"


def count(text: str) -> int:
    """A number of tokens, as 2000000, 2M or 3B. Raises BellbitError for anything else."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    try:
        return round(float(text if factor == 1 else text[:-1]) * factor)
    except ValueError:
        raise BellbitError(f"--tokens {text!r} is no number; give 2000000, 2M or 3B") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Fields of `Settings` from a YAML file. Raises BellbitError for a field that there is not."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise BellbitError(f"cannot read the recipe {path}: {first_line(error)}") from None
    known = [field.name for field in fields(Settings)]
    if not isinstance(found, dict) or (strange := sorted(set(found) - set(known))):
        what = f"there is no {strange[0]!r}" if isinstance(found, dict) else "it is no table of fields"
        raise BellbitError(f"the recipe {path} does not fit: {what}; fields are {', '.join(known)}")
    return found
