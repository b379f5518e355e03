"""PackedLinear: a linear layer whose weight exists only in packed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bellbit import kernels
from bellbit.core.activations import Scope, quantize_activations
from bellbit.packed.layouts import LAYOUTS
from bellbit.packed.planes import Bellbox
from bellbit.packed.tensor import PackedTensor
from bellbit.quantizers import Quantizer


class PackedLinear(nn.Module):
    """y = x̂·Ŵᵀ + b with a packed Ŵ and x̂ = x rounded to `act_bits` (16: not at all).

    The stored tensors are buffers named after the layout's fields, so that a state dict holds exactly what a
    file does. They keep their dtypes whatever the module is cast to.
    """

    bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        layout: str,
        options: Mapping[str, Any],
        *,
        bias: Tensor | None = None,
        act_bits: int = 16,
        act_scope: Scope = "token",
        round_output: bool = False,
        input_quantizer: Quantizer | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialized layer. shape: (out, in). round_output: round y as well as x.

        input_quantizer: what x goes through first, as it was trained and settled.
        """
        super().__init__()
        self.out_features, self.in_features = shape
        self.layout, self.options = layout, dict(options)
        self.act_bits, self.act_scope, self.round_output = act_bits, act_scope, round_output
        self._stored = tuple(LAYOUTS[layout].spec(shape, options))
        for name, spec in LAYOUTS[layout].spec(shape, options).items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        self.input_quantizer = input_quantizer
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def holding(cls, packed: PackedTensor, **arguments: Any) -> Self:
        """A layer with the weight `packed`; `arguments` as for the constructor."""
        layer = cls(packed.shape, packed.layout, packed.options, device="meta", **arguments)
        for name, tensor in packed.tensors.items():
            setattr(layer, name, tensor)
        return layer

    @property
    def packed(self) -> PackedTensor:
        """The weight, sharing the layer's buffers."""
        shape = (self.out_features, self.in_features)
        return LAYOUTS[self.layout].build(shape, self.options, {name: getattr(self, name) for name in self._stored})

    @property
    def input_rule(self) -> str:
        """METHOD:BITS of the quantizer that x goes through first; none for none."""
        return "none" if self.input_quantizer is None else self.input_quantizer.spec

    def forward(self, x: Tensor) -> Tensor:
        packed, rule = self.packed, self.input_quantizer
        if rule is not None and isinstance(packed, Bellbox) and packed.rotated:
            if rule.bell is not None:
                return kernels.bellbox_linear(x, *rule.bell, rule.width, packed, self.bias)
            x = rule(x)
            if rule.rules.rotates:
                packed = replace(packed, rotated=0)  # it meets an input that is in its domain already
        elif rule is not None:
            x = kernels.rotate(rule(x)) if rule.rules.rotates else rule(x)  # back: H is its own inverse
        y = kernels.linear(x, packed, self.bias, self.act_bits, self.act_scope)
        return quantize_activations(y, self.act_bits, self.act_scope) if self.round_output else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as any module does, but never changes the dtype of a stored tensor."""
        dtypes = {name: getattr(self, name).dtype for name in self._stored}
        stored = {name: getattr(self, name) for name in self._stored}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in dtypes.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, stored[name].to(moved.device))
        return self

    def extra_repr(self) -> str:
        bits = self.packed.bits_per_weight
        inputs = f"A{self.act_bits}" if self.input_rule == "none" else self.input_rule
        return f"{self.in_features}, {self.out_features}, {self.layout}, {bits:.3f} bits, {inputs}"


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
