"""Embedding and head that stay in the 16 bits they are stored in, while the model computes in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bellbit import kernels
from bellbit.packed.checkpoint import StoredTensor

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


class _Half(nn.Module):
    """A module whose `weight` keeps its 16 bits when the model is cast to something wider.

    compute_dtype: what the rest of the model computes in.
    """

    weight: Any  # a buffer once the model is loaded; a parameter in the classes this is mixed into
    compute_dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = self.weight
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=stored.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype.itemsize > stored.dtype.itemsize:
            self.weight = stored.to(self.weight.device)
        return self


class HalfEmbedding(_Half, nn.Embedding):
    """nn.Embedding with a 16-bit weight; what it returns is of `compute_dtype`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


class HalfLinear(_Half, nn.Linear):
    """nn.Linear with a 16-bit weight, multiplied without a wide copy of it."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.dense(input, self.weight, self.bias)


def keep_half(model: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Put 16-bit modules into the skeleton of a model for the embedding and the head, if they are stored so.

    A module that computes in 16 bits anyway is left alone, and so is a head with a bias.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for old, kind, half in ((embedding, nn.Embedding, HalfEmbedding), (head, nn.Linear, HalfLinear)):
        if type(old) is not kind or getattr(old, "bias", None) is not None:
            continue
        entry = stored.get(f"{names[old]}.weight")
        if entry is None and old is head and isinstance(embedding, HalfEmbedding):  # tied: the embedding's
            entry = stored.get(f"{names[embedding]}.weight")
        dtype = None if entry is None else _DTYPES.get(entry.dtype)
        if dtype is None or old.weight.dtype.itemsize <= dtype.itemsize:
            continue
        compute_dtype = old.weight.dtype
        old.__class__ = half  # the same module otherwise: padding index, hooks, what transformers has noted in it
        old.compute_dtype = compute_dtype
        old.weight = nn.Parameter(old.weight.to(dtype), requires_grad=False)


def settle_half(model: nn.Module) -> None:
    """Make the 16-bit weights buffers, after transformers has loaded and tied them as parameters.

    transformers takes the first parameter's dtype for the model's, and that would be the embedding's.
    """
    for module in model.modules():
        if isinstance(module, _Half) and "weight" in module._parameters:
            weight = module.weight.data
            del module.weight
            module.register_buffer("weight", weight)
