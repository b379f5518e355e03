"""What is said of memory, against what a process takes."""

import platform
import subprocess
import sys

import pytest

LARGE = 2**29
TOLD = "import bellbit.memory; print(bellbit.memory.peak_memory())"
# A process of its own: one that had been larger before has room for all of LARGE below its peak.
STARTS_ANOTHER = f"""
import subprocess, sys
import bellbit.memory
before = bellbit.memory.peak_memory()
large = b"1" * {LARGE}
print(before, bellbit.memory.peak_memory(), flush=True)
subprocess.run([sys.executable, "-c", {TOLD!r}], check=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is what getrusage says")
def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_started_it():
    said = subprocess.run([sys.executable, "-c", STARTS_ANOTHER], capture_output=True, check=True).stdout
    before, after, child = map(int, said.split())
    assert 2**20 < before < LARGE < after < before + LARGE + 2**26  # measured: 220 and 757 MB
    assert 2**20 < child < LARGE  # measured: 220 MB, and 757 by getrusage


TAKES_AGAIN = """
import resource
import torch
import bellbit.memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.zeros(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
bellbit.memory.keep_freed_memory()
torch.zeros(4_000_000)
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_arrays_that_are_taken_again_are_still_there():
    said = subprocess.run([sys.executable, "-c", TAKES_AGAIN], capture_output=True, check=True).stdout
    usual, kept = map(int, said.split())
    assert kept < usual / 10
