"""From a checkpoint to a GGUF file, with the checks around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bellbit.errors import BellbitError
from bellbit.files import writing
from bellbit.loading import load_config, load_model, load_tokenizer, locate, quantized_by
from bellbit.packed.gguf_export import Exported, export
from bellbit.packed.hf import QUANT_METHOD


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    budget: float = 8.5,
    embedding: str = "auto",
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Exported]:
    """Write a checkpoint of bellbit as the GGUF file `out`; see `packed.gguf_export.export` for the options.

    Raises BellbitError for anything the user can mend; no file is left then.
    """
    target = Path(out).expanduser().resolve()
    if target.suffix != ".gguf":
        raise BellbitError(f"{out} is no name of a GGUF file; it must end in .gguf")
    if target.exists() and not overwrite:
        raise BellbitError(f"{target} exists; give another name, or --overwrite")
    if not target.parent.is_dir():
        raise BellbitError(f"{target.parent} is no directory")
    location = locate(str(model))
    config = load_config(location)
    if quantized_by(config, location) != QUANT_METHOD:
        raise BellbitError(f"{model} is no checkpoint of bellbit; quantize it first (`--method sign` is the quickest)")
    network, tokenizer = load_model(location), load_tokenizer(location)
    with writing(target, "make room, or give another name"):
        return export(network, tokenizer, target, budget=budget, embedding=embedding, report=progress)
