"""Calibration text that the full-precision model writes itself, where there is no other or none of the right kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from bellbit.errors import BellbitError
from bellbit.fetch import cache_dir
from bellbit.files import beside, writing
from bellbit.loading import cache_argument
from bellbit.ptq.attention import fast_attention
from bellbit.ptq.fit import SEEDS
from bellbit.ptq.resume import fingerprint

SELF = "self"  # as --calib
TEXT = 256  # tokens of a text: four in a window of 1024 tell more than one long one, and cost a quarter of the time
TOGETHER = 64  # texts written at once, and kept in one file
RUN = 256  # tokens of the vocabulary whose probabilities are added up first
MOST_PARTS = 2**20  # of such files with one seed


@torch.no_grad()
def sampled_windows(
    model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int, report: Callable[[float], None]
) -> Tensor:
    """Texts as the model goes on from the mark that begins one, at temperature 1, past any end: (samples, seq_len).

    The mark is BOS, or EOS where that is what separates texts. int64, several texts in a window. They are kept in the
    cache, by the model's weights and dtype. Raises BellbitError if the tokenizer has no such mark, or if they cannot be
    kept.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise BellbitError("a text of the model's own begins with the BOS or EOS token, and this tokenizer has neither")
    length = min(TEXT, seq_len)
    name = f"{fingerprint(model)}-{str(model.dtype).removeprefix('torch.')}-{first}-{length}-{seed}"
    parts = math.ceil(samples * seq_len / length / TOGETHER)
    folder = cache_dir() / "self"
    texts = []
    for part in range(parts):
        file = folder / f"{name}-{part}.safetensors"
        if not file.exists():
            _keep(file, _write(model, first, length, (seed * MOST_PARTS + part) % SEEDS))
        texts.append(load_file(file)["texts"])
        report((part + 1) / parts)
    return torch.cat(texts).flatten()[: samples * seq_len].view(samples, seq_len)


def _keep(file: Path, texts: Tensor) -> None:
    with writing(file, "make room, or set BELLBIT_CACHE to another folder"):
        file.parent.mkdir(exist_ok=True)
        with beside(file) as partial:
            save_file({"texts": texts}, partial)


def _write(model: Any, first: int, length: int, seed: int) -> Tensor:
    """What the model draws after the token `first`, which is part of it: int64 (TOGETHER, length)."""
    texts = torch.full((TOGETHER, length), first)
    cache = {cache_argument(model): _cache(model.config, length)}
    with torch.random.fork_rng(), fast_attention(model, "cpu"):
        torch.manual_seed(seed)
        for place in range(1, length):
            latest = texts[:, place - 1 : place]
            logits = model(input_ids=latest, use_cache=True, logits_to_keep=1, **cache).logits
            texts[:, place] = _draw(logits[:, -1])
    return texts


def _cache(config: Any, length: int) -> Cache:
    """Of fixed size, as one that grows is copied at every token; but biases by distance (ALiBi) need one that grows."""
    if getattr(config, "alibi", config.model_type in ("bloom", "mpt")):
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=length)


def _draw(logits: Tensor) -> Tensor:
    """One token for each row of logits (n, vocabulary), by its probability: int64 (n,).

    Runs of tokens first, then one of the run: to add up the whole vocabulary one by one took a fifth of the time of
    writing, and `torch.multinomial`, which makes a random number for every token, a third.
    """
    chances = logits.float().softmax(dim=-1)
    runs = nn.functional.pad(chances, (0, -chances.shape[1] % RUN)).unflatten(1, (-1, RUN))
    run = _pick(runs.sum(dim=2))
    return RUN * run + _pick(runs[torch.arange(len(runs)), run])


def _pick(chances: Tensor) -> Tensor:
    """An index for each row (n, count), in proportion: int64 (n,)."""
    below = chances.cumsum(dim=1, dtype=torch.float64)
    height = torch.rand(len(below), 1, dtype=torch.float64) * below[:, -1:]
    return torch.searchsorted(below, height, right=True)[:, 0]
