"""From a quantized model in memory to a checkpoint folder that is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bellbit.core.activations import Scope
from bellbit.errors import BellbitError
from bellbit.files import writing
from bellbit.packed.checkpoint import write_shards
from bellbit.packed.hf import QUANT_METHOD, BellbitConfig
from bellbit.packed.linear import packed_linears

RELOAD_TOLERANCE = 1e-5  # of the largest logit; measured difference after reloading: 0


def check_output(out: str | Path, overwrite: bool, source: str) -> Path:
    """The output path, resolved.

    Raises BellbitError if it cannot be made, if something is there already, and, even with `overwrite`, if that
    is anything but an earlier checkpoint of bellbit, or the source model itself.
    """
    path = Path(out).expanduser().resolve()
    ancestor = next(parent for parent in path.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise BellbitError(f"{path} cannot be made: {ancestor} is no directory that can be written to")
    if path.exists() and not path.is_dir():
        raise BellbitError(f"{path} exists and is no directory")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise BellbitError(f"{path} exists and is not empty; give another path, or --overwrite")
        if path == Path(source).expanduser().resolve() or not _is_checkpoint(path):
            raise BellbitError(f"{path} holds something else than a bellbit checkpoint: it is not overwritten")
    return path


def _is_checkpoint(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def narrowest(tensor: Tensor) -> Tensor:
    """A float tensor in the first of bfloat16 and float16 that holds its values exactly, else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def round_unquantized(model: nn.Module, quantized: set[str]) -> None:
    """Round the matrices that stay unquantized to what 16 bits hold, in place: embeddings, head.

    Values that are exact in bfloat16 or float16 stay as they are; others are rounded to float16. Vectors (norms,
    biases) are kept in full. quantized: names of the linears that will be packed. What is not in memory stays out.
    """
    packed = {id(parameter) for name in quantized for parameter in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.is_meta or id(parameter) in packed:
            continue
        if narrowest(parameter.data).dtype.itemsize > 2 and bool(parameter.half().isfinite().all()):
            parameter.data.copy_(parameter.half())


def quantization_config(
    model: nn.Module, method: str, act_scope: Scope, act_bits: int, provenance: dict[str, Any]
) -> BellbitConfig:
    """The `quantization_config` that describes a model's packed layers."""
    layouts: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    rounded, rules = [], set()
    for name, layer in packed_linears(model).items():
        entry = {"layout": layer.layout, **layer.options}
        if entry not in layouts:
            layouts.append(entry)
        modules[name] = {"layout": layouts.index(entry), "shape": [layer.out_features, layer.in_features]}
        rules.add(layer.input_rule)
        if layer.round_output:
            rounded.append(name)
    if len(rules) > 1:
        raise BellbitError(f"the inputs of all linears must be quantized alike, not by {' and '.join(sorted(rules))}")
    rule = next(iter(rules), "none")
    return BellbitConfig(method, layouts, modules, act_bits, act_scope, rounded, rule, provenance=provenance)


class Apart(Protocol):
    """What there is of a model whose decoder blocks are not in memory."""

    def tensor(self, name: str) -> Tensor:
        """One of a block, by its full name."""

    def running(self) -> AbstractContextManager[None]:
        """Inside, the model runs all the same."""

    def reopened(self, folder: Path) -> AbstractContextManager[Any]:
        """A model that runs from a checkpoint in `folder`, no more of it in memory than need be."""


class StoredTensors(Mapping[str, Tensor]):
    """What a checkpoint of a model holds, by name; tied tensors once, matrices in 16 bits where that is exact."""

    def __init__(self, model: Any, read: Callable[[str], Tensor] | None = None) -> None:
        """read: a tensor that is not in memory, by its full name."""
        self._read = read
        tied = set(model.all_tied_weights_keys)
        self._found = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        layers = packed_linears(model).items()
        self._packed = {f"{name}.{key}" for name, layer in layers for key in layer.packed.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._found[name]
        if tensor.is_meta:
            assert self._read is not None, f"{name} is not in memory"
            tensor = self._read(name)
        return narrowest(tensor) if tensor.ndim >= 2 and name not in self._packed else tensor


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    config: BellbitConfig | None,
    target: Path,
    overwrite: bool,
    probe: Tensor,
    apart: Apart | None = None,
) -> None:
    """Write everything beside `target`, load it again, compare logits, and only then rename it into place.

    config: None for a model that is not quantized. probe: token ids (n,) to compare logits on. apart: decoder blocks
    that are not in memory.
    Raises BellbitError if the disk is full or the reloaded model does not give the same logits.
    """
    with writing(target, "there is no checkpoint, --resume tries again"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as made:
            folder = Path(made)
            folder.chmod(0o755)
            write_shards(StoredTensors(model, None if apart is None else apart.tensor), folder)
            if config is not None:
                model.config.quantization_config = config
            model.config.dtype = model.dtype
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors writes for the owner alone
            _check_reload(model, folder, probe, apart)
            _put_in_place(folder, target, overwrite)


def _check_reload(model: Any, folder: Path, probe: Tensor, apart: Apart | None) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad(), ExitStack() as opened:
        if apart is None:
            reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        else:
            opened.enter_context(apart.running())
            reloaded = opened.enter_context(apart.reopened(folder))
        before, after = (network(probe[None], use_cache=False).logits for network in (model, reloaded))
    difference = float((before - after).abs().max() / before.abs().max())
    if not difference <= RELOAD_TOLERANCE:
        raise BellbitError(
            f"the saved checkpoint gives other logits than the model in memory (by {difference:.2g} of the "
            "largest); it is not kept. This is a fault of bellbit: please report it."
        )


def _put_in_place(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename `folder` to `target`, replacing what is there only with `overwrite`."""
    if overwrite and target.is_dir():
        old = Path(mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.replace(old)
        try:
            folder.replace(target)
        except OSError:
            old.replace(target)
            raise
        shutil.rmtree(old)
    else:
        folder.replace(target)  # an empty directory may be replaced, anything else raises
