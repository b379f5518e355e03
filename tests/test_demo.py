from bellbit import demo
from bellbit.report import demo_table


def test_the_demo_measures_quantizes_and_writes(tiny_model, english, tmp_path, monkeypatch):
    for name, value in {"MODEL": str(tiny_model("llama")), "TEXT": str(english), "SEQ_LEN": 64, "WINDOWS": 3}.items():
        monkeypatch.setattr(demo, name, value)
    shares, said = [], []
    result = demo.run(tmp_path / "out", lambda share, _: shares.append(share), said.append)
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert f"{demo.BPW} bits" in said[0]
    assert 3 < result.result.total("quantized").bits_per_weight <= demo.BPW + 0.1  # the tiny model's groups are short
    assert result.before.perplexity != result.after.perplexity
    assert result.text.startswith(demo.PROMPT) and len(result.text) > len(demo.PROMPT)
    assert demo_table(result).row_count == 3
    assert result.to_dict()["checkpoint"] == str(tmp_path / "out")
