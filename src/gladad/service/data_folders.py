"""Folders of images in a station, for fits, calibrations and evaluations: filled by an operator, by links, or over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gladad.core.errors import DataError
from gladad.core.images import SUFFIXES, list_images
from gladad.core.records import Sample
from gladad.core.storage import atomic_file, printable
from gladad.data.checks import check_dataset
from gladad.data.layouts import Dataset, read_dataset
from gladad.service.pictures import check_there
from gladad.service.record import translated
from gladad.service.station import Station, UnknownError, check_name

DATA = "data"
DEPTH = 4  # of folders that are listed


def path_of(station: Station, name: str) -> Path:
    """A folder of images, or a file, below the station's ``data``, which an operator may fill with links; nothing else can be named.

    Raises:
        ConfigError: A part of the name is not safe.
        UnknownError: It is not there.
    """
    path = _place(station, name)
    if not path.exists():
        raise UnknownError(f"there is no {DATA}/{name} in the station; put the images there, or a link to them")
    return path


def listing(station: Station) -> list[dict[str, Any]]:
    """The folders that hold images, by name, each with its number of images (those below it are not counted)."""
    found: list[dict[str, Any]] = []

    def look(folder: Path, name: str, depth: int) -> None:
        entries = sorted(folder.iterdir())
        count = sum(entry.suffix.lower() in SUFFIXES and entry.is_file() for entry in entries)
        if count:
            found.append({"name": name, "images": count})
        for entry in entries:
            if depth < DEPTH and entry.is_dir() and not entry.name.startswith("."):
                look(entry, f"{name}/{entry.name}" if name else entry.name, depth + 1)

    if (station.folder / DATA).is_dir():
        look(station.folder / DATA, "", 0)
    return found


def add(station: Station, folder: str, name: str, content: bytes) -> None:
    """Write an image, whole; one of that name is replaced.

    Raises:
        ConfigError: A name is not safe.
        DataError: The name does not end like an image's.
        StorageError: The disk refuses.
    """
    path = _place(station, folder) / check_name(name, "file")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{name}: give the name an ending of an image, such as .png")
    check_there(station.folder)
    with translated(), atomic_file(path) as temporary:
        temporary.write_bytes(content)


def remove(station: Station, folder: str, name: str) -> None:
    """Delete an image of a folder. One that is reached by a link is an operator's, and stays.

    Raises:
        ConfigError: A name is not safe.
        DataError: It is not an image, or reached by a link.
        UnknownError: It is not there.
    """
    path = path_of(station, folder) / check_name(name, "file")
    if not path.is_file():
        raise UnknownError(f"{DATA}/{folder} has no image {name!r}")
    root = (station.folder / DATA).resolve()
    if path.suffix.lower() not in SUFFIXES or path.resolve() != root / folder / name:
        raise DataError(f"{DATA}/{folder}/{name} is reached by a link or is no image; delete it where it is")
    with translated():
        path.unlink()


def names(station: Station, folder: str) -> list[str]:
    """The images of a folder, and below it, in order.

    Raises:
        UnknownError: There is no such folder.
    """
    root = path_of(station, folder)
    return [_name(path, root) for path in list_images(root)]


def image(station: Station, folder: str, name: str) -> bytes:
    """An image of a folder by the name that :func:`names` gives it, which stays its own while others come and go.

    Raises:
        UnknownError: There is none.
    """
    root = path_of(station, folder)
    try:
        return next(path for path in list_images(root) if _name(path, root) == name).read_bytes()
    except (StopIteration, FileNotFoundError):
        raise UnknownError(f"{DATA}/{folder} has no image {name!r}") from None


def check(station: Station, folder: str) -> dict[str, Any]:
    """What is in a folder and what is wrong with it; paths are relative to it.

    A folder without the layout of a data set is one of good images.

    Raises:
        UnknownError: There is no such folder.
        DataError: It holds no images.
    """
    root = path_of(station, folder)
    paths = list_images(root)
    if not paths:
        raise DataError(f"{DATA}/{folder}: no images")
    try:
        dataset = read_dataset(root, "auto", None)
    except DataError:
        dataset = Dataset(root, "folder", [Sample(path, category=folder, split="train") for path in paths])
    found = check_dataset(dataset).to_json()
    for finding in found["findings"]:
        finding["files"] = [_relative(file, root) for file in finding["files"]]
    return found | {"layout": dataset.layout, "notes": [printable(note) for note in dataset.notes]}


def _place(station: Station, name: str) -> Path:
    return station.folder.joinpath(DATA, *(check_name(part, "data folder") for part in name.split("/")))


def _name(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def _relative(file: str, root: Path) -> str:
    path = Path(file)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else file
