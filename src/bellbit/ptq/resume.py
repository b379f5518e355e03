"""What a long run has done so far, kept on disk so that a killed one goes on from there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bellbit.errors import BellbitError, disk_reason
from bellbit.files import beside, write_text, writing
from bellbit.processes import processes

HASHED = 4096  # values of each tensor
GO_ON = "--resume goes on from there"
_FINGERPRINT, _NOTES, _SECONDS = "run.json", "notes", "seconds"


def fingerprint(model: nn.Module) -> str:
    """What tells one model from another: 16 hex digits of SHA-256 over the first values of every tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().flatten()[:HASHED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Saved:
    """Named steps of a run, each a set of tensors and some notes, in a folder of their own.

    A step is there whole or not at all. Without a folder nothing is kept. Of several processes the first one writes,
    and the others wait for it.
    seconds: that earlier runs took for what they kept; 0 in the first.
    """

    def __init__(
        self,
        folder: Path | None = None,
        fingerprint: Mapping[str, Any] = MappingProxyType({}),
        resume: bool = False,
        overwrite: bool = False,
        started: float | None = None,
    ) -> None:
        """fingerprint: what must be the same for a run to go on, as JSON has it. started: when the run began, by
        `perf_counter`; now, if not given.

        Raises BellbitError if the folder is that of another run, or if there is a run and nobody said what to do.
        """
        self.folder, self.seconds = folder, 0.0
        self._started = time.perf_counter() if started is None else started
        if folder is None:
            return
        wanted = json.loads(json.dumps(dict(fingerprint)))
        with processes().main_process_first():
            self._open(folder, wanted, resume or not processes().is_main_process, overwrite)

    def _open(self, folder: Path, wanted: dict[str, Any], resume: bool, overwrite: bool) -> None:
        file = folder / _FINGERPRINT
        if file.exists() and resume:
            before = json.loads(file.read_text(encoding="utf-8"))
            for name in [*wanted, *before]:
                if wanted.get(name) != before.get(name):
                    raise BellbitError(
                        f"--resume: {name} was {before.get(name)!r} in {folder} and is {wanted.get(name)!r} now; give "
                        "the same, or remove that folder to start again"
                    )
            if (clock := folder / _SECONDS).exists():
                self.seconds = float(clock.read_text())
            return
        if not overwrite and any(folder.glob("*.safetensors")):
            raise BellbitError(f"{folder} holds an unfinished run: --resume goes on with it, --overwrite starts again")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            write_text(file, json.dumps(wanted, indent=2) + "\n")
            self._tell_time(folder)
        except OSError as error:
            raise BellbitError(f"{folder} cannot be made: {disk_reason(error)}; give another OUT") from error

    def has(self, step: str) -> bool:
        """Whether a step was done."""
        return self.folder is not None and (self.folder / f"{step}.safetensors").exists()

    def load(self, step: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and notes of a step; None if it was not done."""
        if self.folder is None or not self.has(step):
            return None
        with safe_open(self.folder / f"{step}.safetensors", framework="pt") as stored:
            notes = json.loads(stored.metadata()[_NOTES])
            return {name: stored.get_tensor(name) for name in stored.keys()}, notes  # noqa: SIM118

    def keep(self, step: str, tensors: Mapping[str, Tensor], **notes: Any) -> None:
        """Keep a step, in the place of an earlier one of that name."""
        if self.folder is not None and processes().is_main_process:
            self._write(self.folder, step, tensors, notes)
        processes().wait_for_everyone()

    def _write(self, folder: Path, step: str, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        file = folder / f"{step}.safetensors"
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with writing(file, GO_ON):
            with beside(file) as partial:
                save_file(contents, partial, metadata={_NOTES: json.dumps(notes)})
            self._tell_time(folder)

    def _tell_time(self, folder: Path) -> None:
        write_text(folder / _SECONDS, f"{self.seconds + time.perf_counter() - self._started:.1f}\n")

    def notes(self, step: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The notes of a step, made and kept now if it was not done."""
        if (found := self.load(step)) is not None:
            return found[1]
        made = make()
        self.keep(step, {}, **made)
        return made

    def tensor(self, step: str, make: Callable[[], Tensor]) -> Tensor:
        """The one tensor of a step, made and kept now if it was not done."""
        if (found := self.load(step)) is not None:
            return found[0][step]
        made = make()
        self.keep(step, {step: made})
        return made

    def one(self, step: str, name: str) -> Tensor:
        """One tensor of a step that was done."""
        assert self.folder is not None
        with safe_open(self.folder / f"{step}.safetensors", framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
            return tensor

    def remove(self) -> None:
        """The run is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder)
