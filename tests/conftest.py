"""Tiny random models with a byte tokenizer, and English text that is always at hand."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which torch does at times

import pydoc_data.topics
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.falcon import FalconConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.smollm3 import SmolLM3Config
from transformers.models.stablelm import StableLmConfig

from bellbit.packed.linears import unfuse
from bellbit.ptq import sampling
from bellbit.ptq.families import family_of

torch.set_num_threads(1)  # the models are so small that a second thread only costs


def pytest_collection_modifyitems(items):
    """Files with most slow tests first: whole files are dealt out to processes, and none shall get a long one last."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


VOCABULARY = 258  # the bytes, <s>, </s>
PLAIN = {
    "hidden_size": 192,  # a block of 128 and a shorter one of 64
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
LLAMA_LIKE = {**PLAIN, "intermediate_size": 320, "num_key_value_heads": 2}
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
    "gemma2": lambda: Gemma2Config(
        **LLAMA_LIKE, head_dim=32, query_pre_attn_scalar=32, sliding_window=48, tie_word_embeddings=True
    ),
    "olmo2": lambda: Olmo2Config(**LLAMA_LIKE),
    "phi3": lambda: Phi3Config(**LLAMA_LIKE),
    "smollm3": lambda: SmolLM3Config(**LLAMA_LIKE),
    "stablelm": lambda: StableLmConfig(**LLAMA_LIKE),
    "stablelm-parallel": lambda: StableLmConfig(**LLAMA_LIKE, use_parallel_residual=True),
    "mixtral": lambda: MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(  # its first block has no experts
        **LLAMA_LIKE,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        mlp_only_layers=[0],
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**PLAIN, intermediate_size=320),
    "gpt2": lambda: GPT2Config(
        n_embd=192, n_inner=320, n_head=6, n_layer=2, n_positions=512, vocab_size=VOCABULARY, bos_token_id=256
    ),
    "falcon": lambda: FalconConfig(**PLAIN, ffn_hidden_size=320),
    "falcon-40b": lambda: FalconConfig(**PLAIN, ffn_hidden_size=320, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": lambda: FalconConfig(**PLAIN, ffn_hidden_size=320, parallel_attn=False, multi_query=False, alibi=True),
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


class Cut(Exception):
    """What ends a run in a test."""


def cut_after(stop):
    """A `progress` that ends the run when a share of more than `stop` is done."""

    def progress(share, text):
        if share > stop:
            raise Cut

    return progress


@contextmanager
def little_room():
    """No file can grow beyond 50 000 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def family_named(name):
    """The family of one of CONFIGS."""
    return family_of(CONFIGS[name]())


def random_model(config, as_stored=False):
    """A random model whose norms, biases and channels differ as a trained model's do.

    as_stored: with matrices as transformers has them, not each a linear.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and "bias" not in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(torch.randn(parameter.shape[-1]).mul(0.5).exp() * 4)
    if not as_stored:
        unfuse(model)
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
            random_model(CONFIGS[name](), as_stored=True).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def english(tmp_path_factory):
    """A .txt of technical English: of Python's own help texts, as much as is tokenized in no time."""
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))[:60_000])
    return path


@pytest.fixture(scope="session")
def vectors():
    from safetensors.torch import load_file

    return load_file(Path(__file__).parent / "data" / "ptq.safetensors")
