"""How near a model's logits are to those of the model that it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bellbit.ptq.stream import acting


class Agreement:
    """How near logits are to those of the model as it is, over all positions added.

    divergence: mean KL(original ‖ model), nats. same_top: share of positions where both have the same likeliest token.
    """

    def __init__(self, originals: Iterable[Tensor]) -> None:
        """originals: logits (length, vocabulary), window after window, as they will be added."""
        self._originals = iter(originals)
        self._divergence, self._same, self._positions = 0.0, 0, 0

    def add(self, logits: Tensor) -> None:
        p, q = (t.float().log_softmax(-1) for t in (next(self._originals), logits))
        self._same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self._divergence += float(q.neg_().add_(p).mul_(p.exp_()).sum())
        self._positions += len(logits)

    @property
    def divergence(self) -> float:
        return self._divergence / self._positions

    @property
    def same_top(self) -> float:
        return self._same / self._positions


@torch.no_grad()
def logits_of_original(original: Any, windows: Tensor, states: Tensor) -> Iterator[Tensor]:
    """Logits (length, vocabulary) of the model as it is, window after window; only what follows its blocks runs.

    states: its last hidden states on the windows, see `teacher_states`.
    """
    body = getattr(original.base_model, "decoder", original.base_model)  # OPT's is within
    output = body(input_ids=windows[:1, :1], use_cache=False)  # of the family's own kind
    for window, state in zip(windows, states, strict=True):
        output["last_hidden_state"] = state[None]
        with acting([body], lambda _: lambda *_, **__: output):
            logits: Tensor = original(input_ids=window[None], use_cache=False).logits[0]
        yield logits
