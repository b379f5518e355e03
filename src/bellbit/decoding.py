"""Generation one token at a time through the compiled decoder, under transformers' own `generate`.

Sampling, stopping and streaming stay transformers'. Only the model's forward pass for a single new token is replaced,
for architectures that are LLaMA's up to details: it spends more time between operations than in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from bellbit.kernels import native
from bellbit.loading import cache_argument
from bellbit.packed.half import HalfEmbedding, HalfLinear
from bellbit.packed.linear import PackedLinear

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def supports(model: Any, length: int) -> bool:
    """Whether the compiled decoder can run a model for sequences of up to `length` tokens."""
    config = model.config
    if not native.available() or type(model).__name__ not in ARCHITECTURES or model.device.type != "cpu":
        return False
    blocks = model.model.layers
    linears = [block.get_submodule(name) for block in blocks for name in _PROJECTIONS.values()]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        model.dtype == torch.float32
        and config.hidden_act == "silu"
        and getattr(config, "rope_parameters", {}).get("rope_type", "default")
        in ("default", "linear", "llama3", "yarn")
        and (window is None or length <= window)
        and isinstance(model.get_input_embeddings(), HalfEmbedding)
        and isinstance(model.get_output_embeddings(), HalfLinear)
        and all(isinstance(x, PackedLinear) and native.supports(x.packed) and not x.round_output for x in linears)
        and not any(x.layout == "bellbox" or x.input_quantizer is not None for x in linears)
    )


class Decoder:
    """The compiled decoder of one model, with a cache for `capacity` positions."""

    def __init__(self, model: Any, capacity: int) -> None:
        """model: one that `supports` is true of; its tensors are used where they lie."""
        config, blocks = model.config, model.model.layers
        attention = blocks[0].self_attn
        self.vocabulary = config.vocab_size
        positions = torch.arange(capacity)[None]
        cosines, sines = model.model.rotary_emb(torch.empty(0, dtype=torch.float32), positions)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self._kept: list[Tensor] = []  # the decoder has only their addresses
        self._decoder = native.decoder(
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_size=attention.head_dim,
            epsilon=config.rms_norm_eps,
            scale=attention.scaling,
            capacity=capacity,
            cosines=self._address(cosines[0]),
            sines=self._address(sines[0]),
            embedding=native.dense_weight(embedding),
            norm=self._address(model.model.norm.weight),
            head=native.layer(native.dense_weight(head.weight), 0, 16, "token"),
        )
        for block in blocks:
            self._decoder.add(self._block(block))

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _layer(self, linear: PackedLinear) -> Any:
        return native.layer(native.weight(linear.packed), self._address(linear.bias), linear.act_bits, linear.act_scope)

    def _block(self, block: nn.Module) -> Any:
        def norm(name: str) -> int:
            try:
                module: Any = block.get_submodule(name)
            except AttributeError:
                return 0
            return self._address(module.weight)

        linears: dict[str, Any] = {key: block.get_submodule(name) for key, name in _PROJECTIONS.items()}
        return native.block(
            input_norm=norm("input_layernorm"),
            post_norm=norm("post_attention_layernorm"),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            **{key: self._layer(linear) for key, linear in linears.items()},
        )

    def take_over(self, cache: Any) -> None:
        """Copy what transformers' cache holds of a prompt: keys and values (1, heads, length, head size) per block."""
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys.float().contiguous(), layer.values.float().contiguous()
            self._decoder.set_cache(index, keys.data_ptr(), values.data_ptr(), keys.shape[-2])

    def step(self, token: int, position: int) -> Tensor:
        """Logits of the token at `position`: float32 (vocabulary,)."""
        logits = torch.empty(self.vocabulary)
        self._decoder.step(token, position, logits.data_ptr(), torch.get_num_threads())
        return logits


@contextmanager
def fast_steps(model: Any, capacity: int) -> Iterator[dict[str, Any]]:
    """While open, `model.generate(**options)` for one sequence runs single tokens through the compiled decoder.

    Gives the options to pass: a cache that counts on after the prompt; none for a model that is not supported.
    """
    if not supports(model, capacity):
        yield {}
        return
    from transformers import DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Counting(DynamicCache):  # type: ignore[misc]
        steps = 0

        def get_seq_length(self, *arguments: Any, **options: Any) -> int:
            return int(super().get_seq_length(*arguments, **options)) + self.steps

    cache, decoder, original = Counting(config=model.config), Decoder(model, capacity), model.forward
    name = cache_argument(model)

    def forward(input_ids: Tensor, **options: Any) -> Any:
        if options.get(name) is not cache or input_ids.shape[0] != 1:
            return original(input_ids=input_ids, **options)
        position = cache.get_seq_length()
        if input_ids.shape[1] > 1 or position == 0:
            output = original(input_ids=input_ids, **options)
            decoder.take_over(cache)
            return output
        cache.steps += 1
        return CausalLMOutputWithPast(logits=decoder.step(int(input_ids), position)[None, None], **{name: cache})

    model.forward = wraps(original)(forward)  # generate() asks the signature what the model takes
    try:
        yield {name: cache}
    finally:
        del model.forward
