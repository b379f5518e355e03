"""What the benchmarks share: how a row is printed, and the demo's setting."""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the slow oracle lives beside the tests

import torch

import oracle as oracle


def seconds_of(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(works, repeats):
    """Seconds of each work, (repeats): all in turn, again and again, since the speed of a shared machine drifts."""
    for work in works:
        work()
    return torch.tensor([[seconds_of(work) for work in works] for _ in range(repeats)], dtype=torch.float64).T


def median_ratio(slow, fast):
    return float((slow / fast).median())


def parser(description):
    """An argument parser with `--json`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", action="store_true", help='print one list of {"name", "ratio", "bar", "holds"}')
    return result


def row(name, ratio, bar, at_most=False):
    """One measured ratio and its bar, a lower bound unless `at_most`; no bar at all if None."""
    holds = None if bar is None else bool(ratio <= bar if at_most else ratio >= bar)
    return {"name": name, "ratio": round(ratio, 4), "bar": bar, "holds": holds}


def show(rows, as_json):
    """Print rows as JSON or as a table; exit with 1 if a bar does not hold."""
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        width = max(len(r["name"]) for r in rows)
        print(f"{'':{width}}  {'ratio':>9}  {'bar':>9}")
        for r in rows:
            verdict = {None: "", True: "holds", False: "DOES NOT HOLD"}[r["holds"]]
            print(f"{r['name']:{width}}  {r['ratio']:9.3f}  {r['bar'] if r['bar'] is not None else '':>9}  {verdict}")
    sys.exit(0 if all(r["holds"] is not False for r in rows) else 1)


def note(text):
    """Say something on stderr, where it does not disturb --json."""
    print(text, file=sys.stderr, flush=True)
