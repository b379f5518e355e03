"""What is read from a model's files: which they are, and what each tensor is taken for."""

import json

import bellbit
from bellbit.inspection import inspect, weight_files
from bellbit.loading import locate


def test_tables_of_tokens_and_positions_are_embeddings(tiny_model):
    found = inspect(locate(str(tiny_model("gpt2"))))
    kinds = {row.name: row.kind for row in found.rows}
    assert {name for name, kind in kinds.items() if kind == "embedding"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert found.linears.count == 2 * (4 * 192**2 + 2 * 192 * 320)


def test_widths_that_the_budget_chose_are_shown(tiny_model, english, tmp_path):
    options = {"samples": 3, "seq_len": 64, "rungs": ("budget", "codes")}
    report = bellbit.quantize(tiny_model("llama"), tmp_path / "out", "bellbit", bpw=2.4, calib=str(english), **options)
    rows = [row for row in inspect(locate(report.out)).rows if row.kind == "quantized"]
    widths = {row.name: row.nominal for row in rows}
    assert len(widths) == 14 and len(set(widths.values())) > 1 and set(widths.values()) <= {1, 2, 3, 4}
    for row in rows:
        assert sum(row.bits.values()) > row.nominal
    assert report.bits_per_weight <= 2.4


def test_the_files_that_count_are_those_transformers_reads(tmp_path):
    for name in ("model.safetensors", "model-00001-of-00001.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    shards = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert [file.name for file in weight_files(tmp_path)] == ["model-00001-of-00001.safetensors"]
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(weight_files(tmp_path)) == 2
