"""How results look on a terminal: tables, sizes, and a progress bar with the time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, stdev

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bellbit.comparing import Row as Compared
from bellbit.comparing import by_method
from bellbit.demo import Demo
from bellbit.inspection import Inspection, Row
from bellbit.packed.gguf_export import Exported
from bellbit.planning import Plan

BIT_PARTS = ("signs", "bitmap", "codes", "scales")


def size(nbytes: float) -> str:
    """Bytes for people: 1.5 MB."""
    power = min(int(math.log10(max(nbytes, 1)) // 3), 4)
    return f"{nbytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def perplexity_text(value: float) -> str:
    """Two decimals while they mean something, else whole numbers with separators."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[float, str], None]]:
    """A bar on `console` with elapsed and remaining time; yields the function that moves it (share, text)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # the estimate looks at the last five minutes: blocks are alike, the first seconds are not
    with Progress(*columns, console=console, speed_estimate_period=300, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, text: progress.update(task, completed=share, description=text)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table whose first `left` columns are words and whose others are numbers."""
    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        result.add_column(name, justify="left" if i < left else "right", overflow="fold", no_wrap=i > 0)
    for row in rows:
        result.add_row(*row)
    return result


def inspection_table(inspection: Inspection) -> Table:
    """Every tensor and the totals of a model."""
    parts = [part for part in BIT_PARTS if any(part in row.bits for row in inspection.rows)]

    def cells(row: Row, name: str) -> list[str]:
        shape = "×".join(map(str, row.shape)) if row.name != row.kind else f"{row.count / 1e6:.2f} M"
        bits = [f"{row.bits[part]:.4g}" if part in row.bits and row.kind == "quantized" else "" for part in parts]
        return [name, row.layout, shape, *bits, f"{row.bits_per_weight:.4g}", f"{row.nominal:.4g}", size(row.nbytes)]

    header = ["tensor", "layout", "shape", *parts, "stored", "nominal", "on disk"]
    rows = [cells(row, row.name) for row in inspection.rows]
    result = table(f"{inspection.model}: bits per weight (nominal: as papers count)", header, rows, left=3)
    result.add_section()
    for total in inspection.totals:
        result.add_row(*cells(total, f"all {total.kind}" if total.kind != "total" else "everything"), style="bold")
    return result


def plan_table(plan: Plan) -> Table:
    """What a quantization will take."""
    where = "all at once" if plan.whole else "one block at a time"
    both = "" if plan.device == "cpu" else f", here and on {plan.device}"
    rows = [
        ["weights to quantize", f"{plan.weights / 1e6:,.0f} M in {plan.blocks} blocks, in memory {where}"],
        ["others, in 16 bits", f"{plan.rest / 1e6:,.0f} M"],
        [f"memory at most, about{both}", size(sum(plan.memory.values()))],
        *([f"  {what}", size(value)] for what, value in plan.memory.items() if value),
        ["time here, about", duration(sum(plan.seconds.values()))],
        *([f"  {what}", duration(value)] for what, value in plan.seconds.items()),
        ["bits per weight, about", f"{plan.bits_per_weight:.3f}"],
        ["checkpoint, about", size(plan.output_bytes)],
    ]
    return table(f"{plan.model}, {plan.method}: what it will take", ["", ""], rows)


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 5 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def demo_table(demo: Demo) -> Table:
    """Before and after: perplexity, stored bits, file sizes."""
    source, result = demo.source.total(), demo.result.total()
    rows = [
        ["16-bit (size computed)", perplexity_text(demo.before.perplexity), "16", "16", size(2 * result.count)],
        [
            "as shipped, 4-bit GGUF",
            "the same",
            f"{demo.source.total('other').bits_per_weight:.3f}",
            f"{source.bits_per_weight:.2f}",
            size(demo.source.file_bytes),
        ],
        [
            "bellbit, packed",
            perplexity_text(demo.after.perplexity),
            f"{demo.result.total('quantized').bits_per_weight:.3f}",
            f"{result.bits_per_weight:.2f}",
            size(demo.result.file_bytes),
        ],
    ]
    header = ["", "perplexity", "bits/weight of linears", "of everything", "file"]
    return table("SmolLM2-135M-Instruct before and after", header, rows)


def comparison_table(rows: Sequence[Compared], text: str) -> Table:
    """Methods side by side on one text, narrow enough for a terminal; of several seeds mean ± standard deviation."""

    def cells(method: str, seeds: Sequence[Compared]) -> list[str]:
        seconds = [row.seconds for row in seeds if row.seconds is not None]
        peak = max(row.peak_bytes or 0 for row in seeds)
        return [
            method,
            f"{mean(row.bits_per_weight for row in seeds):.3f}",
            _plus_minus([row.perplexity[text] for row in seeds], perplexity_text),
            _plus_minus([row.divergence[text] for row in seeds], "{:.3f}".format),
            f"{100 * mean(row.same_top[text] for row in seeds):.1f}",
            f"{mean(seconds):.0f}" if seconds else "–",
            size(peak) if peak else "–",
        ]

    header = ["method", "bits", "perplexity", "KL", "same top %", "seconds", "peak"]
    title = f"Methods on {text}; bits are all that is stored for a quantized weight"
    return table(title, header, [cells(*together) for together in by_method(rows).items()])


def _plus_minus(values: Sequence[float], text: Callable[[float], str]) -> str:
    return text(mean(values)) + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def export_table(out: str, tensors: Sequence[Exported]) -> Table:
    """The tensors of a GGUF file: type, stored bits, and the relative squared error of rounding to a wider type."""
    header = ["tensor", "type", "shape", "bits per weight", "error", "bytes"]
    rows = [
        [t.name, t.kind, "×".join(map(str, t.shape)), f"{t.bits_per_weight:.4g}", f"{t.error:.2g}", size(t.nbytes)]
        for t in tensors
    ]
    result = table(out, header, rows, left=3)
    result.add_section()
    count, nbytes = sum(math.prod(t.shape) for t in tensors), sum(t.nbytes for t in tensors)
    result.add_row(
        "everything", "", f"{count / 1e6:.2f} M", f"{8 * nbytes / count:.4g}", "", size(nbytes), style="bold"
    )
    return result
