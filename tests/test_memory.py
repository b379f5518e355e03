"""What is said of memory, against what a process takes."""

import subprocess
import sys

import pytest

from bellbit.memory import peak_memory

TOLD = "import bellbit.memory; print(bellbit.memory.peak_memory())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is what getrusage says")
def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_started_it():
    before = peak_memory()
    large = bytearray(2**29)
    assert peak_memory() >= before + len(large)
    child = int(subprocess.run([sys.executable, "-c", TOLD], capture_output=True, check=True).stdout)
    assert 2**20 < child < len(large)  # measured: 220 MB, and 611 by getrusage
