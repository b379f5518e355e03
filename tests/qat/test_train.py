"""Pre-training: schedule, groups, refusals; and whole runs, killed, resumed and shared among processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import LlamaConfig

from bellbit.errors import BellbitError
from bellbit.evaluate import perplexity
from bellbit.inspection import inspect
from bellbit.loading import locate
from bellbit.packed.linear import packed_linears
from bellbit.qat import QuantLinear, prepare
from bellbit.qat.presets import PRESETS, Preset, preset
from bellbit.qat.settings import Settings, count, read_recipe
from bellbit.qat.train import Diverged, one_cycle, parameter_groups, pretrain, train
from conftest import LLAMA_LIKE

pytest.importorskip("datasets")


@pytest.fixture
def settings(tmp_path, english):
    """A run of seconds: 20 steps of a model with 2 blocks of width 64."""
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    (tmp_path / "model").mkdir()
    LlamaConfig(**LLAMA_LIKE | tiny | {"vocab_size": 320}).save_pretrained(tmp_path / "model")
    return {
        "preset": None,
        "model": str(tmp_path / "model" / "config.json"),
        "data": str(english),
        "tokenizer": "train:320",
        "tokens": 20 * 8 * 32,
        "seq_len": 32,
        "batch": 8,
        "micro_batch": 4,
        "lr": 1e-2,
        "save_every": 4,
        "log_every": 1,
    }


def test_one_cycle_rises_and_falls():
    shares = [one_cycle(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(0.01) and shares[10] == 1 and shares[100] == pytest.approx(0.1)
    assert shares[5] == pytest.approx(0.505) and shares[55] == pytest.approx(0.55)


def test_weight_decay_is_for_the_weights_of_linears_alone():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_LIKE))
    prepare(model)
    decayed, others = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert decayed == {key for name, key in names.items() if name.endswith("_proj.weight")}
    assert decayed | others == set(names.values()) and not decayed & others


def test_presets_have_the_published_sizes():
    """Millions of parameters, by hand from the table of SPEC §3.3; without the embeddings for 430M and 800M."""
    sizes = {"95m": 94.87, "125m": 126.82, "200m": 205.80, "300m": 331.97, "430m": 443.07, "800m": 822.15}
    for name, wanted in sizes.items():
        config = preset(f"llama-{name}").config(32000, 512, {})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(p.numel() for p in model.parameters())
        count -= 2 * config.vocab_size * config.hidden_size if name in ("430m", "800m") else 0
        assert count / 1e6 == pytest.approx(wanted, abs=0.005)
        assert f"gpt-{name}" in PRESETS


def test_gpt_trains_without_biases(settings, tmp_path, monkeypatch):
    small = Preset("gpt", 2, 64, 2, 96, 1e-2, 2 * 8 * 32, seq_len=32, batch=8, rows=None)
    monkeypatch.setitem(PRESETS, "gpt-95m", small)
    chosen = {"preset": "gpt-95m", "model": None, "tokens": None}
    parameters = dict(train(tmp_path / "state", Settings(**settings | chosen)).model.named_parameters())
    biases = [parameter for name, parameter in parameters.items() if name.endswith("bias")]
    assert biases and not any(map(torch.any, biases))
    assert bool((parameters["model.decoder.final_layer_norm.weight"] != 1).any())


def test_a_run_learns_and_its_checkpoint_is_packed(settings, tmp_path):
    result = pretrain(tmp_path / "out", Settings(**settings))
    history = json.loads((tmp_path / "out.training" / "checkpoint-20" / "trainer_state.json").read_text())[
        "log_history"
    ]
    first = next(entry for entry in history if "loss" in entry)
    assert result.loss < first["loss"] - 0.5
    assert first["grad_norm"] > 0 and 1.9 < first["code_entropy"] <= 2 and first["gamma_weight"] > 0
    assert result.steps == 20 and result.tokens == 20 * 8 * 32
    rows, weights = 4 * 64 + 2 * 96 + 64, 4 * 64 * 64 + 3 * 64 * 96
    assert result.bits_per_weight == pytest.approx(2 + 32 * rows / weights)  # a 32-bit scale a row
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.quantization_config.input_rule == "bbq:2"


def test_the_packed_file_has_the_perplexity_of_what_was_trained(settings, tmp_path):
    model = train(tmp_path / "state", Settings(**settings)).model
    for stored_in_16_bits in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        stored_in_16_bits.data.copy_(stored_in_16_bits.half())
    windows = torch.randint(2, 320, (12, 32), generator=torch.Generator().manual_seed(0))
    expected = perplexity(model, windows).perplexity
    pretrain(tmp_path / "out", Settings(**settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert perplexity(loaded, windows).perplexity == pytest.approx(expected, rel=1e-5)  # measured 0


@pytest.mark.parametrize("way", ["bf16", pytest.param("compile", marks=pytest.mark.slow)])
def test_autocast_and_compilation_learn_alike(settings, tmp_path, way):
    plain = train(tmp_path / "plain", Settings(**settings))
    other = pretrain(tmp_path / "out", Settings(**settings | {way: True}))
    assert other.loss == pytest.approx(plain.run.loss, rel=1e-2)  # measured 2e-4 and 6e-6
    trained = load_file(tmp_path / "out.training" / "checkpoint-20" / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values() if tensor.is_floating_point()} == {torch.float32}
    assert len(packed_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 14


@pytest.mark.parametrize(
    ("weights", "activations", "bits"),
    [("none", "none", 16), ("bbq:1", "none", 1), ("none", "bbq:2", 16), ("nf:3", "nf:4", 3), ("seq:4", "n2uq:2", 4)],
)
def test_weights_and_activations_are_chosen_apart(settings, tmp_path, weights, activations, bits):
    chosen = {"tokens": 2 * 8 * 32, "weights": weights, "activations": activations}
    result = pretrain(tmp_path / "out", Settings(**settings | chosen))
    assert bits <= result.bits_per_weight < bits + 0.6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    packed = weights != "none" or activations != "none"
    assert len(packed_linears(model)) == (14 if packed else 0)
    if packed:
        seen = inspect(locate(str(tmp_path / "out"))).total("quantized")
        assert seen.bits_per_weight == pytest.approx(result.bits_per_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "lsq:1"}, "lsq is not defined at 1 bits"),
        ({"preset": "llama-1t", "model": None}, "unknown preset 'llama-1t'; there are llama-tiny"),
        ({"preset": "llama-tiny"}, "give either --preset or --model"),
        ({"lr": -1}, "--lr -1 is not possible"),
        ({"micro_batch": 3}, "--batch 8 is no multiple of --micro-batch 3"),
        ({"batch": 100_000, "micro_batch": 100_000}, "too few for one batch of 100000"),
        ({"tokenizer": "train:9"}, "--tokenizer train:9 is not possible"),
        ({"lr": 1e30}, r"training diverged after step 1: the loss is nan, and what .*q_proj gives is not finite"),
        ({"lr": 1e32, "tokens": 8 * 32}, "after the last step what .* gives is not finite"),
        ({"tokenizer": "train:330"}, "the tokenizer has 330 tokens, the model only 320 rows"),
        ({"model": "nowhere.json"}, "cannot read --model nowhere.json"),
        ({"report_to": "wandb"}, "--report-to wandb is unknown or not installed; here are none"),
    ],
)
def test_what_cannot_be_is_said(settings, tmp_path, change, message):
    with pytest.raises(BellbitError, match=message):
        pretrain(tmp_path / "out", Settings(**settings | change))
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_no_number_stops_before_it_ruins_a_checkpoint(settings, tmp_path, monkeypatch):
    poisoned = []

    def forward(layer, x, plain=QuantLinear.forward):
        poisoned.append(None)
        y = plain(layer, x)
        if len(poisoned) == 14 * 2 * 5 and y.requires_grad:  # the last linear of the fifth step
            y.register_hook(lambda grad: grad * math.nan)
        return y

    monkeypatch.setattr(QuantLinear, "forward", forward)
    with pytest.raises(
        Diverged, match=r"after step 4: the loss is [\d.]+, and the gradient of model.layers.1.* is not"
    ):
        pretrain(tmp_path / "out", Settings(**settings | {"save_every": 1}))
    newest = tmp_path / "out.training" / "checkpoint-4"
    assert all(bool(values.isfinite().all()) for values in load_file(newest / "model.safetensors").values())
    monkeypatch.undo()
    assert pretrain(tmp_path / "out", Settings(**settings | {"save_every": 1}), resume=True).steps == 20


def test_a_run_that_never_began_leaves_nothing_to_the_next(settings, tmp_path):
    with pytest.raises(BellbitError, match="too few"):
        pretrain(tmp_path / "out", Settings(**settings | {"batch": 100_000, "micro_batch": 1}))
    result = pretrain(tmp_path / "out", Settings(**settings | {"tokenizer": "train:310", "tokens": 2 * 8 * 32}))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 310
    assert result.tokens == 2 * 8 * 32 and result.passes < 1


def test_other_settings_do_not_resume(settings, tmp_path):
    pretrain(tmp_path / "out", Settings(**settings | {"tokens": 4 * 8 * 32}))
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(BellbitError, match=r"--resume: lr was 0.01 in .* and is 0.1 now"):
        pretrain(tmp_path / "out", Settings(**settings | {"tokens": 4 * 8 * 32, "lr": 0.1}), resume=True)
    with pytest.raises(BellbitError, match="holds a run already: --resume goes on"):
        pretrain(tmp_path / "out", Settings(**settings))
    config = Path(settings["model"])
    config.write_text(config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 128'))
    with pytest.raises(BellbitError, match=r"--resume: config was .* and is .* now"):
        pretrain(tmp_path / "out", Settings(**settings | {"tokens": 4 * 8 * 32}), resume=True)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_published_recipes_fit(path):
    settings = Settings(**read_recipe(path))
    assert preset(settings.preset).tokens >= 3e9 and settings.batch * preset(settings.preset).seq_len == 262_144


def test_recipes_and_counts(tmp_path):
    (tmp_path / "good.yaml").write_text("preset: llama-95m\nlr: 0.001\n")
    assert read_recipe(tmp_path / "good.yaml") == {"preset": "llama-95m", "lr": 0.001}
    (tmp_path / "texts.yaml").write_text("lr: 1e-3\ntokens: 2M\nclip: 1\nbf16: true\n")  # YAML takes two for text
    assert read_recipe(tmp_path / "texts.yaml") == {"lr": 0.001, "tokens": 2_000_000, "clip": 1.0, "bf16": True}
    (tmp_path / "words.yaml").write_text("batch: many\n")
    with pytest.raises(BellbitError, match="batch is 'many', not of the kind int"):
        read_recipe(tmp_path / "words.yaml")
    (tmp_path / "bad.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(BellbitError, match="there is no 'learning_rate'; fields are preset"):
        read_recipe(tmp_path / "bad.yaml")
    assert [count(text) for text in ("2M", "3b", "1500", "0.5K")] == [2_000_000, 3_000_000_000, 1500, 500]
    with pytest.raises(BellbitError, match="--tokens 'many' is no number"):
        count("many")


RUN = """
import json, sys
from bellbit.qat.train import Settings, pretrain
pretrain(sys.argv[1], Settings(**json.loads(sys.argv[2])), {})
"""


def start(out, settings, launcher=(), resume=True, program=RUN, **environment):
    script = out.with_name("program.py")
    script.write_text(program.format("resume=True" if resume else ""))
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(out), json.dumps(settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights_of(out):
    return load_file(out / "model.safetensors")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(settings, tmp_path):
    whole = start(tmp_path / "whole", settings)
    assert whole.wait() == 0, whole.stderr.read()
    for checkpoint in (4, 12):
        process = start(tmp_path / "cut", settings)
        while process.poll() is None and not (tmp_path / "cut.training" / f"checkpoint-{checkpoint}").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut").exists()
    last = start(tmp_path / "cut", settings)
    assert last.wait() == 0, last.stderr.read()
    expected, actual = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert set(expected) == set(actual)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
SHARDED = (  # accelerate has FSDP on accelerators alone: let it take the two processes for such
    """
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

def assign(self, value):
    self.__dict__["distributed_type"] = {{DistributedType.MULTI_CPU: DistributedType.MULTI_GPU}}.get(value, value)

PartialState.distributed_type = property(lambda self: self.__dict__["distributed_type"], assign)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
torch.distributed.init_process_group("gloo")
"""
    + RUN
    + "assert AcceleratorState().distributed_type == DistributedType.FSDP"
)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}


def losses_of(out):
    state = out.with_name(out.name + ".training") / "checkpoint-20" / "trainer_state.json"
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_two_processes_follow_the_loss_of_one(settings, tmp_path):
    """Copies of the model (DDP) and halves of it (FSDP2); these add in another order, which flips single codes."""
    settings |= {"data": f"{settings['data']}[:3000]"}  # three passes and a rest
    ways = {"one": {}, "copies": {"launcher": TWO}, "halves": {"launcher": TWO, "program": SHARDED} | FSDP}
    for name, way in ways.items():
        process = start(tmp_path / name, settings, resume=False, **way)
        assert process.wait() == 0, process.stderr.read()
    expected = losses_of(tmp_path / "one")
    assert len(expected) == 20
    for name, tolerance in (("copies", 1e-4), ("halves", 1e-3)):  # measured 0 and 1.04e-4
        assert max(abs(a - b) for a, b in zip(expected, losses_of(tmp_path / name), strict=True)) <= tolerance, name
        assert set(weights_of(tmp_path / name)) == set(weights_of(tmp_path / "one"))
