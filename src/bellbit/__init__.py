"""bellbit: language models at about one bit per weight, packed for real.

After `import bellbit`, transformers loads bellbit checkpoints: `AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from bellbit import qat as qat
    from bellbit.core.ltdb import learn_column_scales as learn_column_scales
    from bellbit.errors import BellbitError as BellbitError
    from bellbit.packed.tensor import PackedTensor as PackedTensor
    from bellbit.ptq.methods import quantize_weight as quantize_weight
    from bellbit.ptq.quantize import quantize as quantize

__version__ = "0.1.0"

_HOMES = {
    "BellbitError": "bellbit.errors",
    "PackedTensor": "bellbit.packed.layouts",
    "learn_column_scales": "bellbit.core.ltdb",
    "quantize": "bellbit.ptq.quantize",
    "quantize_weight": "bellbit.ptq.methods",
}
__all__ = ["__version__", "qat", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports the public functions when first used: torch and transformers take seconds, `--help` must not."""
    if name == "qat":
        return importlib.import_module("bellbit.qat")
    if name not in _HOMES:
        raise AttributeError(f"module 'bellbit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_: object) -> None:
    """Tells transformers about the checkpoints as soon as it can load any."""
    importlib.import_module("bellbit.packed.hf")
