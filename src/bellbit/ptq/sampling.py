"""Calibration text that the full-precision model writes itself, where there is no other or none of the right kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import StaticCache

from bellbit.errors import BellbitError
from bellbit.fetch import cache_dir
from bellbit.ptq.resume import fingerprint

SELF = "self"  # as --calib
TEXT = 256  # tokens of a text: four in a window of 1024 tell more than one long one, and cost a quarter of the time
TOGETHER = 64  # texts written at once


@torch.no_grad()
def sampled_windows(
    model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int, report: Callable[[float], None]
) -> Tensor:
    """Texts from BOS on as the model goes on, at temperature 1, past any end, joined: int64 (samples, seq_len).

    They are kept in the cache, by the model's weights. Raises BellbitError if the tokenizer has no BOS.
    """
    if tokenizer.bos_token_id is None:
        raise BellbitError("--calib self starts from the beginning-of-sequence token, which this tokenizer lacks")
    name = "-".join(map(str, (fingerprint(model), tokenizer.bos_token_id, samples, seq_len, seed)))
    file = cache_dir() / "self" / f"{name}.safetensors"
    if file.exists():
        return load_file(file)["windows"]
    length = min(TEXT, seq_len)
    texts = torch.empty(math.ceil(samples * seq_len / length), length, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(texts), TOGETHER):
            _write(model, texts[start : start + TOGETHER], tokenizer.bos_token_id)
            report(min(1.0, (start + TOGETHER) / len(texts)))
    windows = texts.flatten()[: samples * seq_len].view(samples, seq_len)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"windows": windows}, partial)
    partial.replace(file)
    return windows


def _write(model: Any, texts: Tensor, first: int) -> None:
    """Fill texts (n, length) with what the model draws after the token `first`."""
    texts[:, 0] = first
    cache = StaticCache(config=model.config, max_cache_len=texts.shape[1])  # one that grows is copied at every token
    for place in range(1, texts.shape[1]):
        latest = texts[:, place - 1 : place]
        logits = model(input_ids=latest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        texts[:, place] = torch.multinomial(logits[:, -1].float().softmax(dim=-1), 1)[:, 0]
