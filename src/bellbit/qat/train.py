"""Pre-training on the Hugging Face Trainer: the parameter groups, schedule and metrics of BBQ's recipe."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bellbit.errors import BellbitError
from bellbit.loading import check_length, quiet
from bellbit.packed.linear import packed_linears
from bellbit.packed.save import check_output, quantization_config, round_unquantized, save_checkpoint
from bellbit.packed.tensor import mean_over_weights
from bellbit.processes import processes
from bellbit.ptq.run import Progress
from bellbit.qat.layers import QuantLinear, code_entropy, convert, prepare
from bellbit.qat.presets import preset as find_preset
from bellbit.qat.settings import Resolved, Settings, check_tracker, keep, resolve
from bellbit.qat.text import text_of_run

WARM_UP, START, END = 0.1, 0.01, 0.1  # share of steps; learning rate at the first and the last step, of the largest


class Diverged(BellbitError):
    """Training, of this model with these settings, led to numbers that are not finite."""


@dataclass(frozen=True)
class Run:
    """A training run in numbers. tokens: seen in all. loss: of the last step logged. entropy: mean bits of the weights'
    codes. passes: how often each sequence of the text was seen.
    """

    steps: int
    tokens: int
    loss: float
    seconds: float
    entropy: float
    passes: float


@dataclass(frozen=True)
class Trained:
    """A model at its last step. probe: a sequence of its text, token numbers (seq_len,)."""

    model: Any
    tokenizer: Any
    probe: Tensor
    settings: Resolved
    run: Run


@dataclass(frozen=True)
class Result(Run):
    """What `pretrain` came to.

    bits_per_weight: stored, of the quantized weights; only the first process, which wrote them, knows it.
    """

    out: Path
    bits_per_weight: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def pretrain(
    out: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Progress = lambda share, text: None,
) -> Result:
    """Train a model from its first step and save it packed as `out`; its training state lies beside, in `out`.training.

    resume: go on from there. report: told the share of steps done, and what is going on.
    Raises BellbitError for settings that are not possible or differ from those of the run to resume, too little text,
    or a loss that is no number.
    """
    target = check_output(out, overwrite, "")
    trained = train(target.with_name(target.name + ".training"), settings, resume=resume, report=report)
    bits = 16.0
    if processes().is_main_process:
        model = trained.model
        if strange := _not_finite(model, {"input_ids": trained.probe[None]}):
            raise Diverged(f"after the last step {strange} is not finite; nothing was written. A smaller --lr may help")
        round_unquantized(model, {name for name, module in model.named_modules() if isinstance(module, QuantLinear)})
        config = None
        if (settings.weights, settings.activations) != ("none", "none"):
            weights = [layer.packed for layer in packed_linears(convert(model)).values()]
            bits = mean_over_weights(weights, lambda packed: packed.bits_per_weight)
            provenance = {"pretraining": asdict(trained.settings)}
            config = quantization_config(model, settings.weights, "token", 16, provenance)
        save_checkpoint(model, trained.tokenizer, config, target, overwrite, trained.probe)
    return Result(**asdict(trained.run), out=target, bits_per_weight=bits)


def train(
    state: Path, settings: Settings, *, resume: bool = False, report: Progress = lambda share, text: None
) -> Trained:
    """The training alone, its state in the folder `state`; arguments and errors as of `pretrain`."""
    quiet()
    import transformers

    chosen = resolve(settings)
    steps = max(1, chosen.tokens // (chosen.batch * chosen.seq_len))
    with processes().main_process_first():  # the others read what it has written
        keep(state, chosen, resume or not processes().is_main_process)
        tokenizer, data = text_of_run(state, chosen)
    data = data.select(range(len(data) // chosen.batch * chosen.batch))  # a pass is whole steps
    transformers.set_seed(chosen.seed)
    model = _model(chosen, tokenizer)
    trainer = _trainer(model, data, chosen, state, steps, report)
    if trainer.is_fsdp_enabled:
        with torch.no_grad():
            # FSDP would forget the quantizers' first values
            model.to(trainer.args.device)(**next(iter(trainer.get_train_dataloader())))
    start = time.perf_counter()
    last = _last_checkpoint(state) if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    seconds = time.perf_counter() - start
    measures = _measures(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    run = Run(
        steps=steps,
        tokens=steps * chosen.batch * chosen.seq_len,
        loss=losses[-1] if losses else math.nan,
        seconds=seconds,
        entropy=measures.get("code_entropy", math.nan),
        passes=steps * chosen.batch / len(data),
    )
    return Trained(_gathered(trainer, chosen, tokenizer), tokenizer, data[0]["input_ids"].long(), chosen, run)


def _gathered(trainer: Any, settings: Resolved, tokenizer: Any) -> Any:
    """The trained model in float32 and in evaluation mode, on the CPU, whole in the first process."""
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).cpu().float().eval()
    values = trainer.accelerator.get_state_dict(trainer.model)
    model = _model(settings, tokenizer)
    if processes().is_main_process:
        model.load_state_dict(values)
    return model.eval()


def _model(settings: Resolved, tokenizer: Any) -> Any:
    """Random weights: normal, σ = .02, and .02/√(2·layers) where a block adds to the residual stream; quantizers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if settings.preset is not None:
        config = find_preset(settings.preset).config(len(tokenizer), settings.seq_len, specials)
    else:
        config = AutoConfig.from_pretrained(str(settings.model))
        check_length(config, settings.seq_len)
    if len(tokenizer) > config.vocab_size:
        raise BellbitError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size} rows for them"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")):
                module.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
            if isinstance(module, nn.LayerNorm) and settings.preset is not None:
                module.bias.requires_grad_(False)  # GPT's norms have none: it stays zero in OPT's
    if (settings.weights, settings.activations) != ("none", "none"):
        prepare(model, settings.weights, settings.activations)
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


def _trainer(model: Any, data: Any, settings: Resolved, state: Path, steps: int, report: Progress) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Reporting(TrainerCallback):  # type: ignore[misc]
        text = "training"

        def on_log(self, args: Any, training: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            self.text = f"training, loss {logs['loss']:.3f}" if "loss" in logs else self.text

        def on_step_end(self, args: Any, training: Any, control: Any, **_: Any) -> None:
            report(training.global_step / steps, self.text)

    class Checked(Trainer):  # type: ignore[misc]
        def training_step(self, network: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
            """Stops before a step that would ruin the weights, so that no checkpoint holds them ruined."""
            loss: Tensor = super().training_step(network, inputs, *rest, **named)
            whole = loss.isfinite() & (not self.accelerator.sync_gradients or _gradients_finite(network))
            if not bool(whole):
                where = _not_finite(network, inputs) or _not_finite_gradient(network)
                raise Diverged(
                    f"training diverged after step {self.state.global_step}: the loss is {float(loss)}, and {where} is "
                    f"not finite; the last checkpoint in {state} is whole. A smaller --lr may help"
                )
            return loss

        optimizer: Any
        lr_scheduler: Any

        def create_optimizer(self, *_: Any) -> Any:
            if self.optimizer is None:
                groups = parameter_groups(self.model, settings.weight_decay)
                self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer or self.optimizer, lambda step: one_cycle(step, num_training_steps)
                )
            return self.lr_scheduler

        def log(self, logs: dict[str, float], *rest: Any, **named: Any) -> None:
            super().log(logs | (_measures(model) if "loss" in logs else {}), *rest, **named)

    check_tracker(settings.report_to)
    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // (settings.micro_batch * processes().num_processes),
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        torch_compile=settings.compile,
        logging_steps=min(settings.log_every, steps),
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

    # one process drives one device, however many there are: DataParallel would throw away what quantizers learn first
    arguments._n_gpu = min(1, arguments.n_gpu)

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([row["input_ids"] for row in rows]).long()
        return {"input_ids": tokens, "labels": tokens}

    trainer = Checked(model, arguments, collate, data, callbacks=[Reporting()])
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_checkpoint(state: Path) -> Path | None:
    """The newest one that is whole: its state file is written last."""
    for folder in sorted(state.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return folder
        except (OSError, ValueError):
            continue
    return None


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Whole parameters for a while, where FSDP has cut them."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    yield
    for module in sharded:
        module.reshard()


@torch.no_grad()
def _measures(model: nn.Module) -> dict[str, float]:
    """Entropy of the weights' codes in bits, and mean γ of weights and inputs: what tells whether training is sound."""
    entropies, gammas = [], {"weight": [], "input": []}  # type: ignore[var-annotated]
    with _unsharded(model):
        for layer in (module for module in model.modules() if isinstance(module, QuantLinear)):
            if not math.isnan(entropy := code_entropy(layer)):
                entropies.append(entropy)
            for side in gammas:
                gamma = getattr(getattr(layer, f"{side}_quantizer"), "gamma", None)
                if gamma is not None:
                    gammas[side].append(float(gamma.mean()))
    found = {"code_entropy": entropies, **{f"gamma_{side}": values for side, values in gammas.items()}}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


@torch.no_grad()
def _not_finite(network: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """The first module, in the order of computation, whose output is not finite on these inputs; None if all are."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"what {name} gives")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        network(input_ids=inputs["input_ids"])
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _gradients_finite(network: nn.Module) -> bool:
    """Whether all gradients are; of a sharded model, the shards of this process."""
    gradients = [_local(p.grad) for p in network.parameters() if p.grad is not None]
    return bool(torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).isfinite().all())


def _not_finite_gradient(network: nn.Module) -> str:
    """The last that is not: gradients are computed from the end, and break from there to the beginning."""
    gradients = [(name, p.grad) for name, p in network.named_parameters() if p.grad is not None]
    broken = [name for name, gradient in gradients if not bool(_local(gradient).isfinite().all())]
    return f"the gradient of {broken[-1]}" if broken else "the loss"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
