"""Files that are whole or not there: atomic writes of single files and of model folders."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gladad.core.errors import GladError, ModelFormatError

MODEL_FILE = "model.json"
FORMAT = "gladad-model"
FORMAT_VERSION = 3
SCOPED_VERSION = 4  # of models of which not everything counts: an older program would decide otherwise


class WriteError(GladError):
    """Something could not be written; nothing was left half-written."""


@contextmanager
def atomic_file(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place, with that mode, when the block succeeds, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a text file whole or not at all."""
    with atomic_file(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write JSON with sorted keys, so that equal content is equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", mode)


def check_target(folder: Path) -> None:
    """Refuse early what `atomic_folder` would refuse at the end of a long run.

    Raises:
        WriteError: The target exists and is not a model, or its place cannot be written to.
    """
    if folder.exists() and not folder.is_dir():  # a file, or a device
        raise WriteError(f"{folder}: is not a folder; give a folder for the model")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MODEL_FILE).is_file():
        raise WriteError(f"{folder}: exists and is not a gladad model; it will not be overwritten, choose another folder")
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gladad-", dir=parent):
            pass
    except OSError as error:
        raise WriteError(f"{parent}: cannot be written to ({error.strerror or error})") from error


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place, files synced, when the block succeeds; a model there stays until then.

    Raises:
        WriteError: The target may not be replaced, or the disk refuses.
    """
    check_target(folder)
    folder = folder.absolute()
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            _sync(path)
        temporary.chmod(0o755)
        _sync(temporary)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        _sync(folder.parent)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def share_files(folder: Path, other: Path, smallest: int = 2**20) -> None:
    """Make files of ``other`` that equal those of ``folder`` second names of these, so that the disk holds them once.

    Where it cannot, nothing changes. Files of fewer than ``smallest`` bytes are not worth it.
    """
    for path in sorted(folder.rglob("*")):
        twin = other / path.relative_to(folder)
        if folder == other or not (path.is_file() and twin.is_file()) or path.stat().st_size < smallest or path.samefile(twin):
            continue
        if filecmp.cmp(path, twin, shallow=False):
            link = twin.with_name(f".{twin.name}.partial")
            with suppress(OSError):  # another disk, or one without such names
                os.link(path, link)
                link.replace(twin)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # there are systems that cannot do it for folders
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_arrays(path: Path, arrays: Mapping[str, Any], save: Callable[[dict[str, Any], Path], None] = save_file) -> None:
    """Write safetensors. What the disk refuses is an `OSError`, which the blocks above translate."""
    try:
        save(dict(arrays), path)
    except SafetensorError as error:
        raise OSError(f"writing {path.name} failed: {error}") from error


def load_arrays(path: Path, load: Callable[[Path], dict[str, Any]] = load_file) -> dict[str, Any]:
    """Read safetensors.

    Raises:
        ModelFormatError: The file is missing or damaged.
    """
    if not path.is_file():
        raise ModelFormatError(f"{path}: missing; the model folder is incomplete")
    try:
        return dict(load(path))
    except Exception as error:
        raise ModelFormatError(f"{path}: damaged or not a safetensors file ({error})") from error


def content_digest(description: Any, arrays: Mapping[str, NDArray[Any]] | None = None) -> str:
    """SHA-256 (hexadecimal) of a JSON-ready description and of arrays by their names."""
    found = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, value in sorted((arrays or {}).items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelFormatError: The file is missing, damaged, or not an object.
    """
    if not path.is_file():
        raise ModelFormatError(f"{path}: missing; the model folder is incomplete")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: holds no JSON object")
    return value


def read_model_file(folder: Path) -> dict[str, Any]:
    """The description of a saved model.

    Raises:
        ModelFormatError: The folder is not a gladad model, or of a newer format.
    """
    if not folder.is_dir():
        raise ModelFormatError(f"{folder}: no such folder; give the folder that 'gladad fit' wrote")
    if not (folder / MODEL_FILE).is_file():
        raise ModelFormatError(f"{folder}: is not a gladad model (no {MODEL_FILE}); give the folder that 'gladad fit' wrote")
    model = read_json(folder / MODEL_FILE)
    if model.get("format") != FORMAT:
        raise ModelFormatError(f"{folder / MODEL_FILE}: is not a gladad model description")
    if model.get("format_version") not in (FORMAT_VERSION, SCOPED_VERSION):
        found = f"has format version {model.get('format_version')}, this program reads {FORMAT_VERSION} and {SCOPED_VERSION}"
        raise ModelFormatError(f"{folder}: {found}; upgrade gladad or fit again")
    return model


def printable(path: str | Path) -> str:
    """A path as text that can always be written: bytes that are not UTF-8 become the replacement character."""
    return os.fsencode(path).decode("utf-8", errors="replace")
