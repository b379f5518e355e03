"""Checkpoints on disk: safetensors shards whose every tensor is checked by size, shape and CRC-32 before use."""

from __future__ import annotations

import json
import math
import mmap
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from bellbit.core.activations import ACTIVATION_BITS, Scope
from bellbit.errors import BellbitError
from bellbit.packed.layouts import LAYOUTS
from bellbit.packed.tensor import PackedTensor
from bellbit.quantizers import input_tensors, parse

FORMAT_VERSION = 3
MAX_SHARD_SIZE = "1GB"  # as much is in memory while it is written
_CHECKSUMS = "crc32"
_DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header. dtype: as safetensors spells it. start, stop: byte range in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    checksum: int | None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises BellbitError if the header is no header, or for the first tensor whose bytes are not all there.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            if length > size - 8:
                raise ValueError("it is cut inside its header")
            header = json.loads(stream.read(length))
            checksums = json.loads(header.pop("__metadata__", {}).get(_CHECKSUMS, "{}"))
            entries = {
                name: _stored_tensor(file, entry, 8 + length, checksums.get(name)) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise BellbitError(f"{file} is no intact safetensors file: {error}") from None
    end = 8 + length
    for name, tensor in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise BellbitError(
                f"{file} is no intact safetensors file: tensor {name!r} does not follow on the one before"
            )
        end = tensor.stop
        if tensor.stop > size:
            raise BellbitError(
                f"{file} is cut off: tensor {name!r} ends at byte {tensor.stop}, the file at byte {size}; "
                "copy or download it again"
            )
        bits = int(re.sub(r"^[A-Z]*?(\d+).*$|^BOOL$", lambda found: found[1] or "8", tensor.dtype))
        if 8 * tensor.nbytes != math.prod(tensor.shape) * bits:
            what = f"{tensor.dtype} {tensor.shape}"
            raise BellbitError(f"{file}: tensor {name!r} of {what} cannot be {tensor.nbytes} bytes")
    return entries


def _stored_tensor(file: Path, entry: Any, base: int, checksum: int | None) -> StoredTensor:
    """One entry of a header. Raises ValueError, KeyError or TypeError if it is not well-formed."""
    start, stop = entry["data_offsets"]
    numbers = [start, stop, *entry["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or start > stop:
        raise ValueError(f"{entry} describes no tensor")
    if not isinstance(entry["dtype"], str) or not re.fullmatch(r"BOOL|[A-Z]+\d+\w*", entry["dtype"]):
        raise ValueError(f"{entry['dtype']!r} is no dtype")
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), base + start, base + stop, checksum)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of all shards by name."""
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def check_packed(stored: Mapping[str, StoredTensor], quantization: Mapping[str, Any]) -> None:
    """Raise BellbitError naming the first tensor that the `quantization_config` calls for and `stored` has not."""
    inputs = {
        f"input_quantizer.{field}": (torch.float32, shape)
        for field, shape in input_tensors(quantization.get("input_rule", "none")).items()
    }
    for module in quantization["modules"]:
        layout, shape, options = module_layout(quantization, module)
        weight = {field: (spec.dtype, spec.shape) for field, spec in layout.spec(shape, options).items()}
        for field, (dtype, wanted) in (weight | inputs).items():
            name = f"{module}.{field}"
            tensor = stored.get(name)
            if tensor is None:
                raise BellbitError(f"the checkpoint lacks the tensor {name!r}")
            if (tensor.dtype, tensor.shape) != (_DTYPE_NAMES[dtype], wanted):
                raise BellbitError(
                    f"tensor {name!r} is {tensor.dtype} {tensor.shape}, but config.json makes it "
                    f"{_DTYPE_NAMES[dtype]} {wanted}"
                )


def verify(files: Iterable[Path], quantization: Mapping[str, Any], expected: Iterable[str]) -> dict[str, StoredTensor]:
    """Check a checkpoint against its `quantization_config` before anything is loaded from it.

    expected: names of all tensors that the model takes from it. Returns what is stored, by name.
    Raises BellbitError naming the first tensor that is missing, cut, misshapen, or whose bytes have changed.
    """
    stored = read_headers(files)
    check_packed(stored, quantization)
    if missing := sorted(set(expected) - set(stored)):
        raise BellbitError(f"the checkpoint lacks the tensor {missing[0]!r}")
    by_file: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append((name, tensor))
    for file, tensors in by_file.items():
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            view = memoryview(content)
            for name, tensor in tensors:
                part = view[tensor.start : tensor.stop]
                changed = tensor.checksum is not None and zlib.crc32(part) != tensor.checksum
                part.release()
                if changed:
                    view.release()
                    raise BellbitError(f"{file}: the bytes of tensor {name!r} are not those that were written")
            view.release()
    return stored


def module_layout(
    quantization: Mapping[str, Any], module: str
) -> tuple[type[PackedTensor], tuple[int, int], dict[str, Any]]:
    """Layout, shape (out, in) and options of one quantized linear, as the `quantization_config` gives them.

    Raises BellbitError if they are not well-formed.
    """
    try:
        entry = quantization["modules"][module]
        rows, columns = entry["shape"]
        options = dict(quantization["layouts"][entry["layout"]])
        layout = LAYOUTS[options.pop("layout")]
        if set(options) != set(layout.allowed_options):
            raise ValueError(f"its options are {sorted(options)}, not {sorted(layout.allowed_options)}")
        if not all(type(number) is int and number > 0 for number in (rows, columns)):
            raise ValueError("a shape is two positive integers")
        for name, allowed in layout.allowed_options.items():
            if type(options[name]) is not int or options[name] not in allowed:
                raise ValueError(f"its {name} is {options[name]}; allowed: {allowed}")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BellbitError(f"config.json describes the layout of {module!r} wrongly: {error!r}") from None
    return layout, (rows, columns), options


def check_config(quantization: Mapping[str, Any]) -> None:
    """Raise BellbitError for a `quantization_config` of another format version, or one that makes no sense."""
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        way_out = "quantize again" if isinstance(version, int) and version < FORMAT_VERSION else "upgrade bellbit"
        raise BellbitError(
            f"this checkpoint has format version {version}, this bellbit reads {FORMAT_VERSION}: {way_out}"
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise BellbitError("config.json names no quantized modules")
    for name, allowed in (("act_bits", ACTIVATION_BITS), ("act_scope", get_args(Scope))):
        if quantization.get(name) not in allowed:
            raise BellbitError(f"config.json has {name} {quantization.get(name)!r}; allowed: {allowed}")
    try:
        parse(quantization.get("input_rule", "none"))
    except (BellbitError, AttributeError) as error:
        raise BellbitError(f"config.json has input_rule {quantization['input_rule']!r}: {error}") from None
    if strange := set(quantization.get("rounded_outputs", ())) - set(modules):
        raise BellbitError(f"config.json rounds the output of {sorted(strange)[0]!r}, which is not quantized")
    for module in modules:
        module_layout(quantization, module)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write `tensors` as `model.safetensors`, or as shards with an index, checksums in their metadata.

    tensors: looked up twice each, so that a mapping may make them when asked; no more than a shard is held.
    Raises BellbitError if the disk has no room.
    """
    described = {name: tensor.to("meta") for name, tensor in tensors.items()}
    needed = sum(tensor.nbytes for tensor in described.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BellbitError(
            f"no space: the checkpoint takes {needed / 1e6:.0f} MB, {folder.parent} has {free / 1e6:.0f} MB left"
        )
    plan = split_torch_state_dict_into_shards(described, max_shard_size=MAX_SHARD_SIZE)
    for filename, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        checksums = json.dumps({name: checksum(tensor) for name, tensor in sorted(shard.items())})
        save_file(shard, folder / filename, metadata={"format": "pt", _CHECKSUMS: checksums})
        _order_metadata(folder / filename)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _order_metadata(file: Path) -> None:
    """Rewrite the header with its metadata in order: safetensors writes them in a random one, differing by run."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = {"__metadata__": header.pop("__metadata__"), **header}
        content = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(content) == length, "a header's length does not change with the order of its entries"
        stream.seek(8)
        stream.write(content)
