"""What a model stores, tensor by tensor, read from its files and not from its claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bellbit.errors import BellbitError, first_line
from bellbit.loading import Location
from bellbit.packed.checkpoint import StoredTensor, check_config, check_packed, module_layout, read_headers

KINDS = ("quantized", "embedding", "norm", "other")  # embedding: the head, too


@dataclass(frozen=True)
class Row:
    """One weight. kind: one of KINDS. bits: stored bits per weight by purpose. nominal: as papers count them."""

    name: str
    kind: str
    layout: str
    shape: tuple[int, ...]
    bits: dict[str, float]
    nominal: float
    nbytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return sum(self.bits.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Inspection:
    """rows: every weight. file_bytes: of all weight files, headers included."""

    model: str
    rows: list[Row]
    file_bytes: int

    def total(self, kind: str | None = None) -> Row:
        """All rows of a kind, or all there are, as one; bits and nominal bits averaged over the weights."""
        rows = [row for row in self.rows if kind in (None, row.kind)]
        count = sum(row.count for row in rows)
        parts = sorted({part for row in rows for part in row.bits})
        bits = {part: sum(row.bits.get(part, 0) * row.count for row in rows) / max(count, 1) for part in parts}
        nominal = sum(row.nominal * row.count for row in rows) / max(count, 1)
        layouts = {row.layout for row in rows}
        layout = layouts.pop() if len(layouts) == 1 else "mixed"
        return Row(kind or "total", kind or "total", layout, (count,), bits, nominal, sum(row.nbytes for row in rows))

    @property
    def linears(self) -> Row:
        """All quantized weights as one; of a file that is not bellbit's, all matrices besides embedding and head."""
        rows = [row for row in self.rows if row.kind == "quantized"]
        rows = rows or [row for row in self.rows if row.kind == "other" and len(row.shape) > 1]
        return Inspection(self.model, rows, self.file_bytes).total()

    @property
    def totals(self) -> list[Row]:
        """One row per kind that occurs, then one for everything."""
        return [self.total(kind) for kind in KINDS if any(row.kind == kind for row in self.rows)] + [self.total()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "file_bytes": self.file_bytes,
            "tensors": [row.to_dict() for row in self.rows],
            "totals": [row.to_dict() for row in self.totals],
        }


def inspect(location: Location) -> Inspection:
    """Read what a model stores, quantized or not, without loading it.

    Raises BellbitError if there are no weight files, or if a tensor is missing, cut or misshapen.
    """
    if location.gguf:
        return _inspect_gguf(location)
    folder = _folder(location)
    files = weight_files(folder)
    stored = read_headers(files)
    quantization = _read_json(folder / "config.json").get("quantization_config") or {}
    rows = []
    if quantization.get("quant_method") == "bellbit":
        check_config(quantization)
        check_packed(stored, quantization)
        for module in quantization["modules"]:
            rows.append(_packed_row(module, quantization, stored))
    rows += [_plain_row(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in stored.items()]
    size = sum(file.stat().st_size for file in files)
    return Inspection(location.spec, sorted(rows, key=lambda row: _natural(row.name)), size)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, in transformers' order: the usual one, those of an index, or any."""
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BellbitError(f"{index} has no weight_map")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise BellbitError(f"{folder} lacks weight files: {', '.join(missing) or '*.safetensors'}")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BellbitError(f"cannot read {path}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise BellbitError(f"{path} holds no JSON object")
    return content


def _folder(location: Location) -> Path:
    if Path(location.path).is_dir():
        return Path(location.path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location.path, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise BellbitError(f"cannot load {location.spec!r} from the hub: {first_line(error)}") from error


def _packed_row(module: str, quantization: dict[str, Any], stored: dict[str, StoredTensor]) -> Row:
    """The row of one quantized linear; takes its tensors out of `stored`."""
    layout, shape, options = module_layout(quantization, module)
    tensors, size = {}, 0
    for name, spec in layout.spec(shape, options).items():
        entry = stored.pop(f"{module}.{name}")
        size += entry.nbytes
        needed = name in layout.nominal_from
        tensors[name] = _read(f"{module}.{name}", entry) if needed else torch.empty(spec.shape, device="meta")
    packed = layout.build(shape, options, tensors)
    return Row(module, "quantized", layout.layout, shape, packed.bits, packed.nominal_bits, size)


def _read(name: str, tensor: StoredTensor) -> torch.Tensor:
    with safe_open(tensor.file, framework="pt") as file:
        return file.get_tensor(name)


def _plain_row(name: str, dtype: str, shape: Iterable[int], nbytes: int) -> Row:
    """The row of a tensor that is stored as it is, or as a foreign quantization stores it."""
    shape = tuple(shape)
    bits = 8 * nbytes / max(math.prod(shape), 1)
    if len(shape) == 1:
        kind = "norm" if "norm" in name or "ln_" in name else "other"
    else:
        tables = ("embed", "embd", "wte", "wpe", "lm_head", "output.weight")
        kind = "embedding" if any(word in name for word in tables) and "attn" not in name else "other"
    return Row(name, kind, dtype, shape, {"values": bits}, bits, nbytes)


def _inspect_gguf(location: Location) -> Inspection:
    from gguf import GGUFReader

    file = Path(location.path) / str(location.gguf)
    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # the reader parses as it goes and raises whatever it happens on
        raise BellbitError(f"{file} is no intact GGUF file: {first_line(error)}") from error
    rows = [
        _plain_row(tensor.name, tensor.tensor_type.name, (int(n) for n in reversed(tensor.shape)), int(tensor.n_bytes))
        for tensor in tensors
    ]
    return Inspection(location.spec, sorted(rows, key=lambda row: _natural(row.name)), file.stat().st_size)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
