"""Files that are there whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bellbit.errors import BellbitError, disk_reason


@contextmanager
def writing(target: Path, way_out: str) -> Iterator[None]:
    """Around what writes `target`. Raises BellbitError with the cause and the way out if that fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BellbitError(f"{disk_reason(error)} while writing {target}; {way_out}") from error


@contextmanager
def beside(file: Path) -> Iterator[Path]:
    """A path to write to, in the folder of `file`, whose place it takes at the end; if that is reached.

    It is this process's own: of two that write the same file at once, the last one's stays.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Make `file` hold `text`, as UTF-8, or leave it as it was."""
    with beside(file) as partial:
        partial.write_text(text, encoding="utf-8")
