"""PackedTensor: a quantized weight in the form it is stored and run in.

A `PackedTensor` is a frozen dataclass whose tensor fields are exactly what a checkpoint stores under the
linear layer's name; all that it says about its size follows from them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self


class TensorSpec(NamedTuple):
    """Shape and dtype of a stored tensor, and what it holds: equal shares of "signs", "bitmap", "codes", "scales"."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PackedTensor(ABC):
    """A quantized weight of `shape` (out, in) in the form it is stored and run in."""

    layout: ClassVar[str]
    allowed_options: ClassVar[Mapping[str, Container[int]]]  # by name; all are integers
    nominal_from: ClassVar[tuple[str, ...]] = ()  # the stored tensors whose content `nominal_bits` depends on
    shape: tuple[int, int]

    @classmethod
    @abstractmethod
    def spec(cls, shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """What is stored for a weight of `shape` (out, in) under the layout's `options`, by field name."""

    @property
    def options(self) -> dict[str, Any]:
        """The layout's parameters, as config.json keeps them."""
        return {name: getattr(self, name) for name in self.allowed_options}

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per weight as papers quote them: without scales and bitmaps."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weights that the stored bits stand for: float32 (out, in)."""

    @classmethod
    def build(cls, shape: tuple[int, int], options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """From the stored tensors."""
        return cls(shape=shape, **options, **tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def bits(self) -> dict[str, float]:
        """Stored bits per weight by purpose, counted from the stored tensors."""
        return stored_bits(type(self), self.shape, self.options)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of weights."""
        return sum(self.bits.values())


def stored_bits(layout: type[PackedTensor], shape: tuple[int, int], options: Mapping[str, Any]) -> dict[str, float]:
    """Stored bits per weight by purpose for a weight of `shape` (out, in)."""
    bits: dict[str, float] = {}
    for spec in layout.spec(shape, options).values():
        size = 8 * spec.dtype.itemsize * math.prod(spec.shape)
        for part in spec.parts:
            bits[part] = bits.get(part, 0.0) + size / math.prod(shape) / len(spec.parts)
    return bits


def mean_over_weights(tensors: list[PackedTensor], value: Callable[[PackedTensor], float]) -> float:
    """Mean of a value of packed tensors, each counted by how many weights it holds."""
    sizes = [math.prod(packed.shape) for packed in tensors]
    return sum(size * value(packed) for size, packed in zip(sizes, tensors, strict=True)) / sum(sizes)
