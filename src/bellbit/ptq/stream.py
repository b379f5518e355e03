"""BlockStream: the decoder blocks of a model, each run alone on hidden states kept between runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bellbit.errors import BellbitError, disk_reason
from bellbit.processes import dealt, processes


class StopBlock(Exception):
    """Raised by a hook that has seen all it wants: the rest of the block need not run for this batch."""


@contextmanager
def acting(blocks: Iterable[nn.Module], forward_of: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Inside, every block does what `forward_of` it says, and nothing of its own."""
    replaced = list(blocks)
    for block in replaced:
        block.forward = forward_of(block)
    try:
        yield
    finally:
        for block in replaced:
            del block.forward


def giving(hidden: Tensor, in_tuple: bool, _: nn.Module) -> Callable[..., Any]:
    """The forward pass of a block that does nothing but hand on `hidden`."""
    return lambda *_args, **_kwargs: (hidden, None) if in_tuple else hidden


def _broadcasts(argument: Any) -> bool:
    """Whether what was made for one window serves several."""
    return not isinstance(argument, Tensor) or argument.ndim < 3 or argument.shape[0] == 1


def hidden_states(shape: Sequence[int], dtype: torch.dtype, file: Path | None) -> Tensor:
    """Room for hidden states: in memory, or in a file that the system holds as much of in memory as it likes."""
    if file is None:
        return torch.empty(*shape, dtype=dtype)
    size = math.prod(shape)
    try:
        with file.open("wb") as stream:  # a disk that is found full only when a page is written ends the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, max(1, size * dtype.itemsize))
    except OSError as error:
        raise BellbitError(
            f"{disk_reason(error)} for hidden states of {size * dtype.itemsize / 1e9:.1f} GB in {file}; free some and "
            "--resume, or leave out --offload"
        ) from error
    states = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(*shape)
    if os.name == "posix":  # it lives as long as it is in use, and no longer
        file.unlink()
    return states


class BlockStream:
    """Runs single decoder blocks over a set of token windows.

    What each block is called with besides the hidden states (masks, positions, rotary tables) is recorded once
    for one window, from the model's own forward pass, and replayed. All windows have the same length and no
    padding, so these arguments are the same for all of them and broadcast over a batch; where they do not, as biases
    of attention (heads, 1, length) of Falcon and BLOOM, windows go through a block one by one.
    """

    def __init__(
        self,
        model: Any,
        blocks: list[nn.Module],
        windows: Tensor,
        device: torch.device | str,
        batch_size: int,
        bf16: bool = False,
        folder: Path | None = None,
    ) -> None:
        """windows: int64 (samples, length). batch_size: windows that go through a block together.

        bf16: matrix products in bfloat16; the hidden states stay as they are. folder: where these lie in files as
        long as they are in use; without, they are in memory.
        """
        self.device, self.batch_size, self.bf16, self._folder = torch.device(device), batch_size, bf16, folder
        self.arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.in_tuple = False  # whether the block that ran last gave a tuple
        self._embed(model, blocks, windows[:1])
        if not all(_broadcasts(t) for call in self.arguments.values() for t in tree_leaves(call)):
            self.batch_size = 1
        self.windows = len(windows)
        self.batches = math.ceil(len(windows) / (self.batch_size * processes().num_processes))
        own = dealt(len(windows), self.batch_size)
        if not own:
            raise BellbitError(
                f"{len(windows)} windows are fewer batches of {self.batch_size} than there are processes; give more "
                "--samples, or start fewer"
            )
        self.inputs = self._embed(model, blocks, windows[own])

    @torch.no_grad()
    def _embed(self, model: Any, blocks: list[nn.Module], windows: Tensor) -> Tensor:
        """Inputs of the first block, (samples, length, width); records every block's other arguments."""
        latest: list[Tensor] = []

        def recorder(block: nn.Module) -> Callable[..., Tensor]:
            def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                self.arguments.setdefault(block, (args, kwargs))
                if block is blocks[0]:
                    latest[:] = [hidden]
                return hidden

            return record

        inputs = torch.empty(0)
        with acting(blocks, recorder):
            for i, window in enumerate(windows):
                model.base_model(input_ids=window[None], use_cache=False)
                if i == 0:
                    shape = (len(windows), *latest[0].shape[1:])
                    inputs = hidden_states(shape, latest[0].dtype, self._file("inputs"))
                inputs[i] = latest[0][0]
        return inputs

    def _file(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}-{processes().process_index}.hidden"

    def copy(self, name: str) -> Tensor:
        """The inputs as they are now, for a chain of their own. name: of the file they lie in, if they do."""
        copy = hidden_states(self.inputs.shape, self.inputs.dtype, self._file(name))
        return copy.copy_(self.inputs)

    def caller(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """`block` as a function of hidden states (windows, length, width) on the stream's device."""
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), self.arguments[block])

        def call(hidden: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                output = block(hidden.to(self.device), *args, **kwargs)
            self.in_tuple = isinstance(output, tuple)
            return output[0] if self.in_tuple else output

        return call

    @torch.no_grad()
    def run(
        self,
        block: nn.Module,
        hidden: Tensor,
        report: Callable[[float], None],
        keep: bool = True,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Run `block` over all windows of `hidden` (samples, length, width); with `keep`, in place.

        report: told the share of windows done. keep: False when only the hooks on the block's modules matter, which
        may then raise StopBlock. after: called after each batch, in every process as often.
        """
        call = self.caller(block)
        done = 0
        for batch in hidden.split(self.batch_size):
            with nullcontext() if keep else suppress(StopBlock):
                output = call(batch)
            if keep:
                batch.copy_(output)
            done += len(batch)
            after()
            report(done / len(hidden))
        for _ in range(self.batches - math.ceil(len(hidden) / self.batch_size)):
            after()


def ignore(_: float) -> None:
    """No report."""
