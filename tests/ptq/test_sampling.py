import errno
from unittest.mock import Mock

import pytest
import torch

import bellbit
from bellbit.errors import BellbitError
from bellbit.ptq import quantize, sampling
from bellbit.ptq.sampling import sampled_windows
from conftest import CONFIGS, byte_tokenizer, random_model


@pytest.fixture(autouse=True)
def briefly(monkeypatch, tmp_path):
    monkeypatch.setattr(sampling, "TOGETHER", 4)
    monkeypatch.setattr(sampling, "cache_dir", lambda: tmp_path)


def sampled(model, tokenizer, samples, seq_len=20, seed=1):
    return sampled_windows(model, tokenizer, samples, seq_len, seed, lambda share: None)


def test_windows_come_from_the_model_and_are_kept(tmp_path):
    model = random_model(CONFIGS["llama"]())
    found = sampled(model, byte_tokenizer(), 6)
    assert found.shape == (6, 20) and found.dtype == torch.int64
    assert found[:, 0].tolist() == [256] * 6
    assert len(list((tmp_path / "self").iterdir())) == 2
    assert torch.equal(sampled(model, byte_tokenizer(), 9)[:6], found), "more of it begins alike"
    # a likely token is drawn more often than by chance: mean log-probability above that of uniform draws
    with torch.no_grad():
        logits = model(found).logits[:, :-1].log_softmax(-1)
    assert float(logits.gather(2, found[:, 1:, None]).mean()) > float(logits.mean()) + 1
    assert not torch.equal(sampled(model, byte_tokenizer(), 6, seed=2), found)
    assert len({tuple(window.tolist()) for window in found}) == 6


def test_text_is_kept_apart_by_dtype_and_any_seed_does(tmp_path):
    model = random_model(CONFIGS["llama"]()).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):  # the same values
        sampled(model.to(dtype), byte_tokenizer(), 4)
    assert len(list((tmp_path / "self").iterdir())) == 2
    seeds = [sampled(model, byte_tokenizer(), 4, seed=seed) for seed in (-(2**70), 10**30)]
    assert not torch.equal(*seeds)


def test_a_cache_that_cannot_be_written_is_told(monkeypatch):
    monkeypatch.setattr(sampling, "save_file", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(BellbitError, match=r"no space left while writing .*; make room, or set BELLBIT_CACHE"):
        sampled(random_model(CONFIGS["llama"]()), byte_tokenizer(), 1)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_each_token_follows_from_all_before_it(name, monkeypatch):
    """Across the edge of a sliding window of 48; the likeliest token in the place of a draw."""
    monkeypatch.setattr(sampling, "_draw", lambda logits: logits.argmax(dim=-1))
    model = random_model(CONFIGS[name]())
    found = sampled(model, byte_tokenizer(), 1, seq_len=60)
    with torch.no_grad():
        assert torch.equal(model(found).logits.argmax(dim=-1)[:, :-1], found[:, 1:])


@pytest.mark.parametrize("run", [2, 4, 256])
def test_tokens_are_drawn_by_their_probability(run, monkeypatch):
    monkeypatch.setattr(sampling, "RUN", run)
    torch.manual_seed(0)
    shares = torch.tensor([0.0, 0.1, 0.6, 0.0, 0.3, 0.0])
    counts = sampling._draw(shares.log().expand(20_000, -1)).bincount(minlength=6) / 20_000
    assert torch.allclose(counts, shares, atol=0.015)  # four standard deviations; largest found .003
    assert counts[shares == 0].sum() == 0


def test_several_texts_make_a_window(monkeypatch):
    monkeypatch.setattr(sampling, "TEXT", 8)
    found = sampled(random_model(CONFIGS["llama"]()), byte_tokenizer(), 2, seq_len=20)
    assert found.flatten()[::8].tolist() == [256] * 5


def test_a_text_begins_with_what_separates_texts():
    model, tokenizer = random_model(CONFIGS["llama"]()), byte_tokenizer()
    tokenizer.bos_token = None
    assert sampled(model, tokenizer, 1)[0, 0] == 257
    tokenizer.eos_token = None
    with pytest.raises(BellbitError, match="begins with the BOS or EOS token, and this tokenizer has neither"):
        sampled(model, tokenizer, 1)


@pytest.mark.parametrize(
    ("rungs", "effort", "calib", "own"),
    [(("codes",), "best", "", 0), (("text", "codes"), "fast", "", 2), (("text", "codes"), "best", ",self", 2)],
)
def test_the_ladder_adds_text_of_its_own_to_what_it_is_given(
    tiny_model, english, tmp_path, monkeypatch, rungs, effort, calib, own
):
    seen = []
    climb = quantize.climb
    monkeypatch.setattr(quantize, "climb", lambda *args: seen.append(args[2]) or climb(*args))
    options = {"samples": 2, "seq_len": 32, "effort": effort, "rungs": rungs}
    report = bellbit.quantize(tiny_model("llama"), tmp_path / "out", "bellbit", calib=f"{english}{calib}", **options)
    assert report.calibration["own"] == own
    assert len(seen[0]) == 2 + own
    assert int((seen[0][:, 0] == 256).sum()) == own + calib.count("self"), (
        "each begins with the mark, of which English has none"
    )
