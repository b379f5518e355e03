"""BlockStream: the decoder blocks of a model, each run alone on hidden states kept between runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class BlockStream:
    """Runs single decoder blocks over a set of token windows.

    What each block is called with besides the hidden states (masks, positions, rotary tables) is recorded once,
    from the model's own forward pass, and replayed. All windows have the same length and no padding, so these
    arguments are the same for all of them.
    """

    def __init__(self, model: Any, blocks: list[nn.Module], windows: Tensor, device: torch.device | str) -> None:
        """windows: int64 (samples, length)."""
        self.device = torch.device(device)
        self.arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.runs: dict[nn.Module, int] = dict.fromkeys(blocks, 0)
        self.inputs = self._embed(model, blocks, windows)

    @torch.no_grad()
    def _embed(self, model: Any, blocks: list[nn.Module], windows: Tensor) -> Tensor:
        """Inputs of the first block, (samples, length, width); records every block's other arguments."""
        inputs: list[Tensor] = []

        def recorder(block: nn.Module) -> Callable[..., Tensor]:
            def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                self.arguments.setdefault(block, (args, kwargs))
                if block is blocks[0]:
                    inputs.append(hidden)
                return hidden

            return record

        for block in blocks:
            block.forward = recorder(block)
        try:
            for window in windows:
                model.base_model(input_ids=window[None], use_cache=False)
        finally:
            for block in blocks:
                del block.forward
        return torch.cat(inputs)

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: Tensor, report: Callable[[float], None], keep: bool = True) -> None:
        """Run `block` over all windows of `hidden` (samples, length, width); with `keep`, in place.

        report: told the share of windows done. keep: False when only the hooks on the block's modules matter.
        """
        self.runs[block] += 1
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), self.arguments[block])
        for i in range(len(hidden)):
            output = block(hidden[i : i + 1].to(self.device), *args, **kwargs)
            if keep:
                hidden[i : i + 1] = output[0] if isinstance(output, tuple) else output
            report((i + 1) / len(hidden))
