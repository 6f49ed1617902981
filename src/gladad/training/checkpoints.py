"""Checkpoints of a training that survive a kill at any moment: written beside and moved into place, with sizes and hashes of every file.

A checkpoint is one folder, ``step-0000120``, of ``tensors.safetensors``, ``state.json`` and ``manifest.json``. One that is incomplete or
damaged is never taken for a whole one: the newest that agrees with its manifest is used.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.core.storage import atomic_folder, read_json, write_json
from gladad.core.tensors import load_tensors, save_tensors

RUN_FILE, TENSORS_FILE, STATE_FILE, MANIFEST_FILE = "training.json", "tensors.safetensors", "state.json", "manifest.json"
LOGS, EXAMPLES = "logs", "examples"
"""Folders beside the checkpoints, see `gladad.training.trackers`."""
LEFTOVERS = frozenset({".partial", ".old"})
"""Suffixes of what a killed process leaves."""


@dataclass(frozen=True)
class Checkpoint:
    """A training at one moment."""

    step: int  # optimiser steps done
    tensors: dict[str, Tensor]  # on the CPU: weights, moments of the optimiser, averages
    state: dict[str, Any]  # everything else, JSON-ready


class Checkpoints:
    """The checkpoints of one training, in a folder of their own.

    Args:
        folder: Made by `start`.
        identity: JSON-ready description of what decides the result: settings, images, base. A folder of another training is refused.
        keep: Newest checkpoints that are kept, at least 1.
        tell: Called with a sentence when a checkpoint cannot be used.

    Raises:
        ConfigError: The folder holds checkpoints of another training.
        DataError: The folder is there and holds something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2, tell: Callable[[str], None] = lambda line: None):
        self.folder, self.keep, self.tell, self._identity = folder, keep, tell, identity
        if folder.exists():
            self._check()

    def _check(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: is not a folder; checkpoints need one")
        if not (self.folder / RUN_FILE).is_file():
            finished = {LOGS, EXAMPLES}  # what remains of a training
            if any(path.name not in finished and path.suffix not in LEFTOVERS for path in self.folder.iterdir()):
                raise DataError(f"{self.folder}: exists and holds no checkpoints; choose another folder for the training, or remove it")
            return
        found = read_json(self.folder / RUN_FILE)
        if found != self._identity:
            differs = sorted(key for key in {*found, *self._identity} if found.get(key) != self._identity.get(key))
            another = f"holds checkpoints of another training ({', '.join(differs)} differ)"
            raise ConfigError(f"{self.folder}: {another}; remove the folder to start anew")

    def start(self) -> None:
        """Make the folder and remove what a killed process left half-written. One process at a time may do this."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):
            if left.suffix in LEFTOVERS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not (self.folder / RUN_FILE).is_file():
            write_json(self.folder / RUN_FILE, self._identity)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, and remove the oldest ones but `keep`.

        Raises:
            WriteError: The disk refuses; the earlier checkpoints are untouched.
        """
        place = self.folder / f"step-{checkpoint.step:07d}"
        for damaged in self._places():  # `newest` would have gone on from it
            if damaged.name >= place.name:
                _remove(damaged)
        with atomic_folder(place) as temporary:
            save_tensors(temporary / TENSORS_FILE, checkpoint.tensors)
            write_json(temporary / STATE_FILE, checkpoint.state)
            files = {name: _entry(temporary / name) for name in (TENSORS_FILE, STATE_FILE)}
            write_json(temporary / MANIFEST_FILE, {"step": checkpoint.step, "files": files})
        for old in self._places()[: -self.keep]:
            _remove(old)
        return place

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none."""
        for number, place in reversed(list(enumerate(self._places()))):
            try:
                return _read(place)
            except (ModelFormatError, OSError) as error:
                self.tell(f"{error}; {'an earlier checkpoint is used' if number else 'the training starts anew'}")
        return None

    def _places(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name) and path.is_dir())


def discard(folder: Path) -> None:
    """Remove the checkpoints of one training, whose result is saved. Logs and pictures stay."""
    if not (folder / RUN_FILE).is_file():
        return
    for place in folder.glob("step-*"):
        shutil.rmtree(place, ignore_errors=True)
    (folder / RUN_FILE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read(place: Path) -> Checkpoint:
    manifest = read_json(place / MANIFEST_FILE)
    try:
        for name, entry in manifest["files"].items():
            if not (place / name).is_file() or _entry(place / name) != entry:
                raise ModelFormatError(f"{place / name}: does not agree with the manifest beside it")
        return Checkpoint(int(manifest["step"]), load_tensors(place / TENSORS_FILE), read_json(place / STATE_FILE))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(f"{place / MANIFEST_FILE}: is not the manifest of a checkpoint ({error})") from error


def _remove(place: Path) -> None:
    """Remove a checkpoint in a way that a kill in between does not leave half of one under its name."""
    if place.exists():
        doomed = place.with_name(f".{place.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(OSError):  # it is in use, on a system that minds
            place.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
