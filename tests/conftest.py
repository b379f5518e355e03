"""Tiny random models with a byte tokenizer, and English text that is always at hand."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which torch does at times

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.opt import OPTConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from bellbit.ptq import sampling

torch.set_num_threads(1)  # the models are so small that a second thread only costs

VOCABULARY = 258  # the bytes, <s>, </s>
LLAMA_LIKE = {
    "hidden_size": 192,  # a block of 128 and a shorter one of 64
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE, sliding_window=48),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=32),
    "gemma3_text": lambda: Gemma3TextConfig(
        **LLAMA_LIKE,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
    "opt": lambda: OPTConfig(
        hidden_size=192,
        ffn_dim=320,
        num_attention_heads=6,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        word_embed_proj_dim=192,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        dropout=0.0,
    ),
}


def byte_tokenizer():
    """One token per byte, no special tokens added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=512
    )


def random_model(config):
    """A random model whose norms, biases and channels differ as a trained model's do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and "bias" not in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(torch.randn(parameter.shape[1]).mul(0.5).exp() * 4)
    return model


@pytest.fixture(autouse=True, scope="session")
def own_texts(tmp_path_factory):
    """What tiny models write is not for the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("own")
        patch.setattr(sampling, "cache_dir", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_model(models_dir):
    """tiny_model(name) -> directory of a tiny model of that family."""

    def make(name):
        folder = models_dir / name
        if not folder.exists():
            random_model(CONFIGS[name]()).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def english(tmp_path_factory):
    """A .txt of technical English: Python's own help texts."""
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)))
    return path


@pytest.fixture(scope="session")
def vectors():
    from safetensors.torch import load_file

    return load_file(Path(__file__).parent / "data" / "ptq.safetensors")
