"""Runs that are cut off anywhere and go on: by an exception in this process, and by SIGKILL in another."""

import errno
import multiprocessing
import os
import random
import signal
import time
from unittest.mock import Mock

import pytest

import bellbit
from bellbit.errors import BellbitError
from bellbit.ptq import loop
from bellbit.ptq.resume import Saved
from conftest import Cut, cut_after

TEXT = {"samples": 6, "seq_len": 64}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "dbellquant", {"ltdb_steps": 3, "act_bits": 8}),
        ("opt", "dbellquant", {"ltdb_steps": 3, "act_bits": 8, "act_scope": "tensor"}),
        ("mixtral", "gptq", {"bits": 3}),
        ("gpt2", "arb-rc", {}),
        ("qwen2", "sign", {}),
    ],
)
@pytest.mark.parametrize("stop", [0.4, 0.6, 0.96])
def test_a_run_of_any_method_goes_on_to_the_same_bytes(family, method, options, stop, tiny_model, english, tmp_path):
    def run(out, **others):
        return bellbit.quantize(tiny_model(family), out, method, calib=str(english), **TEXT, **options, **others)

    whole = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", progress=cut_after(stop))
    assert not (tmp_path / "cut").exists()
    with pytest.raises(BellbitError, match="holds an unfinished run: --resume goes on with it"):
        run(tmp_path / "cut")
    told = []
    resumed = run(tmp_path / "cut", resume=True, observer=told.append)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert (resumed.errors, resumed.fallbacks) == (whole.errors, whole.fallbacks)
    assert sum(len(record.errors) for record in told) == len(whole.errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut",
        "cut.quantize_log.jsonl",
        "whole",
        "whole.quantize_log.jsonl",
    ]


def test_a_run_that_kept_nothing_is_none(tmp_path):
    Saved(tmp_path / "x", {"seed": 1})
    Saved(tmp_path / "x", {"seed": 2}).keep("one", {})
    with pytest.raises(BellbitError, match="holds an unfinished run"):
        Saved(tmp_path / "x", {"seed": 2})


def test_a_full_disk_while_a_step_is_kept_is_told(tmp_path, monkeypatch):
    saved = Saved(tmp_path / "x", {})
    saved.keep("one", {})
    no_room = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("bellbit.ptq.resume.save_file", no_room)
    with pytest.raises(BellbitError, match=r"no space left while writing .*two.safetensors; --resume goes on"):
        saved.keep("two", {})
    assert saved.has("one") and not saved.has("two")


def test_memory_that_runs_out_is_told_and_the_run_goes_on(tiny_model, english, tmp_path, monkeypatch):
    def run(out, **others):
        return bellbit.quantize(tiny_model("llama"), out, "gptq", calib=str(english), **TEXT, **others)

    usual = loop.group_hessians

    def short(stream, block, family, settings, name, report):
        report(0.5)
        if name == "model.layers.1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return usual(stream, block, family, settings, name, report)

    run(tmp_path / "whole")
    monkeypatch.setattr(loop, "group_hessians", short)
    with pytest.raises(BellbitError, match=r"memory ran out at block 2/2: hessians; free some and --resume"):
        run(tmp_path / "out")
    monkeypatch.setattr(loop, "group_hessians", usual)
    run(tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def _quantize(model, out, text, method, options, cache, started):
    os.environ["BELLBIT_CACHE"] = str(cache)
    started.set()
    bellbit.quantize(model, out, method, calib=text, resume=True, **TEXT, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [("dbellquant", {"ltdb_steps": 200}), ("bellbit", {"effort": "fast"})])
def test_killed_at_twenty_random_moments_and_resumed(method, options, tiny_model, english, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bellbit.ptq.quantize", "transformers.models.llama.modeling_llama"])

    def run(out, seconds=None):
        """Start a run, and kill it after so long; without, wait for it. Returns what it took."""
        started = context.Event()
        arguments = (tiny_model("llama"), out, str(english), method, options, tmp_path / "cache", started)
        process = context.Process(target=_quantize, args=arguments)
        process.start()
        started.wait()
        before = time.perf_counter()
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        elif process.exitcode != 0:
            pytest.fail(f"exit code {process.exitcode}")
        return time.perf_counter() - before

    run(tmp_path / "first")
    whole = run(tmp_path / "whole")
    generator = random.Random(0)
    stages, kills, runs = set(), 0, 0
    while kills < 20:
        out, runs = tmp_path / f"cut{runs}", runs + 1
        while not out.exists():  # the same run again and again
            run(out, generator.uniform(0, whole))
            partial = out.with_name(out.name + ".partial")
            stages.add(len(list(partial.glob("*.safetensors"))) if partial.exists() else out.exists())
            kills += not out.exists()
        assert files(out) == files(tmp_path / "whole")
    assert len(stages) > 1, "the moments are spread over the run"
