"""Files are there whole or not at all."""

import pytest

from bellbit.errors import BellbitError
from bellbit.fetch import cache_dir
from bellbit.files import beside, write_text


def test_a_file_is_written_beside_and_renamed(tmp_path):
    file = tmp_path / "run.json"
    write_text(file, "α\n")
    write_text(file, "β\n")
    assert file.read_bytes() == "β\n".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_what_was_there_stays_if_writing_is_cut_off(tmp_path):
    file = tmp_path / "run.json"
    write_text(file, "before")
    with pytest.raises(KeyboardInterrupt), beside(file) as partial:
        partial.write_text("af")
        assert file.read_text() == "before"
        raise KeyboardInterrupt
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_left_by_a_killed_process_is_not_taken_for_one(tmp_path):
    file = tmp_path / "run.json"
    left = beside(file)
    left.__enter__().write_text("{")  # and then SIGKILL
    assert not file.exists()
    write_text(file, "{}")
    assert file.read_text() == "{}"


def test_a_cache_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BELLBIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BellbitError, match=r"cannot make .*cache: .*; set BELLBIT_CACHE to another folder"):
        cache_dir()
