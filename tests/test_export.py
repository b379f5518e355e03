"""GGUF export: read back by the gguf package, and run by stock llama.cpp where the package xllamacpp is there."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

import bellbit
from bellbit.errors import BellbitError
from bellbit.exporting import export_gguf
from bellbit.loading import load_model, locate
from bellbit.packed.gguf_export import export
from bellbit.packed.gguf_tokenizer import _split_rule, add_tokenizer
from bellbit.packed.gguf_types import TYPES, choose, pack_q6_k
from bellbit.packed.hf import _input_quantizer
from bellbit.packed.linear import packed_linears
from conftest import LLAMA_LIKE, VOCABULARY, little_room

_WIDTHS = LLAMA_LIKE | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "initializer_range": 0.06,  # logits of standard deviation 1; llama.cpp rounds activations to 8 bits itself
}
NOT_GIVEN = -30.0  # log-probability of a token that llama.cpp does not list
CONFIGS = {
    "llama": lambda: LlamaConfig(**_WIDTHS),
    "llama3": lambda: LlamaConfig(
        **_WIDTHS,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "linear": lambda: LlamaConfig(
        **_WIDTHS, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    ),
    "yarn": lambda: LlamaConfig(
        **_WIDTHS,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_WIDTHS | {"num_hidden_layers": 7},
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=16,
        tie_word_embeddings=False,
    ),
    "qwen2": lambda: Qwen2Config(**_WIDTHS),
    "qwen3": lambda: Qwen3Config(**_WIDTHS, head_dim=64),
}

# In a process of its own, since llama.cpp writes to the terminal and ends the process where it cannot load a file.
LLAMA_CPP = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
tokens, answers = json.loads(sys.argv[2]), []
for length in range(4, len(tokens)):
    answer = server.handle_completions({"prompt": tokens[:length], "max_tokens": 1, "logprobs": N, "n_probs": N,
                                        "temperature": 0, "ignore_eos": True})
    found = answer["choices"][0]["logprobs"]  # none where the likeliest token is no text, as </s>
    found = found["content"][0]["top_logprobs"] if found else []
    answers.append({str(entry["id"]): entry["logprob"] for entry in found})
open(sys.argv[3], "w").write(json.dumps(answers))
""".replace("N", str(VOCABULARY))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a small random model with widths that Q1_0 can hold."""
    made = {}

    def make(name, method="sign", **options):
        if (name, method) not in made:
            folder = tmp_path_factory.mktemp("export")
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder / "source")
            ascii_tokenizer().save_pretrained(folder / "source")
            made[name, method] = folder / "out"
            text = folder / "text.txt"
            text.write_text("".join(random.Random(0).choices("abcdefghijklm", k=4000)))
            bellbit.quantize(
                folder / "source", made[name, method], method, calib=str(text), samples=8, seq_len=64, **options
            )
        return made[name, method]

    return make


def ascii_tokenizer():
    """256 tokens of one or two ASCII characters: llama.cpp holds back what is no whole character, as most bytes."""
    letters, pair = [chr(code) for code in range(33, 127)], "abcdefghijklm"
    merges = [(first, second) for first in pair for second in pair][: 256 - len(letters)]
    vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def read(file):
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


def test_sign128_becomes_q1_0_byte_for_byte(checkpoint, tmp_path):
    folder, out = checkpoint("qwen3"), tmp_path / "model.gguf"
    written = export_gguf(folder, out)
    stored = read(out)
    layers = packed_linears(AutoModelForCausalLM.from_pretrained(folder))
    assert len(layers) == 14
    down = layers["model.layers.1.mlp.down_proj"].packed
    tensor = stored["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == "Q1_0"
    assert bytes(tensor.data.tobytes()) == bytes(down.blocks.numpy().tobytes())
    kinds = {item.name: item.kind for item in written}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q6_K"
    assert [kind for name, kind in kinds.items() if "blk" in name and "norm" not in name] == ["Q1_0"] * 14
    one = next(item for item in written if item.kind == "Q1_0")
    assert one.bits_per_weight == 1.125 and one.error == 0
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays


def test_an_exported_file_of_signs_is_read_again(checkpoint, tmp_path):
    folder, out = checkpoint("llama"), tmp_path / "model.gguf"
    export_gguf(folder, out)
    model = load_model(locate(str(out)), "float32")
    for name, layer in packed_linears(AutoModelForCausalLM.from_pretrained(folder)).items():
        assert torch.equal(model.get_submodule(name).weight, layer.packed.dequantize())


def test_signs_beside_finer_weights_become_q1_0_too(checkpoint, tmp_path):
    folder, out = checkpoint("llama", "bellbit", bpw=1.4, rungs=("budget", "codes")), tmp_path / "model.gguf"
    written = {item.name: item for item in export_gguf(folder, out)}
    layers = packed_linears(AutoModelForCausalLM.from_pretrained(folder))
    assert {1, 2} <= {layer.packed.nominal_bits for layer in layers.values()}
    for part, linear in (("attn_v", "self_attn.v_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
        item, packed = written[f"blk.1.{part}.weight"], layers[f"model.layers.1.{linear}"].packed
        assert item.kind == ("Q1_0" if packed.nominal_bits == 1 else "Q8_0")
        assert 0 < item.error < (1e-7 if item.kind == "Q1_0" else 1e-3)  # float16's for scales 2⁻¹² at most: 6e-8


def test_other_layouts_take_a_wider_type_within_the_budget(checkpoint, tmp_path):
    folder = checkpoint("llama", "rtn")
    for budget, kinds in ((8.5, {"Q8_0"}), (5.2, {"Q4_0", "Q4_1"})):
        written = export_gguf(folder, tmp_path / "model.gguf", budget=budget, overwrite=True)
        linears = [item for item in written if "ffn" in item.name and "norm" not in item.name]
        assert {item.kind for item in linears} <= kinds
        assert all(item.bits_per_weight <= budget for item in linears)
        assert all(item.error < 0.02 for item in linears)


def test_q6_k_is_read_back_by_the_library():
    values = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    values[1, :256] = 0
    back = TYPES["Q6_K"].unpack(pack_q6_k(values))
    assert np.square(back - values).sum() / np.square(values).sum() < 1e-3  # 6-bit rounding; measured 4e-4
    assert not back[1, :256].any()


def test_the_chosen_type_has_the_least_error():
    values = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    kind, stored, error = choose(values, 6.5)
    errors = {
        name: float(np.square(t.unpack(t.pack(values)) - values).sum() / np.square(values).sum())
        for name, t in TYPES.items()
        if t.bits <= 6.5 and values.shape[1] % t.block == 0
    }
    assert kind.name == min(errors, key=errors.get) and error == pytest.approx(errors[kind.name])
    assert stored.nbytes * 8 == kind.bits * values.size
    with pytest.raises(BellbitError, match=r"no GGUF type of at most 3 bits a weight holds rows of 96 columns"):
        choose(values, 3)


def test_a_write_that_fails_half_way_leaves_no_file(checkpoint, tmp_path):
    folder = checkpoint("llama")
    message = r"while writing .*model.gguf; make room, or give another name"
    with little_room(), pytest.raises(BellbitError, match=message):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_says_why(checkpoint, tiny_model, tmp_path):
    with pytest.raises(BellbitError, match=r"must end in \.gguf"):
        export_gguf(checkpoint("llama"), tmp_path / "model")
    with pytest.raises(BellbitError, match="no checkpoint of bellbit"):
        export_gguf(tiny_model("llama"), tmp_path / "model.gguf")
    bellbit.quantize(tiny_model("opt"), tmp_path / "opt", "sign")
    with pytest.raises(BellbitError, match="architecture 'opt' cannot be exported"):
        export_gguf(tmp_path / "opt", tmp_path / "model.gguf")
    with pytest.raises(BellbitError, match="embedding Q9 is not possible"):
        export_gguf(checkpoint("llama"), tmp_path / "model.gguf", embedding="Q9")
    with pytest.raises(BellbitError, match="cannot be Q6_K: its rows of 192"):
        bellbit.quantize(tiny_model("llama"), tmp_path / "narrow", "sign")
        export_gguf(tmp_path / "narrow", tmp_path / "model.gguf", embedding="Q6_K")
    trained, tokenizer = load_model(locate(str(checkpoint("llama")))), ascii_tokenizer()
    next(iter(packed_linears(trained).values())).input_quantizer = _input_quantizer("bbq:2")
    with pytest.raises(BellbitError, match=r"'model.layers.0.self_attn.q_proj' has its inputs quantized .* by bbq:2"):
        export(trained, tokenizer, tmp_path / "model.gguf")
    with pytest.raises(BellbitError, match=r"a SimpleNamespace has no tokenizer\.json and cannot be exported"):
        add_tokenizer(None, SimpleNamespace(), 3)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


BYTES = {"type": "ByteLevel", "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{N}| ?[^\s]+"}}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel"}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([SPLIT, BYTES], "qwen2"),
        ([SPLIT | {"pattern": {"Regex": r"\p{N}{1,3}| ?[^\s]+"}}, BYTES], "llama-bpe"),
        ([SPLIT | {"pattern": {"Regex": r"[\p{Lu}\p{Lt}]*|\p{N}| ?[^\s]+"}}, BYTES], None),  # Mistral-Nemo's
        ([SPLIT, SPLIT, {"type": "Digits", "individual_digits": True}, BYTES], None),  # DeepSeek's
        ([BYTES], None),
    ],
)
def test_rules_of_splitting_are_named_as_llama_cpp_does_or_refused(steps, name):
    described = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if name is None:
        with pytest.raises(BellbitError, match=r"splits text by a rule that llama\.cpp has no known name for"):
            _split_rule(described)
    else:
        assert _split_rule(described) == name


def run_llama_cpp(script, file, what, answers):
    done = subprocess.run(
        [sys.executable, "-c", script, str(file), json.dumps(what), str(answers)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def llama_cpp(file, tokens):
    """Log-probabilities (positions, vocabulary) of each next token, by stock llama.cpp."""
    answers = file.with_suffix(".json")
    run_llama_cpp(LLAMA_CPP, file, tokens, answers)
    found = json.loads(answers.read_text())
    return torch.tensor([[answer.get(str(i), NOT_GIVEN) for i in range(VOCABULARY)] for answer in found])


@torch.no_grad()
def teach(model):
    """Fit the head so that the next token is 7·token + 3 (mod 256), most of the time.

    An untrained head's two best tokens are so near each other that they change places by any rounding at all, and
    llama.cpp rounds activations to 8 bits.
    """
    embedding = model.get_input_embeddings()
    embedding.weight.data = embedding.weight * 4  # so that blocks of random weights do not drown the token
    tokens = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(1))
    hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
    wanted = torch.nn.functional.one_hot((7 * tokens.flatten() + 3) % 256, VOCABULARY).float() * 16
    solution = torch.linalg.lstsq(hidden, wanted).solution.t()
    head = model.get_output_embeddings()
    head.weight.data = solution.to(head.weight.dtype).contiguous()


def sentencepiece_tokenizer(prepend):
    """As LLaMA 2's (a space is put before the text) and Gemma's: spaces are letters, unknown ones come as bytes."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyzABC.,!"]
    made = ["th", "he", "▁t", "▁the", "in", "er", "▁a", "▁an", "▁and", "on", "the", "ing", "▁▁"]  # best score first
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *made]
    vocabulary = {name: i for i, name in enumerate(names)}
    # a piece can be made of any two that are there: transformers' converters write all of these merges
    splits = [(piece[:at], piece[at:]) for piece in made for at in range(1, len(piece))]
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    rules = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


TOKENIZE = """
import json, sys, urllib.request, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.port = 64, 1, False, 0
server, answers = xllamacpp.Server(parameters), []
for text in json.loads(sys.argv[2]):
    body = json.dumps({"content": text}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    answers.append(json.load(urllib.request.urlopen(request))["tokens"])
open(sys.argv[3], "w").write(json.dumps(answers))
"""


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece_tokenizers_split_alike(tmp_path, prepend):
    pytest.importorskip("xllamacpp")
    torch.manual_seed(0)
    tokenizer = sentencepiece_tokenizer(prepend)
    config = LlamaConfig(**_WIDTHS | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    bellbit.quantize(tmp_path / "source", tmp_path / "out", "sign")
    export_gguf(tmp_path / "out", tmp_path / "model.gguf")
    texts = [
        "the thing and the other",
        "an inner ring, then",
        "Ünïcode → bytes!",
        "two  spaces",
        "a",
        " the",
        "zzz A.B",
    ]
    answers = tmp_path / "answers.json"
    run_llama_cpp(TOKENIZE, tmp_path / "model.gguf", texts, answers)
    assert json.loads(answers.read_text()) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(("name", "method"), [*((name, "sign") for name in CONFIGS), ("llama", "bellbit")])
def test_llama_cpp_gives_the_same_distribution(checkpoint, tmp_path, name, method):
    """Against the same weights unpacked to F16: mean KL ≤ 1e-3, the same top token in ≥ 98 % of positions."""
    pytest.importorskip("xllamacpp")
    folder = checkpoint(name, method)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teach(model)
    tokens = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    export(model, tokenizer, tmp_path / "packed.gguf", embedding="F16")
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0, 3:-1].log_softmax(dim=-1)
        for path, layer in packed_linears(model).items():
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight.copy_(layer.packed.dequantize())
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)
            model.set_submodule(path, dense)
    export(model, tokenizer, tmp_path / "dense.gguf", embedding="F16")
    packed, dense = llama_cpp(tmp_path / "packed.gguf", tokens), llama_cpp(tmp_path / "dense.gguf", tokens)
    answered = packed.ne(NOT_GIVEN).any(dim=1) & dense.ne(NOT_GIVEN).any(dim=1)
    assert int(answered.sum()) >= 50
    for one, other in ((dense, packed), (ours, packed)):
        one, other = one[answered], other[answered]
        divergence = (one.exp() * (one - other)).sum(dim=-1).mean()
        assert float(divergence) <= 1e-3
        assert float((one.argmax(dim=-1) == other.argmax(dim=-1)).float().mean()) >= 0.98
