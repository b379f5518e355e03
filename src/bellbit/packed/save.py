"""From a quantized model in memory to a checkpoint folder that is whole or absent."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.core.activations import Scope
from bellbit.errors import BellbitError
from bellbit.packed.checkpoint import write_shards
from bellbit.packed.hf import BellbitConfig
from bellbit.packed.linear import PackedLinear

RELOAD_TOLERANCE = 1e-5  # of the largest logit; measured difference after reloading: 0


def check_output(out: str | Path, overwrite: bool) -> Path:
    """The output path. Raises BellbitError if something is there already, or its parent is not writable."""
    path = Path(out).expanduser()
    if path.exists() and not path.is_dir():
        raise BellbitError(f"{path} exists and is no directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise BellbitError(f"{path} exists and is not empty; give another path, or --overwrite")
    return path


def narrowest(tensor: Tensor) -> Tensor:
    """A float tensor in the first of bfloat16 and float16 that holds its values exactly, else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def round_unquantized(model: nn.Module, quantized: set[str]) -> None:
    """Round the matrices that stay unquantized to what 16 bits hold, in place: embeddings, head.

    Values that are exact in bfloat16 or float16 stay as they are; others are rounded to float16. Vectors (norms,
    biases) are kept in full. quantized: names of the linears that will be packed.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.removesuffix(".weight") in quantized:
            continue
        if narrowest(parameter.data).dtype.itemsize > 2 and bool(parameter.half().isfinite().all()):
            parameter.data.copy_(parameter.half())


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def quantization_config(
    model: nn.Module, method: str, act_scope: Scope, act_bits: int, provenance: dict[str, Any]
) -> BellbitConfig:
    """The `quantization_config` that describes a model's packed layers."""
    layouts: list[dict[str, Any]] = []
    modules: dict[str, dict[str, Any]] = {}
    rounded = []
    for name, layer in packed_linears(model).items():
        entry = {"layout": layer.layout, **layer.options}
        if entry not in layouts:
            layouts.append(entry)
        modules[name] = {"layout": layouts.index(entry), "shape": [layer.out_features, layer.in_features]}
        if layer.round_output:
            rounded.append(name)
    return BellbitConfig(method, layouts, modules, act_bits, act_scope, rounded, provenance=provenance)


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds, by name; tied tensors once, matrices in 16 bits where that is exact."""
    tied = set(model.all_tied_weights_keys)
    packed = {f"{name}.{key}" for name, layer in packed_linears(model).items() for key in layer.packed.tensors}
    return {
        name: narrowest(tensor) if tensor.ndim >= 2 and name not in packed else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def save_checkpoint(
    model: Any, tokenizer: Any, config: BellbitConfig, target: Path, overwrite: bool, probe: Tensor
) -> None:
    """Write everything beside `target`, load it again, compare logits, and only then rename it into place.

    probe: token ids (n,) to compare logits on.
    Raises BellbitError if the disk is full or the reloaded model does not give the same logits.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder.chmod(0o755)
        write_shards(stored_tensors(model), folder)
        model.config.quantization_config = config
        model.config.dtype = model.dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        _check_reload(model, folder, probe)
        _put_in_place(folder, target, overwrite)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BellbitError(f"no space left while writing {target}; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_reload(model: Any, folder: Path, probe: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        before, after = (network(probe[None], use_cache=False).logits for network in (model, reloaded))
    difference = float((before - after).abs().max() / before.abs().max())
    if not difference <= RELOAD_TOLERANCE:
        raise BellbitError(
            f"the saved checkpoint gives other logits than the model in memory (by {difference:.2g} of the "
            "largest); nothing was kept. This is a fault of bellbit: please report it."
        )


def _put_in_place(folder: Path, target: Path, overwrite: bool) -> None:
    """Rename `folder` to `target`, replacing what is there only with `overwrite`."""
    if overwrite and target.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.replace(old)
        folder.replace(target)
        shutil.rmtree(old)
    else:
        folder.replace(target)  # an empty directory may be replaced, anything else raises
