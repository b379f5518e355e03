"""Calibration text that the full-precision model writes itself, where there is no other or none of the right kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bellbit.errors import BellbitError
from bellbit.fetch import cache_dir
from bellbit.ptq.resume import fingerprint

SELF = "self"  # as --calib
TOGETHER = 16  # windows sampled at once


@torch.no_grad()
def sampled_windows(
    model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int, report: Callable[[float], None]
) -> Tensor:
    """Windows from BOS on as the model goes on, at temperature 1, past any end: int64 (samples, seq_len).

    They are kept in the cache, by the model's weights. Raises BellbitError if the tokenizer has no BOS.
    """
    if tokenizer.bos_token_id is None:
        raise BellbitError("--calib self starts from the beginning-of-sequence token, which this tokenizer lacks")
    name = "-".join(map(str, (fingerprint(model), tokenizer.bos_token_id, samples, seq_len, seed)))
    file = cache_dir() / "self" / f"{name}.safetensors"
    if file.exists():
        return load_file(file)["windows"]
    windows = torch.empty(samples, seq_len, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, samples, TOGETHER):
            part = windows[start : start + TOGETHER]
            part[:] = _continue(model, part.new_full((len(part), 1), tokenizer.bos_token_id), seq_len)
            report((start + len(part)) / samples)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"windows": windows}, partial)
    partial.replace(file)
    return windows


def _continue(model: Any, tokens: Tensor, length: int) -> Tensor:
    """Tokens (n, 1) drawn on to (n, length)."""
    cache, latest = None, tokens
    while tokens.shape[1] < length:
        output = model(input_ids=latest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        latest = torch.multinomial(output.logits[:, -1].float().softmax(dim=-1), 1)
        tokens = torch.cat([tokens, latest], dim=1)
    return tokens
