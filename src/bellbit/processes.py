"""The processes that torchrun has started, and what they tell each other. Alone, a process tells nobody anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed

WAIT = timedelta(hours=2)  # for another process: one may read or write what takes long


def processes() -> Any:
    """accelerate's view of the processes that torchrun has started; gloo joins them for what is not on a GPU."""
    gpus = torch.cuda.is_available()
    backend = {"backend": "cuda:nccl,cpu:gloo"} if gpus and "LOCAL_RANK" in os.environ else {}
    return PartialState(cpu=not gpus, timeout=WAIT, **backend)


def dealt(count: int, at_once: int) -> list[int]:
    """Of so many things, those of this process: batches of `at_once` are dealt to the processes in turn."""
    state = processes()
    return [i for i in range(count) if i // at_once % state.num_processes == state.process_index]


def each_in_turn(tensor: Tensor) -> Iterator[Tensor]:
    """This tensor of every process, first to last; they may differ in length, not in what they hold."""
    state = processes()
    for source in range(state.num_processes):
        rows = told(len(tensor), source, tensor.device)
        theirs = tensor if source == state.process_index else tensor.new_empty(rows, *tensor.shape[1:])
        if rows and state.num_processes > 1:
            distributed.broadcast(theirs, source)
        yield theirs


def largest(tensor: Tensor) -> Tensor:
    """The largest over all processes, value by value, in place."""
    if processes().num_processes > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def owners(costs: Mapping[str, float]) -> dict[str, int]:
    """Which process does which piece of work: the dearest first, each to the one that has least to do."""
    loads = [0.0] * processes().num_processes
    found = {}
    for name in sorted(costs, key=lambda name: costs[name], reverse=True):
        found[name] = loads.index(min(loads))
        loads[found[name]] += costs[name]
    return {name: found[name] for name in costs}


def told(words: Any, source: int, device: torch.device) -> Any:
    """What process `source` says, as JSON has it; of the others, `words` are ignored."""
    if processes().num_processes == 1:
        return words
    mine = processes().process_index == source
    content = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8).to(device) if mine else None
    length = torch.tensor([0 if content is None else len(content)], device=device)
    distributed.broadcast(length, source)
    if content is None:
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    distributed.broadcast(content, source)
    return json.loads(bytes(content.cpu().tolist()))


def sent(tensors: Sequence[Tensor], source: int) -> None:
    """Make tensors those of process `source`, in place; they are of the same shapes and types everywhere."""
    if processes().num_processes > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, source)
