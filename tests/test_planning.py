"""The plan of a quantization, against what the quantization is."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import bellbit
from bellbit.cli import app
from bellbit.errors import BellbitError
from bellbit.inspection import inspect
from bellbit.loading import locate
from bellbit.planning import plan
from bellbit.report import plan_table

TEXT = {"samples": 4, "seq_len": 64}


@pytest.mark.parametrize(
    ("family", "method", "options", "whole"),
    [
        ("llama", "dbellquant", {"ltdb_steps": 2}, False),
        ("mixtral", "gptq", {"bits": 3}, False),
        ("gpt2", "sign", {}, False),
        ("qwen2", "bellbit", {"effort": "fast"}, True),
        ("qwen2", "bellbit", {"effort": "fast", "rungs": ("codes",)}, False),
        ("phi3", "arb-rc", {}, False),
    ],
)
def test_what_is_planned_is_what_comes(family, method, options, whole, tiny_model, english, tmp_path):
    told = plan(str(tiny_model(family)), method, **TEXT, **options)
    report = bellbit.quantize(tiny_model(family), tmp_path / "out", method, calib=str(english), **TEXT, **options)
    found = inspect(locate(str(tmp_path / "out")))
    assert told.weights == found.linears.count
    assert told.weights + told.rest == found.total().count
    assert told.blocks == 2 and told.whole is whole
    assert told.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.06)
    # tiny models are half headers and descriptions: tensors alone
    assert told.output_bytes == pytest.approx(found.total().nbytes, rel=0.06)
    assert all(value >= 0 for value in (*told.memory.values(), *told.seconds.values()))
    assert set(told.memory) >= {"libraries", "all blocks" if whole else "one block"}


def test_memory_is_counted_by_what_takes_it(tiny_model):
    few, many, spilled = (
        plan(str(tiny_model("llama")), samples=samples, seq_len=256, offload=offload).memory
        for samples, offload in ((8, False), (16, False), (16, True))
    )
    assert many["hidden states"] == 2 * few["hidden states"] == 2 * 16 * 256 * 192 * 4
    assert spilled["hidden states"] == 0
    assert few["one block"] == 4 * sum([192 * 192 * 2, 64 * 192 * 2, 3 * 320 * 192, 2 * 192])
    assert few["embeddings and head"] == 4 * (258 * 192 + 192)


def test_the_command_line_plans_and_runs_nothing(tiny_model, tmp_path):
    command = ["quantize", str(tiny_model("llama")), str(tmp_path / "out"), "--plan", "--json", "--samples", "4"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["blocks"] == 2
    assert not list(tmp_path.iterdir())
    shown = CliRunner().invoke(app, ["quantize", str(tiny_model("llama")), "--plan", "--samples", "4"]).stdout
    for words in ("memory at most, about", "time here, about", "checkpoint, about", "one block at a time"):
        assert words in shown


def test_memory_of_a_gpu_is_said_to_be_in_the_sum(tiny_model):
    told = plan(str(tiny_model("llama")), "sign")
    assert told.device == "cpu" and "memory at most, about" in plan_table(told).columns[0]._cells
    assert "memory at most, about, here and on cuda" in plan_table(replace(told, device="cuda")).columns[0]._cells


def test_without_a_plan_out_must_be_given(tiny_model):
    done = CliRunner().invoke(app, ["quantize", str(tiny_model("llama"))])
    assert isinstance(done.exception, BellbitError) and "Missing OUT" in str(done.exception)


def test_there_is_no_plan_for_an_architecture_that_must_be_run_to_be_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(BellbitError, match="no plan for the unknown architecture 'bloom': its linears are found by"):
        plan(str(tmp_path), allow_unknown=True)
