"""Perplexity as GPTQ and all papers of this field compute it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bellbit.core.activations import windows_at_once
from bellbit.errors import BellbitError
from bellbit.packed.linear import packed_linears


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean over windows of the mean next-token loss. tokens: read, in all windows."""

    perplexity: float
    tokens: int
    windows: int
    seq_len: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: Any,
    windows: Tensor,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda share: None,
    watch: Callable[[Tensor], None] = lambda logits: None,
) -> Evaluation:
    """Perplexity of a causal language model over windows of tokens.

    windows: int64 (n, length), each read by itself, its first token predicted by nothing. watch: given the logits
    (length, vocabulary) of each window in turn.
    Raises BellbitError for windows of less than two tokens, and if the logits are NaN.
    """
    started = time.perf_counter()
    length = windows.shape[1]
    if length < 2:
        raise BellbitError("perplexity needs windows of at least two tokens")
    model.to(device)
    losses: list[float] = []
    layers = packed_linears(model).values()
    rounding = {(16, "token")} | {(layer.act_bits, layer.act_scope) for layer in layers}
    for batch in windows.split(min(windows_at_once(length, *rule) for rule in rounding)):
        tokens = batch.to(device)
        logits = model(input_ids=tokens, use_cache=False).logits
        for row, target in zip(logits, tokens, strict=True):
            # log-sum-exp minus the target's logit: cross entropy without a second array of the logits' size
            predicted, wanted = row[:-1].float(), target[1:, None]
            losses.append(float((predicted.logsumexp(dim=1) - predicted.gather(1, wanted)[:, 0]).mean()))
            watch(row)
        progress(len(losses) / len(windows))
    mean = math.fsum(losses) / len(losses)
    if math.isnan(mean):
        raise BellbitError("the model's logits are NaN; try --dtype float32")
    value = math.exp(mean) if mean < 700 else math.inf
    return Evaluation(value, windows.numel(), len(windows), length, time.perf_counter() - started)
