"""Text: where it comes from, which part is for calibration, and how it is cut into windows of tokens.

The conventions are those of GPTQ, which all papers in this field follow: calibration takes random windows of
the training text, perplexity consecutive windows of the test text, each text tokenized once as a whole.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bellbit.errors import BellbitError, first_line
from bellbit.loading import quiet
from bellbit.wikipedia import articles

Part = Literal["train", "test"]
TRAIN_SHARE = 0.75  # of texts that come without parts


@dataclass(frozen=True)
class Corpus:
    """Documents of one text source.

    separator: what joins them. by_document: calibration windows come from single documents (C4) instead of the
    joined text. max_windows: evaluation stops there by convention.
    """

    name: str
    documents: list[str]
    separator: str = "\n\n"
    by_document: bool = False
    max_windows: int | None = None

    @property
    def text(self) -> str:
        return self.separator.join(self.documents)

    def cut(self, start: float, stop: float) -> Corpus:
        """The documents between two shares (0 … 1) of all characters; those at the edges are cut."""
        total = sum(map(len, self.documents))
        low, high, position, kept = round(start * total), round(stop * total), 0, []
        for document in self.documents:
            piece = document[max(low - position, 0) : max(high - position, 0)]
            position += len(document)
            if piece:
                kept.append(piece)
        return replace(self, documents=kept)


def load_corpus(spec: str, part: Part) -> Corpus:
    """The text that `spec` names: a known data set or a path, with an optional slice as in `file.txt[:75%]`.

    Data sets have a `train` and a `test` part and give the one asked for; a file gives all of itself. Slice
    bounds are characters, or percent of them, of that part.
    Raises BellbitError for an unknown source, a file that holds no text, and a slice that is empty.
    """
    match = re.fullmatch(r"(?P<source>.+?)(?:\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?", spec)
    if match is None:
        raise BellbitError(f"--data/--calib {spec!r} is not understood; {_KNOWN}")
    source = match["source"]
    if source in SOURCES:
        corpus = SOURCES[source](part)
    elif len(source) < 4096 and Path(source).is_file():
        corpus = Corpus(source, read_documents(Path(source)))
    else:
        raise BellbitError(f"no such text: {source!r} is neither a file nor a known data set; {_KNOWN}")
    if match["start"] is not None:
        total = max(sum(map(len, corpus.documents)), 1)
        corpus = corpus.cut(_bound(match["start"], 0.0, total, spec), _bound(match["stop"], 1.0, total, spec))
    if not corpus.documents:
        raise BellbitError(f"{spec!r} selects no text")
    return replace(corpus, name=spec)


def _bound(text: str, default: float, total: int, spec: str) -> float:
    """One bound of a slice as a share of the characters."""
    try:
        if not text.strip():
            return default
        share = float(text.rstrip("%")) / 100 if text.endswith("%") else int(text) / total
        if not math.isfinite(share):
            raise ValueError(text)
    except ValueError:
        raise BellbitError(f"slice bound {text!r} in {spec!r} is no number of characters and no percentage") from None
    return share + 1 if share < 0 else share


def read_documents(path: Path) -> list[str]:
    """Documents of a `.txt` (one), `.jsonl` or `.parquet` file (the field `text` of each row)."""
    if path.suffix == ".parquet":
        rows = _load_dataset("parquet", data_files=str(path), split="train")
        return _field(path, rows)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BellbitError(f"{path} is no text: byte {error.start} is not UTF-8") from None
    if "\0" in content:
        raise BellbitError(f"{path} is no text: it holds NUL bytes")
    if path.suffix != ".jsonl":
        return [content] if content.strip() else []
    try:
        return _field(path, [json.loads(line) for line in content.split("\n") if line.strip()])
    except json.JSONDecodeError as error:
        raise BellbitError(f"{path} is no JSON lines file: {error}") from None


def _field(path: Path, rows: Any) -> list[str]:
    try:
        return [row["text"] for row in rows if row["text"].strip()]
    except (KeyError, TypeError, AttributeError):
        raise BellbitError(f"{path}: every row needs a string field 'text'") from None


def _load_dataset(*arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, its many network errors told as one."""
    try:
        import datasets
    except ImportError:
        raise BellbitError("this text needs the package 'datasets': pip install 'bellbit[data]'") from None
    quiet()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:
        raise BellbitError(
            f"cannot load {arguments[0]}: {first_line(error)}\n"
            "Where the hub is out of reach, use the built-in 'wiki-sample' or a .txt, .jsonl or .parquet file."
        ) from error


def _wikitext2(part: Part) -> Corpus:
    rows = _load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    return Corpus("wikitext2", list(rows["text"]))


def _ptb(part: Part) -> Corpus:
    rows = _load_dataset("ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=part)
    return Corpus("ptb", list(rows["sentence"]), separator=" ")


def _c4(part: Part) -> Corpus:
    file = "en/c4-train.00000-of-01024.json.gz" if part == "train" else "en/c4-validation.00000-of-00008.json.gz"
    rows = _load_dataset("allenai/c4", data_files=file, split="train")
    documents = list(rows["text"] if part == "train" else rows[:1100]["text"])
    return Corpus("c4", documents, separator=" ", by_document=True, max_windows=256)


def _part_of(whole: Corpus, part: Part) -> Corpus:
    return whole.cut(0, TRAIN_SHARE) if part == "train" else whole.cut(TRAIN_SHARE, 1)


def _wiki_sample(part: Part) -> Corpus:
    return _part_of(Corpus("wiki-sample", articles()), part)


def _python_docs(part: Part) -> Corpus:
    """The language reference as `help()` shows it: technical English, of the version of Python that runs."""
    from pydoc_data.topics import topics

    return _part_of(Corpus("python-docs", [topics[name] for name in sorted(topics)]), part)


SOURCES: dict[str, Callable[[Part], Corpus]] = {
    "wiki-sample": _wiki_sample,
    "python-docs": _python_docs,
    "wikitext2": _wikitext2,
    "ptb": _ptb,
    "c4": _c4,
}
_KNOWN = f"known are {', '.join(SOURCES)} and paths to .txt, .jsonl or .parquet files"


def shares(spec: str, samples: int) -> list[tuple[str, int]]:
    """The sources of a mixture with how many of the windows each gives.

    `a,b` takes as many from both, but for a remainder; `a,b*3` three times as many from b.
    Raises BellbitError for a source that is empty, twice there or would give no window.
    """
    if Path(spec).is_file():
        return [(spec, samples)]
    parts = [re.fullmatch(r"\s*(.*?)\s*(?:\*\s*(\d+)\s*)?", part) for part in spec.split(",")]
    weights = {part[1]: int(part[2] or 1) for part in parts if part}
    total, before, counts = sum(weights.values()), 0, []
    for weight in weights.values():
        counts.append(samples * (before + weight) // total - samples * before // total if total else 0)
        before += weight
    if len(weights) < len(parts) or "" in weights or 0 in counts:
        raise BellbitError(
            f"--calib {spec!r} is not possible with {samples} windows; give different sources, as a,b or a,b*3"
        )
    return list(zip(weights, counts, strict=True))


def interleave(parts: list[Tensor]) -> Tensor:
    """Windows of several sources (n_i, length) as one set in which every stretch is mixed as the whole is."""
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids of the whole text, with the special tokens that the tokenizer adds of itself: int64 (n,)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def calibration_windows(
    corpus: Corpus, tokenizer: Any, samples: int, seq_len: int, seed: int, disjoint: bool = False
) -> Tensor:
    """Random windows of the text: int64 (samples, seq_len).

    They may overlap, as in GPTQ's code, unless `disjoint`. With `by_document` each comes from one random document
    that is longer than it. Raises BellbitError if the text has fewer tokens than the windows together.
    """
    needed = samples * seq_len
    draw = random.Random(seed)
    if corpus.by_document:
        return _document_windows(corpus, tokenizer, samples, seq_len, draw)
    tokens = tokenize(corpus.text, tokenizer)
    if len(tokens) < max(needed, seq_len + 1):
        raise _too_short(corpus, len(tokens), samples, seq_len)
    if disjoint:
        first, count = draw.randrange(len(tokens) % seq_len + 1), len(tokens) // seq_len
        starts = [first + seq_len * place for place in draw.sample(range(count), samples)]
    else:
        starts = [draw.randrange(len(tokens) - seq_len) for _ in range(samples)]
    return torch.stack([tokens[start : start + seq_len] for start in starts])


def _document_windows(corpus: Corpus, tokenizer: Any, samples: int, seq_len: int, draw: random.Random) -> Tensor:
    windows: list[Tensor] = []
    order = draw.sample(range(len(corpus.documents)), len(corpus.documents))
    for index in order:
        tokens = tokenize(corpus.documents[index], tokenizer)
        if len(tokens) > seq_len:
            start = draw.randrange(len(tokens) - seq_len)
            windows.append(tokens[start : start + seq_len])
        if len(windows) == samples:
            return torch.stack(windows)
    raise _too_short(corpus, len(windows) * seq_len, samples, seq_len)


def _too_short(corpus: Corpus, found: int, samples: int, seq_len: int) -> BellbitError:
    return BellbitError(
        f"the calibration text {corpus.name!r} is too short: {found} usable tokens found, "
        f"{samples * seq_len} needed for {samples} windows of {seq_len}. "
        "Give more text, or fewer --samples, or a smaller --seq-len."
    )


def evaluation_windows(corpus: Corpus, tokenizer: Any, seq_len: int, windows: int | None = None) -> Tensor:
    """The text cut into consecutive windows, the tail dropped: int64 (n, seq_len); at most `windows` of them.

    Raises BellbitError if the text is shorter than one window.
    """
    tokens = tokenize(corpus.text, tokenizer)
    count = len(tokens) // seq_len
    if count == 0:
        raise BellbitError(
            f"the text {corpus.name!r} is too short to evaluate: {len(tokens)} tokens found, {seq_len} needed"
        )
    limit = windows or corpus.max_windows or count
    return tokens[: count * seq_len].view(count, seq_len)[:limit]
