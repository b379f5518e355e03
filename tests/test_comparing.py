import json
from dataclasses import replace
from io import StringIO
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import bellbit
from bellbit import comparing, figures
from bellbit.agreement import Agreement, logits_of_original
from bellbit.comparing import DEFAULT, ORIGINAL, ROWS, Request, compare, measure, most_own, parse, with_seeds
from bellbit.errors import BellbitError
from bellbit.evaluate import perplexity
from bellbit.exporting import export_gguf
from bellbit.figures import draw_map
from bellbit.loading import cpu_name
from bellbit.ptq.distill import teacher_states
from bellbit.ptq.resume import Saved
from bellbit.report import comparison_table
from conftest import CONFIGS


@pytest.fixture
def request_(tiny_model, english):
    return Request(str(tiny_model("llama")), f"{english}", 64, 4, str(english), samples=3, seed=0)


def test_every_default_method_is_one():
    assert len({parse(spec)[0] for spec in DEFAULT}) == 11


@pytest.mark.parametrize(
    ("spec", "options", "seed"),
    [
        ("gptq:bits=3:block-size=64", {"bits": 3, "block_size": 64}, None),
        ("arb-rc:bitmap=no", {"bitmap": False}, None),
        ("bellbit:bpw=2.4:rungs=text+codes", {"bpw": 2.4, "rungs": ("text", "codes")}, None),
        ("arb:seed=2", {}, 2),
    ],
)
def test_methods_with_options_are_understood(spec, options, seed):
    assert parse(spec) == (spec.split(":")[0], options, seed)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("awq", "--method awq is not possible"),
        ("file:nothing.gguf", "no such file: nothing.gguf"),
        ("gptq:groups=3", "there is no option 'groups'; there are bits"),
        ("gptq:bits=x", "'x' is no value for bits"),
        ("arb-rc:bitmap=perhaps", "'perhaps' is no value for bitmap"),
    ],
)
def test_what_is_no_method_is_told(spec, message, request_, tmp_path):
    with pytest.raises(BellbitError, match=message):
        compare(request_, [spec], tmp_path, lambda *_: None)


def test_text_of_the_models_own_is_counted():
    assert most_own(["none", "gptq:bits=2"], 8) == 0
    assert most_own(["sign", "bellbit:effort=fast", "bellbit:rungs=codes+blocks"], 8) == 8


def test_seeds_are_rows_of_their_own_where_anything_depends_on_them():
    assert with_seeds(["none", "sign", "bellbit:bpw=2.4"], range(3, 5)) == [
        "none",
        "sign",
        "bellbit:bpw=2.4",
        "bellbit:bpw=2.4:seed=4",
    ]
    assert with_seeds(["gptq"], range(1)) == ["gptq"]
    assert with_seeds(["gptq:seed=7"], range(2)) == ["gptq:seed=7"]
    assert with_seeds(["gptq", "gptq:seed=1", "arb", "arb:seed=0"], range(2)) == [
        "gptq",
        "gptq:seed=1",
        "arb",
        "arb:seed=1",
    ]


def test_of_several_seeds_mean_and_deviation_are_shown():
    found = {"arb": 20.0, "sign": 50.0, "arb:seed=1": 23.0, "arb:seed=2": 26.0}
    rows = [comparing.Row(s, 1.5, {"t": p}, {"t": p / 100}, {"t": 0.5}, p, 10**9) for s, p in found.items()]
    screen = StringIO()
    Console(width=100, file=screen).print(comparison_table(rows, "t"))
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert ["arb", "1.500", "23.00", "±", "3", "0.230", "±", "0.03", "50.0", "23", "1", "GB"] in lines
    assert ["sign", "1.500", "50.00", "0.500", "50.0", "50", "1", "GB"] in lines
    assert list(comparing.by_method([replace(rows[0], spec="arb:seed=-2"), rows[0]])) == ["arb"]


def test_the_seed_of_a_row_is_its_own(request_, tmp_path):
    of_its_own = measure(request_, "gptq:seed=1", tmp_path)
    assert of_its_own.perplexity == measure(replace(request_, seed=1), "gptq", tmp_path).perplexity
    assert of_its_own.perplexity != measure(request_, "gptq", tmp_path).perplexity


def test_agreement_with_oneself_and_with_another(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    windows = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))

    def agreement(of):
        found = Agreement(logits_of_original(model, windows, teacher_states(model, windows, bf16=False)))
        perplexity(of, windows, watch=found.add)
        return found.divergence, found.same_top

    assert agreement(other) == (pytest.approx(0, abs=1e-6), 1.0)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.5)
        p, q = (m(windows).logits.log_softmax(-1).flatten(0, 1) for m in (model, other))
    divergence, same = agreement(other)
    assert divergence == pytest.approx(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")))
    assert same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_logits_of_the_original_are_its_own_also_the_second_time(family, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    windows = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        states = Saved(tmp_path / "kept", resume=True).tensor("x", lambda: teacher_states(model, windows, bf16=False))
        found = torch.stack(list(logits_of_original(model, windows, states)))
        with torch.no_grad():
            assert torch.equal(found, torch.cat([model(w[None]).logits for w in windows]))


def test_a_row_is_what_its_method_gives(request_, tiny_model, tmp_path):
    row = measure(request_, "gptq:bits=4", tmp_path)
    assert row.bits_per_weight == pytest.approx(4.2, abs=0.05)
    text = request_.data
    plain = measure(request_, "none", tmp_path)
    assert (plain.bits_per_weight, plain.seconds, plain.divergence[text]) == (16, None, 0)
    assert row.divergence[text] > 0 and row.perplexity[text] != plain.perplexity[text]
    assert row.seconds > 0 and row.peak_bytes > 10**8 and row.epochs is None
    assert row.machine == cpu_name()
    assert [path.name for path in tmp_path.iterdir()] == [ORIGINAL]
    (tmp_path / "sign").mkdir()
    (tmp_path / "sign" / "mine").touch()
    measure(request_, "sign", tmp_path)
    assert (tmp_path / "sign" / "mine").exists(), "a folder of that name is somebody's"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    from bellbit.data import evaluation_windows, load_corpus
    from bellbit.loading import load_tokenizer, locate

    windows = evaluation_windows(load_corpus(text, "test"), load_tokenizer(locate(request_.model)), 64, 4)
    assert plain.perplexity[text] == perplexity(model, windows).perplexity


def test_a_checkpoint_and_a_gguf_file_are_measured_as_they_are(request_, tmp_path):
    bellbit.quantize(request_.model, tmp_path / "out", "sign")
    row, there = measure(request_, "sign", tmp_path), measure(request_, f"file:{tmp_path / 'out'}", tmp_path)
    assert replace(there, spec="sign", seconds=row.seconds, peak_bytes=row.peak_bytes) == row
    assert there.seconds is None and there.peak_bytes is None
    export_gguf(tmp_path / "out", tmp_path / "out.gguf")
    exported = measure(request_, f"file:{tmp_path / 'out.gguf'}", tmp_path)
    assert exported.bits_per_weight == pytest.approx(8.5) and exported.perplexity[request_.data] == pytest.approx(
        row.perplexity[request_.data], rel=0.02
    )


def test_rows_are_kept_and_belong_to_their_request(request_, tmp_path, monkeypatch):
    asked = []

    def fake(request, spec, out, progress):
        asked.append(spec)
        assert not (out / ORIGINAL).exists()
        return comparing.Row(spec, 1.5, {request.data: 20.0}, {request.data: 0.1}, {request.data: 0.9}, 3.0, 10**9)

    monkeypatch.setattr(comparing, "_measure_apart", fake)
    (tmp_path / ORIGINAL).mkdir()  # of a request whose first row failed
    compare(request_, ["sign"], tmp_path, lambda *_: None)
    assert not (tmp_path / ORIGINAL).exists()
    rows = compare(request_, ["none", "sign", "gptq:bits=2"], tmp_path, lambda *_: None)
    assert asked == ["sign", "none", "gptq:bits=2"]
    assert [row.spec for row in rows] == ["none", "sign", "gptq:bits=2"]
    assert set(json.loads((tmp_path / "compare.json").read_text())["rows"]) == set(asked)
    draw_map(rows, request_.data, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    screen = StringIO()
    Console(width=80, file=screen).print(comparison_table(rows, request_.data))
    for spec in ("none", "sign", "gptq:bits=2"):
        assert spec in screen.getvalue()
    with pytest.raises(BellbitError, match="is of another comparison"):
        compare(replace(request_, seed=1), ["sign"], tmp_path, lambda *_: None)


def test_files_stand_in_the_map_by_their_names(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(figures, "_name", lambda axis, points: named.extend(points))
    specs = ["sign", "file:there/IQ1_S.gguf", "file:out-1.125", "file:other/IQ1_S.gguf"]
    rows = [comparing.Row(spec, 1.5, {"text": 20.0}, {"text": 0.1}, {"text": 0.9}, None, None) for spec in specs]
    draw_map(rows, "text", tmp_path / "map.png")
    assert [name for name, *_ in named] == ["sign", "IQ1_S", "out-1.125", "IQ1_S"]


def test_files_of_different_texts_have_different_names():
    texts = ["book.txt[:10%]", "book.txt[10%:]", "a_b.txt", "a-b.txt", "a/b.txt", "gptq:bits=2"]
    names = {comparing._file_name(text) for text in texts}
    assert len(names) == len(texts) and not any("/" in name for name in names)


def test_a_row_tells_how_far_it_is_and_how_much_was_trained(request_, tmp_path):
    spec, told = "bellbit:effort=fast:rungs=codes+blocks", []
    (row,) = compare(request_, [spec], tmp_path, lambda *done: told.append(done))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and 0.5 < shares[-1] < 1
    assert any(text.startswith(f"{spec}: block 2/") for _, text in told)
    assert row.epochs == {"blocks": 1, "tail": 0, "distilled": 0}


def test_the_memory_of_a_row_that_went_on_is_not_known(request_, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bellbit.ptq.loop.Run.check", Mock(side_effect=KeyboardInterrupt))
        measure(request_, "gptq", tmp_path)
    assert measure(request_, "gptq", tmp_path).peak_bytes is None


def test_what_was_made_and_not_measured_is_not_made_again(request_, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparing, "perplexity", Mock(side_effect=KeyboardInterrupt))
        measure(request_, "gptq", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "quantize", Mock(side_effect=AssertionError))
        went_on = measure(request_, "gptq", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ORIGINAL]
    again = measure(request_, "gptq", tmp_path)
    assert replace(went_on, seconds=again.seconds, peak_bytes=again.peak_bytes) == again


def test_a_text_that_is_not_there_is_told_before_anything_is_made(request_, tmp_path):
    with pytest.raises(BellbitError, match=r"nothing\.txt"):
        compare(replace(request_, data=f"{request_.data},nothing.txt"), ["gptq"], tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_rows_of_a_comparison_that_was_removed_are_begun_anew(request_, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bellbit.ptq.loop.Run.check", Mock(side_effect=KeyboardInterrupt))
        measure(request_, "gptq", tmp_path)
    assert (tmp_path / ROWS / "gptq.partial").exists()
    (row,) = compare(replace(request_, samples=2), ["gptq"], tmp_path, lambda *_: None)
    assert row.spec == "gptq" and not (tmp_path / ROWS).exists()


def test_texts_are_told_apart_by_commas_that_are_in_no_name(tmp_path):
    assert comparing.texts("wiki-sample, python-docs") == ["wiki-sample", "python-docs"]
    (tmp_path / "a,b.txt").touch()
    assert comparing.texts(f"{tmp_path}/a,b.txt") == [f"{tmp_path}/a,b.txt"]


def test_a_row_that_fails_is_named(request_, tmp_path):
    with pytest.raises(BellbitError, match=r"gptq: .*too short: \d+ usable tokens found"):
        compare(replace(request_, samples=10**6), ["gptq"], tmp_path, lambda *_: None)
    with pytest.raises(BellbitError, match="is of another comparison"):  # which that one had begun
        compare(request_, ["gptq"], tmp_path, lambda *_: None)
