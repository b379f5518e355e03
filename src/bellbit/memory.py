"""Memory: how much it was at most, and handing back what is free but still counted as the process's."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from bellbit.errors import BellbitError


def release_memory() -> None:
    """Return freed pages to the system, where the C library is one that keeps them (glibc).

    Opening the demo model leaves 270 MB of them behind, half as much as the model itself. Takes some 10 ms.
    """
    with suppress(OSError, AttributeError, TypeError):  # no glibc: musl, macOS, Windows
        ctypes.CDLL(None).malloc_trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MAPPED, _LARGEST_KEPT, _KEPT = 2**20, 2**25, 2**30  # bytes


def map_large_arrays() -> None:
    """From now on arrays of 1 MB and more go back to the system as they are freed, where the C library is glibc.

    It would soon keep those of up to 32 MB, in a heap that what lives longer cuts to pieces. The peaks of TinyLlama's
    blocks grew by 49 MB from one to the next, and not with 8 MB here; those of LLaMA-2-7B's by 72 with 8 MB. One MB
    takes no more time than 8.
    """
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def keep_freed_memory() -> None:
    """From now on freed arrays of up to 32 MB, 1 GB in all, stay with the process, where the C library is glibc.

    Training frees and takes the same ones at every step, and what went back to the system comes anew page by page: 66
    ms a step of a decoder block of the demo model, and 59 with this, at the same peak.
    """
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    with suppress(OSError, StopIteration):  # what getrusage says is never less than what the starting process had
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def memory_told(where: Callable[[], str], way_out: str) -> Iterator[None]:
    """Inside, memory that cannot be had is a BellbitError. where: what was being done, asked then."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # an OutOfMemoryError of a GPU is a RuntimeError, too
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise BellbitError(f"memory ran out at {where()}; {way_out}") from error
