"""The layouts a quantized weight can be stored in, by name."""

from __future__ import annotations

from bellbit.packed.codebook2 import Codebook2
from bellbit.packed.partial import Partial
from bellbit.packed.plain import Float16, NormalFloat
from bellbit.packed.planes import Bellbox, Sign128, Symmetric, Uniform
from bellbit.packed.rowcolumn import RowColumn
from bellbit.packed.tensor import PackedTensor

LAYOUTS: dict[str, type[PackedTensor]] = {
    cls.layout: cls
    for cls in (Sign128, Symmetric, Codebook2, RowColumn, Partial, Uniform, Bellbox, NormalFloat, Float16)
}
