"""Registration with transformers: a saved checkpoint loads through `AutoModelForCausalLM.from_pretrained`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bellbit.errors import BellbitError
from bellbit.packed.checkpoint import FORMAT_VERSION, check_config, module_layout, verify
from bellbit.packed.half import keep_half, settle_half
from bellbit.packed.linear import PackedLinear, packed_linears
from bellbit.packed.linears import unfuse
from bellbit.quantizers import Quantizer, quantizer

QUANT_METHOD = "bellbit"


@register_quantization_config(QUANT_METHOD)
class BellbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint; docs/format.md explains each field."""

    def __init__(
        self,
        method: str = "",
        layouts: Sequence[dict[str, Any]] = (),
        modules: dict[str, dict[str, Any]] | None = None,
        act_bits: int = 16,
        act_scope: str = "token",
        rounded_outputs: Sequence[str] = (),
        input_rule: str = "none",
        format_version: int = FORMAT_VERSION,
        provenance: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """layouts: layout name and options, each. modules: index into `layouts` and shape (out, in) by linear.

        act_bits, act_scope: rounding of every quantized linear's input. rounded_outputs: the linears whose
        output is rounded too. input_rule: METHOD:BITS of the quantizer that was trained for every linear's input.
        provenance: how the checkpoint was made; kept, not used.
        """
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.method = method
        self.layouts = list(layouts)
        self.modules = dict(modules or {})
        self.act_bits = act_bits
        self.act_scope = act_scope
        self.rounded_outputs = list(rounded_outputs)
        self.input_rule = input_rule
        self.provenance = dict(provenance or {})


@register_quantizer(QUANT_METHOD)
class BellbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty `PackedLinear`s into the model skeleton; transformers fills them straight from the file."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        described = config.to_dict()
        check_config(described)
        unfuse(model)
        present = dict(model.named_modules())
        linears: dict[str, nn.Linear] = {}
        for name in config.modules:
            linear = present.get(name)
            shape = module_layout(described, name)[1]
            if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != shape:
                raise BellbitError(f"config.json quantizes {name!r} as {shape}, but the model has no such linear layer")
            linears[name] = linear
        for name, linear in linears.items():
            layout, shape, options = module_layout(described, name)
            packed_layer = PackedLinear(
                shape,
                layout.layout,
                options,
                bias=linear.bias,
                act_bits=config.act_bits,
                act_scope=config.act_scope,
                round_output=name in config.rounded_outputs,
                input_quantizer=_input_quantizer(config.input_rule),
                device=torch.device("meta"),
            )
            packed_layer.weight = _settled()
            model.set_submodule(name, packed_layer)
        expected = set(model.state_dict()) - set(getattr(model, "all_tied_weights_keys", ()))
        files = [Path(file) for file in checkpoint_files or ()]
        keep_half(model, verify(files, described, expected))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for layer in packed_linears(model).values():
            del layer.weight
        settle_half(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _settled() -> Tensor:
    """What stands for a weight while a model loads: GPT-2's initialization asks each block for one."""
    weight = torch.empty(0)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def _input_quantizer(rule: str) -> Quantizer | None:
    """An empty one, to be filled from the file."""
    with torch.device("meta"):
        found = quantizer(rule)
    return found.settled() if isinstance(found, Quantizer) else None
