"""Pictures of a quantization: weights before and after with their targets, input maxima, the error of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bellbit.comparing import FILE, NONE, Row, by_method
from bellbit.errors import BellbitError
from bellbit.ptq.run import GroupRecord

BLOCK = 128  # columns that share two bells
BEFORE, AFTER, TARGET = "#7f8c8d", "#1f77b4", "#d62728"
LETTER_WIDTH, NAME_HEIGHT = 5, 10  # points that a letter and the name of a method take in the map


class Figures:
    """An observer of `quantize` that draws the first, middle and last block, and at the end all errors.

    Raises BellbitError if matplotlib is missing or `folder` is no folder; it is made with the first picture.
    """

    def __init__(self, folder: Path) -> None:
        _pyplot("--figures")
        if folder.exists() and not folder.is_dir():
            raise BellbitError(f"{folder} exists and is no directory; figures need one")
        self.folder = folder
        self.drawn: list[Path] = []
        self.errors: dict[str, dict[int, float]] = {}

    def __call__(self, record: GroupRecord) -> None:
        for linear, error in record.errors.items():
            self.errors.setdefault(linear, {})[record.block] = error
        if record.scales is not None and record.block in {0, record.blocks // 2, record.blocks - 1}:
            self._draw_group(record)

    def finish(self) -> list[Path]:
        """Draw the errors; returns the paths of all pictures."""
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for linear, errors in self.errors.items():
            axis.plot(list(errors), list(errors.values()), marker=".", label=linear)
        axis.set(xlabel="decoder block", ylabel="relative output error", yscale="log", title="Error per layer")
        axis.legend(fontsize="small", ncols=2)
        self._save(figure, "errors.png")
        return self.drawn

    def _draw_group(self, record: GroupRecord) -> None:
        from matplotlib import pyplot

        linear = record.group.linears[0]
        assert record.scales is not None and record.act_absmax is not None
        found = (record.before[linear], record.scales, record.act_absmax)
        weight, scales, maxima = (tensor.float().cpu() for tensor in found)
        figure, (bells, channels) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for values, colour, label in (
            (weight, BEFORE, "before"),
            (weight * scales, AFTER, "after scaling columns"),
        ):
            look = {"bins": 120, "range": (-4, 4), "density": True, "alpha": 0.6}
            bells.hist(_row_normalized(values).numpy(), color=colour, label=label, **look)
        for target in (-1, 1):
            bells.axvline(target, color=TARGET, linestyle="--", label="targets m ± d" if target > 0 else None)
        bells.set(title=f"Weights of block {record.block}, {linear}", ylabel="density")
        bells.set_xlabel("(w − m) / d, per row and 128 columns")
        bells.legend(fontsize="small", loc="upper right")
        order = maxima.argsort(descending=True)
        channels.plot(maxima[order].numpy(), color=BEFORE, label="before")
        channels.plot((maxima / scales.abs())[order].numpy(), color=AFTER, label="after", linewidth=0.8)
        channels.set(title="Largest input per channel", ylabel="max |x|", yscale="log")
        channels.set_xlabel("channel, by its maximum before")
        channels.legend(fontsize="small")
        self._save(figure, f"block-{record.block:02}-{linear.replace('.', '-')}.png")

    def _save(self, figure: Any, name: str) -> None:
        from matplotlib import pyplot

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        self.drawn.append(path)


def _pyplot(what: str) -> Any:
    """matplotlib.pyplot, set to draw into files. Raises BellbitError if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise BellbitError(f"{what} needs matplotlib: pip install 'bellbit[figures]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_map(rows: Sequence[Row], text: str, path: Path) -> None:
    """Perplexity on `text` over true bits per weight, one point a row; the model as it is as a line.

    Raises BellbitError if matplotlib is missing.
    """
    pyplot = _pyplot("the figure")

    figure, axis = pyplot.subplots(figsize=(11, 6), layout="constrained")
    points: list[tuple[str, float, float]] = []
    for method, seeds in by_method(rows).items():
        found = [row.perplexity[text] for row in seeds]
        if method == NONE:
            axis.axhline(found[0], color=TARGET, linestyle="--", label="full precision")
            continue
        ours = method.startswith("bellbit")
        bits = [row.bits_per_weight for row in seeds]
        axis.scatter(bits, found, color=AFTER if ours else BEFORE, zorder=3 if ours else 2)
        name = Path(method.removeprefix(FILE)).name.removesuffix(".gguf")  # of a file without its folder
        points.append((name, bits[0], found[0]))
    axis.set(xlabel="stored bits per quantized weight", ylabel=f"perplexity on {text}", yscale="log")
    left, right = axis.get_xlim()
    axis.set_xlim(left, right + (right - left) / 5)  # names stand to the right of their points
    if axis.get_legend_handles_labels()[0]:  # the line
        axis.legend(fontsize="small")
    _name(axis, points)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _name(axis: Any, points: list[tuple[str, float, float]]) -> None:
    """Write the name of each point to its right, above names that lie there already."""
    axis.figure.draw_without_rendering()  # places are known only then
    placed: list[tuple[float, float, float]] = []  # height, and from where to where
    for name, *point in sorted(points, key=lambda named: named[2]):
        x, y = (float(value) * 72 / axis.figure.dpi for value in axis.transData.transform(point))
        place, end = y, x + LETTER_WIDTH * len(name)
        for other, other_start, other_end in placed:  # from below
            if x < other_end and other_start < end and abs(place - other) < NAME_HEIGHT:
                place = other + NAME_HEIGHT
        placed.append((place, x, end))
        placed.sort()
        axis.annotate(name, point, (4, 4 + place - y), textcoords="offset points", fontsize="small")


def _row_normalized(values: Tensor) -> Tensor:
    """(v − m) / d of every row and whole block of columns, where the targets are ±1: flat."""
    parts = values.split(BLOCK, dim=1)
    normalized = []
    for part in parts:
        centred = part - part.mean(dim=1, keepdim=True)
        normalized.append((centred / centred.abs().mean(dim=1, keepdim=True).clamp_min(1e-12)).flatten())
    return torch.cat(normalized)
