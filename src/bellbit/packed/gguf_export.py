"""Export to GGUF, for stock llama.cpp: signs become Q1_0, `sign128` byte for byte; what cannot takes a wider type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bellbit.core.grid import spread
from bellbit.errors import BellbitError
from bellbit.files import beside
from bellbit.packed.bits import unpack_bits
from bellbit.packed.gguf_tokenizer import add_tokenizer
from bellbit.packed.gguf_types import TYPES, choose, relative_error
from bellbit.packed.linear import packed_linears
from bellbit.packed.planes import SIGN_BLOCK, Sign128, Symmetric
from bellbit.packed.tensor import PackedTensor
from bellbit.ptq.families import family_of

# transformers' model type -> llama.cpp's name of the architecture
ARCHITECTURES = {"gemma3_text": "gemma3", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_INTERLEAVED = ("llama",)  # rotary pairs lie side by side there, half a head apart in transformers
_GEMMA_PATTERN = 6  # of how many layers llama.cpp takes the last one to see everything, the others a window


@dataclass(frozen=True)
class Exported:
    """One tensor of the file. kind: its GGUF type. error: relative squared error of its values, 0 if exact."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    error: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / int(np.prod(self.shape))


def export(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    budget: float = 8.5,
    embedding: str = "auto",
    report: Callable[[float], None] = lambda share: None,
) -> list[Exported]:
    """Write a quantized model as a GGUF file, beside `out` first and then renamed.

    budget: bits a weight for quantized tensors that cannot be Q1_0. embedding: type of embedding and head, a key of
    TYPES; `auto` is Q6_K, or Q8_0 where rows are no multiple of 256. Activations of 8 or 6 bits are 16 bits there.
    Raises BellbitError if the architecture, its rotary scaling, the tokenizer or the quantizer that inputs were trained
    with has no counterpart in llama.cpp.
    """
    import gguf

    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise BellbitError(
            f"the architecture {config.model_type!r} cannot be exported; possible are {', '.join(ARCHITECTURES)}"
        )
    for name, layer in packed_linears(model).items():
        if layer.input_quantizer is not None:
            raise BellbitError(f"{name!r} has its inputs quantized as trained, by {layer.input_rule}; llama.cpp cannot")
    if embedding != "auto" and embedding not in TYPES:
        raise BellbitError(f"--embedding {embedding} is not possible; allowed: auto, {', '.join(TYPES)}")
    with beside(out) as part:
        writer = gguf.GGUFWriter(part, architecture)
        _add_settings(writer, config)
        add_tokenizer(writer, tokenizer, config.vocab_size)
        names = gguf.get_tensor_name_map(
            next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
        )
        written = []
        tensors = list(_tensors(model))
        for index, (name, tensor) in enumerate(tensors):
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise BellbitError(f"the tensor {name!r} has no counterpart in llama.cpp's {architecture} models")
            written.append(_add_tensor(writer, target, name, tensor, config, architecture, budget, embedding))
            report((index + 1) / len(tensors))
        if (factors := _rope_factors(model)) is not None:
            written.append(_plain(writer, "rope_freqs.weight", factors))
        writer.add_file_type(_file_type(written))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return written


def _file_type(written: list[Exported]) -> int:
    """What llama.cpp calls a file of these tensors: by the type of most of its weights."""
    import gguf

    weights: Counter[str] = Counter()
    for tensor in written:
        weights[tensor.kind] += int(np.prod(tensor.shape))
    (kind, _), *_ = weights.most_common(1)
    return int(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}", gguf.LlamaFileType.GUESSED))


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Everything the file holds, by transformers' names: packed weights as they are, all else as tensors."""
    packed = packed_linears(model)
    for name, layer in packed.items():
        yield f"{name}.weight", layer.packed
    inside = {f"{name}.{field}" for name, layer in packed.items() for field in layer.packed.tensors}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name not in inside and name not in tied:
            yield name, tensor


def _in_order(rows: Tensor, name: str, config: Any, architecture: str) -> Tensor:
    """Rows as llama.cpp wants them: those of q and k from transformers' halves of a head to pairs."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or architecture not in _INTERLEAVED:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _add_tensor(
    writer: Any, target: str, name: str, tensor: Any, config: Any, architecture: str, budget: float, embedding: str
) -> Exported:
    turn = partial(_in_order, name=name, config=config, architecture=architecture)
    if isinstance(tensor, Tensor):
        if tensor.ndim == 1:
            offset = family_of(config).norm_offset if "norm" in name else 0.0  # llama.cpp multiplies by the weight
            return _plain(writer, target, turn(tensor) + offset)
        values = turn(tensor).float().numpy()
        kind = TYPES["Q6_K" if values.shape[1] % 256 == 0 else "Q8_0"] if embedding == "auto" else TYPES[embedding]
        if values.shape[1] % kind.block:
            raise BellbitError(
                f"{name!r} cannot be {kind.name}: its rows of {values.shape[1]} are no multiple of {kind.block}"
            )
        stored = kind.pack(values)
        return _matrix(writer, target, kind.name, values.shape, stored, relative_error(kind.unpack(stored), values))
    if (signs := _as_q1_0(tensor)) is not None:
        exact = signs is tensor
        error = 0.0 if exact else relative_error(signs.dequantize().numpy(), tensor.dequantize().numpy())
        return _matrix(writer, target, "Q1_0", tensor.shape, turn(signs.blocks).numpy(), error)
    values = turn(tensor.dequantize()).numpy()
    kind, stored, error = choose(values, budget)
    return _matrix(writer, target, kind.name, values.shape, stored, error)


def _as_q1_0(tensor: PackedTensor) -> Sign128 | None:
    """A weight as rows of Q1_0 have it, if it can be one: `sign128` can, and `symmetric` of one bit, whose scales
    become float16 and are repeated for every 128 columns.
    """
    columns = tensor.shape[1]
    if columns % SIGN_BLOCK:
        return None
    if isinstance(tensor, Symmetric) and tensor.width == 1 and tensor.group_size % SIGN_BLOCK == 0:
        scales = spread(tensor.scales / 2, columns // SIGN_BLOCK, tensor.group_size // SIGN_BLOCK)
        return Sign128.pack(unpack_bits(tensor.codes[0], columns), scales)
    return tensor if isinstance(tensor, Sign128) else None


def _matrix(writer: Any, name: str, kind: str, shape: tuple[int, ...], stored: Any, error: float) -> Exported:
    import gguf

    writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
    return Exported(name, kind, tuple(shape), stored.nbytes, error)


def _plain(writer: Any, name: str, tensor: Tensor) -> Exported:
    values = tensor.float().numpy()
    writer.add_tensor(name, values)
    return Exported(name, "F32", values.shape, values.nbytes, 0.0)


def _add_settings(writer: Any, config: Any) -> None:
    import gguf

    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "gemma3_text":
        _check_gemma(config, head_size)
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise BellbitError(f"rotary embeddings of the kind {kind!r} cannot be exported")


def _check_gemma(config: Any, head_size: int) -> None:
    """Raise BellbitError for what llama.cpp takes for granted in Gemma 3 and this model has otherwise."""
    local = config.rope_parameters["sliding_attention"]
    for what, found, wanted in (
        ("layer_types", config.layer_types, _gemma_layers(config.num_hidden_layers)),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, head_size),
        ("hidden_activation", config.hidden_activation, "gelu_pytorch_tanh"),
        ("attn_logit_softcapping", config.attn_logit_softcapping, None),
        ("rope_parameters of sliding layers", (local["rope_theta"], local["rope_type"]), (10000.0, "default")),
    ):
        if found != wanted:
            raise BellbitError(f"a Gemma 3 with {what} {found} cannot be exported; llama.cpp has {wanted} built in")


def _gemma_layers(count: int) -> list[str]:
    return ["sliding_attention" if (i + 1) % _GEMMA_PATTERN else "full_attention" for i in range(count)]


def _rope_factors(model: Any) -> Tensor | None:
    """By what LLaMA 3 divides each rotary frequency: a tensor of its own in llama.cpp."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "llama3":
        return None
    frequencies = model.model.rotary_emb.inv_freq.double()
    size = 2 * len(frequencies)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / frequencies).float()
