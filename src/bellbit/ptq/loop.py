"""The loop over decoder blocks: maxima, column scales, Hessians, packing, and on to the next block."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.activations import windows_at_once
from bellbit.core.hessian import inverse_factor, unknown_factor
from bellbit.core.ltdb import SMALLEST_SCALE, learn_column_scales
from bellbit.packed.linear import PackedLinear
from bellbit.processes import owners, processes, sent, told
from bellbit.ptq.blocks import Blocks
from bellbit.ptq.collect import group_hessians, input_maxima
from bellbit.ptq.families import Family, InputGroup, by_norm, fold_column_scales
from bellbit.ptq.layers import layers_of, put_back, relative_error, weight_of
from bellbit.ptq.methods import METHODS, Settings
from bellbit.ptq.resume import Saved
from bellbit.ptq.run import GroupRecord, Log, Observer, Progress, Run
from bellbit.ptq.stream import BlockStream

BROKEN, UNSEEN = "broken", "unseen"  # why a linear is rounded plainly: its Hessian, or too few tokens for one
FALLBACK_LIMIT = 0.05  # share of linears with Hessians beyond repair above which a run is given up

# Where a block's time goes, measured on the demo model; only the progress bar depends on it.
SHARES = {"maxima": 0.25, "hessians": 0.40, "quantize": 0.15, "propagate": 0.20}


@torch.no_grad()
def quantize_model(
    blocks: Blocks,
    settings: Settings,
    windows: Tensor | None,
    device: str,
    progress: Progress,
    saved: Saved,
    observer: Observer | None = None,
    most_fallbacks: float = math.inf,
    offload: Path | None = None,
    log: Log = lambda block, run: None,
) -> Run:
    """Replace the linears of every decoder block by packed ones, in place, block after block.

    Each block runs at most three times over the calibration set: on the full-precision chain for the input
    maxima, on the chain through the quantized blocks for the Hessians, and quantized, to go on with that chain.
    Column scales are folded before the second run, so that it sees X/T itself: the Hessian diag(1/T)·H·diag(1/T)
    costs no run of its own, and rounded activations are rounded after scaling, as at inference.

    settings: resolved for the family. windows: token ids (samples, length); None if the method needs no text.
    saved: keeps every block; one that it has is put back, and only run to go on with the chains. An observer is told
    of its errors, no more. most_fallbacks: see `Run.check`. Of several processes each has a share of the windows and of
    the linears, and all end with the same. offload: folder for hidden states. log: told of each block.
    """
    run = Run()
    method, family, every = METHODS[settings.method], blocks.family, blocks.all
    stream, full_precision = None, None
    if windows is not None:
        together = windows_at_once(windows.shape[1], settings.act_bits, settings.resolved_scope)
        stream = BlockStream(blocks.model, every, windows, device, together, folder=offload)
        full_precision = stream.copy("targets") if method.transforms and settings.ltdb != "off" else None

    for index in range(len(every)):
        name = blocks.name(index)
        steps = _Steps(progress, index, len(every))
        last = index == len(every) - 1
        block = blocks.take_up(index).to(device)
        records = [_record(block, group, index, len(every), observer) for group in family.groups_of(block)]
        if (found := saved.load(name)) is not None:
            if stream is not None and full_precision is not None and not last:
                stream.run(block, full_precision, steps.part("maxima"))
            tensors, notes = found
            put_back(block, tensors, notes.pop("layers"))
            block.to(device)
            own = Run(**notes)
            for record in records:
                record.errors = {linear: own.errors[linear] for linear in record.group.linears}
        else:
            hessians: dict[InputGroup, Tensor] = {}
            own = Run()
            if stream is not None:
                if full_precision is not None:
                    _fold(block, records, stream, full_precision, family, settings, steps, own, keep=not last)
                hessians = group_hessians(stream, block, family, settings, name, steps.part("hessians"))
            _quantize_groups(block, records, hessians, family, settings, own)
            saved.keep(name, block.state_dict(), **asdict(own), layers=layers_of(block))
        run.add(name, own)
        log(name, own)
        run.check(most_fallbacks)
        if observer is not None:
            for record in records:
                observer(record)
        steps.part("quantize")(1)
        if stream is not None and not last:
            stream.run(block, stream.inputs, steps.part("propagate"))
        del block, records  # the weights that were
        blocks.put_down(index)
    return run


def _fold(
    block: nn.Module,
    records: list[GroupRecord],
    stream: BlockStream,
    full_precision: Tensor,
    family: Family,
    settings: Settings,
    steps: _Steps,
    run: Run,
    keep: bool,
) -> None:
    """Learn the column scales of a block and fold them into its norms. keep: whether `full_precision` goes on."""
    behind = by_norm(record.group for record in records)
    maxima = input_maxima(stream, block, behind, full_precision, steps.part("maxima"), keep)
    with _timed(run):
        scales = _shared_column_scales(block, behind, maxima, settings)
        for key, groups in behind.items():
            fold_column_scales(block, groups, scales[key], family.norm_offset)
    for record in records:
        norm = record.group.norm or ""
        record.act_absmax, record.scales = maxima.get(norm), scales.get(norm)


class _Steps:
    """Turns what happens inside a block into a share of the whole."""

    def __init__(self, progress: Progress, block: int, blocks: int) -> None:
        self.progress, self.block, self.blocks = progress, block, blocks
        self.done = 0.0

    def part(self, name: str) -> Callable[[float], None]:
        """A function that takes the share done of this part of the block."""
        start = self.done
        self.done += SHARES[name]

        def report(share: float) -> None:
            inside = start + share * SHARES[name]
            self.progress((self.block + inside) / self.blocks, f"block {self.block + 1}/{self.blocks}: {name}")

        return report


@contextmanager
def _timed(run: Run) -> Iterator[None]:
    started = time.perf_counter()
    yield
    run.algorithm_seconds += time.perf_counter() - started


def _record(block: nn.Module, group: InputGroup, index: int, count: int, observer: Observer | None) -> GroupRecord:
    keep = group.linears if observer else ()
    return GroupRecord(index, count, group, {name: weight_of(block, name).clone() for name in keep})


def _column_scales(block: nn.Module, groups: list[InputGroup], act_absmax: Tensor, settings: Settings) -> Tensor:
    """T of all groups behind a norm, kept away from zero."""
    steps = settings.ltdb_steps if settings.ltdb == "learn" else 0
    weights = [weight_of(block, name) for group in groups for name in group.linears]
    scales = learn_column_scales(weights, act_absmax, settings.epsilon, steps, settings.block_size)
    return torch.where(scales.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scales)


def _shared_column_scales(
    block: nn.Module, behind: dict[str, list[InputGroup]], maxima: dict[str, Tensor], settings: Settings
) -> dict[str, Tensor]:
    """T by norm; of several processes, each finds some."""
    weights = {norm: [x for group in groups for x in group.linears] for norm, groups in behind.items()}
    owner = owners({norm: float(sum(weight_of(block, x).numel() for x in weights[norm])) for norm in behind})
    found = {}
    for norm, groups in behind.items():
        mine = owner[norm] == processes().process_index
        found[norm] = _column_scales(block, groups, maxima[norm], settings) if mine else maxima[norm].float().clone()
    for norm, scales in found.items():
        sent([scales], owner[norm])
    return found


def _quantize_groups(
    block: nn.Module,
    records: list[GroupRecord],
    hessians: dict[InputGroup, Tensor],
    family: Family,
    settings: Settings,
    run: Run,
) -> None:
    """Pack the linears of a block and put them into it; of several processes, each packs some and has the others'."""
    weights = {linear: weight_of(block, linear) for record in records for linear in record.group.linears}
    owner = owners({linear: float(weight.numel() * weight.shape[1]) for linear, weight in weights.items()})
    device = next(iter(weights.values())).device
    del weights
    words: dict[str, dict[str, Any]] = {}
    for record in records:
        mine = [linear for linear in record.group.linears if owner[linear] == processes().process_index]
        words |= _quantize_linears(block, mine, hessians.pop(record.group, None), family, settings, run)
    for record in records:
        fell_back = None
        for linear in record.group.linears:
            old: Any = block.get_submodule(linear)
            word = told(words.get(linear), owner[linear], device)
            if linear not in words:
                block.set_submodule(linear, PackedLinear(**word["layer"], bias=old.bias, device=device))
            layer: Any = block.get_submodule(linear)
            packed = layer.packed
            sent(list(packed.tensors.values()), owner[linear])
            record.packed[linear], record.errors[linear] = packed, word["error"]
            run.errors[linear], run.seconds[linear] = word["error"], word["seconds"]
            run.bits[linear], run.nominal[linear] = packed.bits_per_weight, packed.nominal_bits
            fell_back = word["fallback"]
        if fell_back is not None:
            run.fall_back(record.group.linears, broken=fell_back == BROKEN)


def _quantize_linears(
    block: nn.Module, linears: list[str], hessian: Tensor | None, family: Family, settings: Settings, run: Run
) -> dict[str, dict[str, Any]]:
    """Pack linears of one group and put them into the block. Returns what is to be said of each, as JSON has it."""
    words: dict[str, dict[str, Any]] = {}
    if not linears:
        return words
    factor, fallback = None, None
    with _timed(run):
        if METHODS[settings.method].calibrates:
            first = weight_of(block, linears[0])
            factor = unknown_factor(first.shape[1], first.device) if hessian is None else inverse_factor(hessian)
            if factor.damping is None:
                fallback = UNSEEN if hessian is None else BROKEN
        for linear in linears:
            started = time.perf_counter()
            old: Any = block.get_submodule(linear)
            weight = old.weight.detach().float()
            packed = METHODS[settings.method].quantize(weight, factor, settings)
            layer = PackedLinear.holding(
                packed,
                bias=None if old.bias is None else old.bias.detach(),
                act_bits=settings.act_bits,
                act_scope=settings.resolved_scope,
                round_output=settings.act_bits < 16 and linear in family.rounded_outputs,
            )
            block.set_submodule(linear, layer)
            words[linear] = {
                "layer": layers_of(block)[linear],
                "error": relative_error(weight, packed.dequantize(), hessian),
                "fallback": fallback,
                "seconds": time.perf_counter() - started,
            }
    return words
