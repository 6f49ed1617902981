"""Folders of networks beside models: written whole or not at all, and replaced only by another of the same format.

Such a folder is plain diffusers; by the format in its ``model.json`` it is known again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gladad.core.errors import ModelFormatError
from gladad.core.storage import MODEL_FILE, WriteError, atomic_folder, check_target, read_json, write_json


def has_format(folder: Path, name: str) -> bool:
    """Whether `save_folder` wrote a folder with this format."""
    try:
        return (folder / MODEL_FILE).is_file() and read_json(folder / MODEL_FILE).get("format") == name
    except ModelFormatError:
        return False


def check_replaceable(folder: Path, name: str) -> None:
    """Refuse before a long work what `save_folder` would refuse after it.

    Raises:
        WriteError: The folder holds something else than a folder of this format, or its place cannot be written to.
    """
    if folder.is_dir() and any(folder.iterdir()) and not has_format(folder, name):
        raise WriteError(f"{folder}: exists and is no earlier {name}; it will not be overwritten, choose another folder")
    check_target(folder)


def save_folder(folder: Path, save: Callable[[Path], None], name: str, **description: Any) -> None:
    """Write a folder of this format by ``save``, with a description in its ``model.json``; an earlier one of the same is replaced.

    Raises:
        WriteError: The folder holds something else, or the disk refuses.
    """
    check_replaceable(folder, name)
    with atomic_folder(folder) as temporary:
        try:
            save(temporary)
        except SafetensorError as error:  # a full disk, in safetensors' own class
            raise OSError(f"writing the weights failed: {error}") from error
        write_json(temporary / MODEL_FILE, {"format": name, "format_version": 1, **description})
