"""The models of BBQ's tables (arXiv 2603.01599, §5), and a tiny one for two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bellbit.errors import BellbitError

PAPER_ROWS = 50304  # of embedding and head, whatever the tokenizer needs of them


@dataclass(frozen=True)
class Preset:
    """A decoder and how long to train it. lr: of the published run. tokens: seen in all.

    rows: of the embedding, None for what the tokenizer needs. batch: sequences a step.
    """

    family: str
    layers: int
    width: int
    heads: int
    inner: int
    lr: float
    tokens: int
    seq_len: int = 512
    batch: int = 512
    rows: int | None = PAPER_ROWS

    def config(self, vocabulary: int, length: int, specials: Mapping[str, int | None]) -> Any:
        """The transformers config. length: of the longest sequence. specials: bos_token_id and the like."""
        from transformers.models.llama import LlamaConfig
        from transformers.models.opt import OPTConfig

        rows = vocabulary if self.rows is None else self.rows
        if rows < vocabulary:
            raise BellbitError(f"the tokenizer has {vocabulary} tokens, the preset only {rows} rows")
        common = {
            "vocab_size": rows,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": length,
            "tie_word_embeddings": False,
            **specials,
        }
        if self.family == "llama":
            return LlamaConfig(**common, intermediate_size=self.inner, rms_norm_eps=1e-5, initializer_range=0.02)
        return OPTConfig(
            **common,
            ffn_dim=self.inner,
            word_embed_proj_dim=self.width,
            activation_function="gelu",
            enable_bias=False,
            dropout=0.0,
            init_std=0.02,
        )


_SIZES = {  # layers, width, heads, SwiGLU width, lr, tokens
    "95m": (6, 640, 5, 1792, 1.2e-3, 3 * 10**9),
    "125m": (7, 768, 6, 2048, 1.2e-3, 5 * 10**9),
    "200m": (8, 1024, 8, 2816, 6e-4, 10 * 10**9),
    "300m": (10, 1280, 10, 3584, 3e-4, 20 * 10**9),
    "430m": (13, 1664, 13, 4608, 1.5e-4, 43 * 10**9),
    "800m": (16, 2048, 16, 5632, 7.5e-5, 80 * 10**9),
}
PRESETS: dict[str, Preset] = {
    "llama-tiny": Preset("llama", 4, 256, 4, 704, 2e-3, 20 * 10**6, seq_len=256, batch=16, rows=None),
    **{f"llama-{name}": Preset("llama", *size) for name, size in _SIZES.items()},
    **{f"gpt-{name}": Preset("gpt", *size[:3], 4 * size[1], *size[4:]) for name, size in _SIZES.items()},
}


def preset(name: str) -> Preset:
    """Raises BellbitError, listing what there is."""
    if name not in PRESETS:
        raise BellbitError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
