"""The command as a user meets it: messages, exit codes, JSON."""

import json
import subprocess
import sys
from unittest.mock import Mock

import pytest

from bellbit import cli


@pytest.fixture
def bellbit(monkeypatch, capsys):
    """bellbit(*arguments) -> exit code, stdout, stderr of the command, run in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bellbit", *map(str, arguments)])
        monkeypatch.setattr(cli, "out_console", cli.Console(file=None, width=200))
        monkeypatch.setattr(cli, "err_console", cli.Console(stderr=True, width=200))
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def quantized(bellbit, tiny_model, english, tmp_path):
    out = tmp_path / "out"
    options = ["--calib", english, "--samples", 2, "--seq-len", 64, "--ltdb-steps", 2, "--json"]
    code, stdout, stderr = bellbit("quantize", tiny_model("llama"), out, *options)
    assert code == 0, stderr
    return out, json.loads(stdout), stderr


def test_quantize_says_what_it_will_do_and_reports_in_json(quantized):
    out, report, stderr = quantized
    assert "by dbellquant, calibrated on 2 × 64 tokens of" in stderr and f"the checkpoint goes to {out}." in stderr
    assert report["method"] == "dbellquant" and 2.9 < report["bits_per_weight"] < 3.2
    assert report["out"] == str(out) and set(report["errors"]) >= {"model.layers.0.self_attn.q_proj"}


def test_quantize_prints_a_table(bellbit, tiny_model, tmp_path):
    code, stdout, _ = bellbit("quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--bits", 4)
    assert code == 0
    assert "bits per quantized weight" in stdout and "4.2" in stdout


def test_figures_are_drawn_on_demand(bellbit, tiny_model, english, tmp_path):
    pytest.importorskip("matplotlib")
    options = [
        "--calib",
        english,
        "--samples",
        2,
        "--seq-len",
        32,
        "--ltdb-steps",
        1,
        "--figures",
        tmp_path / "figures",
    ]
    code, _, stderr = bellbit("quantize", tiny_model("llama"), tmp_path / "out", *options)
    assert code == 0 and "errors.png" in stderr
    assert len(list((tmp_path / "figures").glob("*.png"))) == 5


def test_eval_inspect_and_generate_work_on_the_original_and_the_result(bellbit, tiny_model, english, quantized):
    out = quantized[0]
    perplexities = {}
    for model in (tiny_model("llama"), out):
        code, stdout, stderr = bellbit("eval", model, "--data", f"{english}[:5000]", "--seq-len", 64, "--json")
        assert code == 0, stderr
        result = json.loads(stdout)
        perplexities[model] = result["perplexity"]
        assert result["tokens"] == result["windows"] * 64 and result["seconds"] > 0
        code, stdout, _ = bellbit("inspect", model, "--json")
        assert code == 0 and json.loads(stdout)["totals"][-1]["kind"] == "total"
        code, stdout, _ = bellbit("generate", model, "Once", "--max-new-tokens", 3)
        assert code == 0 and stdout.startswith("Once")
    assert len(set(perplexities.values())) == 2


def test_eval_prints_a_table(bellbit, tiny_model, english):
    code, stdout, _ = bellbit("eval", tiny_model("llama"), "--data", english, "--seq-len", 64, "--windows", 2)
    assert code == 0 and "perplexity" in stdout and "2 × 64" in stdout


def test_generation_follows_its_seed(bellbit, quantized):
    def text(seed):
        return bellbit("generate", quantized[0], "Once", "--max-new-tokens", 12, "--temperature", 1, "--seed", seed)[1]

    assert text(1) == text(1) != text(2)


def test_inspect_shows_every_tensor_and_the_parts_of_its_bits(bellbit, quantized):
    code, stdout, _ = bellbit("inspect", quantized[0])
    assert code == 0
    for word in ("signs", "bitmap", "scales", "nominal", "stored", "model.layers.1.mlp.down_proj", "everything"):
        assert word in stdout
    report = json.loads(bellbit("inspect", quantized[0], "--json")[1])
    query = next(row for row in report["tensors"] if row["name"] == "model.layers.0.self_attn.q_proj")
    # 192 columns: a block of 128 at 2.875 bits and one of 64 at 3.75, and the shared column bits
    assert query["bits_per_weight"] == pytest.approx((128 * 2.875 + 64 * 3.75) / 192 + 1 / 192)
    assert query["bits"]["signs"] == 1
    kinds = {row["kind"]: row for row in report["totals"]}
    assert set(kinds) == {"quantized", "embedding", "norm", "total"}
    assert kinds["total"]["nbytes"] == sum(row["nbytes"] for row in report["tensors"]) <= report["file_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "MODEL", "OUT", "--act-bits", 7], "--act-bits 7 is not possible; allowed: 16, 8, 6"),
        (
            ["quantize", "MODEL", "OUT", "--method", "x"],
            "--method x is not possible; allowed: bellbit, dbellquant, billm, arb",
        ),
        (["quantize", "MODEL", "OUT", "--calib", "x"], "'x' is neither a file nor a known data set"),
        (["quantize", "./nowhere", "OUT"], "./nowhere is no model directory and no .gguf file"),
        (["eval", "MODEL", "--data", "nothing"], "'nothing' is neither a file nor a known data set"),
        (["eval", "MODEL", "--seq-len", 0], "--seq-len 0 is not possible; allowed: 2 and more"),
        (["eval", "OPT", "--seq-len", 600], "--seq-len 600 is not possible; allowed: 2 to 512"),
        (["generate", "MODEL", ""], "the prompt has no tokens"),
        (["generate", "MODEL", "Hi", "--chat"], "this model has no chat template"),
        (["generate", "OPT", "Hi", "--max-new-tokens", 600], "is not possible; allowed: 2 to 512"),
        (["inspect", "./nowhere"], "unknown model: ./nowhere"),
        (["generate", "./nowhere", "Hi"], "unknown model: ./nowhere"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(bellbit, tiny_model, tmp_path, arguments, message):
    names = {"MODEL": tiny_model("llama"), "OPT": tiny_model("opt"), "OUT": tmp_path / "out"}
    code, stdout, stderr = bellbit(*(names.get(argument, argument) for argument in arguments))
    assert code == 2 and "error" not in stdout
    assert "error: " in stderr and message in " ".join(stderr.split()) and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(bellbit):
    with pytest.raises(cli.BellbitError):
        bellbit("inspect", "./nowhere", "--debug")


def test_faults_of_our_own_are_told_apart(bellbit, monkeypatch, tiny_model):
    monkeypatch.setattr("bellbit.inspection.inspect", Mock(side_effect=RuntimeError("boom [x]")))
    code, _, stderr = bellbit("inspect", tiny_model("llama"))
    assert code == 1 and "RuntimeError: boom [x]" in stderr and "--debug" in stderr


def test_json_is_strict(capsys):
    cli._print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1,)}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": [1]},
    }


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys, bellbit.cli; assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", ["quantize", "eval", "generate", "inspect", "compare", "export", "demo"])
def test_every_verb_has_help(bellbit, verb):
    code, stdout, _ = bellbit(verb, "--help")
    assert code == 0 and "Usage" in stdout
    assert verb == "demo" or "Example" in stdout


def test_import_alone_lets_transformers_load_a_checkpoint(quantized):
    code = (
        "import bellbit; from transformers import AutoModelForCausalLM; import sys;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(quantized[0])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PackedLinear"


def test_export(bellbit, tiny_model, tmp_path):
    out, file = tmp_path / "out", tmp_path / "model.gguf"
    assert bellbit("quantize", tiny_model("llama"), out, "--method", "sign", "--json")[0] == 0
    code, stdout, _ = bellbit("export", out, file, "--json")
    assert code == 0 and file.is_file()
    tensors = {tensor["name"]: tensor for tensor in json.loads(stdout)["tensors"]}
    assert tensors["blk.0.attn_q.weight"]["kind"] == "Q8_0"  # rows of 192: no Q1_0
    code, _, stderr = bellbit("export", out, file)
    assert code == 2 and "exists; give another name, or --overwrite" in stderr
    code, stdout, _ = bellbit("export", out, file, "--overwrite")
    assert code == 0 and "everything" in stdout


def test_compare_puts_methods_side_by_side(bellbit, tiny_model, english, tmp_path):
    out = tmp_path / "map"
    shared = [tiny_model("llama"), out, "--data", english, "--calib", english, "--samples", 2]
    shared += ["--seq-len", 64, "--windows", 2]
    code, stdout, stderr = bellbit("compare", *shared, "--methods", "none,arb", "--seeds", 2, "--json")
    assert code == 0, stderr
    assert f"2 methods with 2 seeds on {tiny_model('llama')}, calibrated on 2 × 64 tokens of {english}" in stderr
    rows = {row["spec"]: row for row in json.loads(stdout)["rows"]}
    assert list(rows) == ["none", "arb", "arb:seed=1"]
    assert rows["none"]["bits_per_weight"] == 16 and 2 < rows["arb"]["bits_per_weight"] < 4
    code, stdout, _ = bellbit("compare", *shared, "--methods", "arb,arb:seed=1")
    assert code == 0 and "±" in stdout and "none" not in stdout
    code, _, stderr = bellbit("compare", *shared[:-1], 3, "--methods", "arb")
    assert code == 2 and "is of another comparison" in stderr
