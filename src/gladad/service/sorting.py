"""What is done with an image file whose decision is kept: it is moved to a folder of its decision, or the decision is written beside it."""

from __future__ import annotations

import errno
import filecmp
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from gladad.core.storage import write_json
from gladad.service import decisions
from gladad.service.decisions import Row
from gladad.service.schemas import shown

Finish = Callable[[Path, Row], None]
DECISIONS = (decisions.ACCEPT, decisions.WARN, decisions.REJECT)


def tag(path: Path, row: Row) -> None:
    """Write the decision beside its image: ``part.png.json``.

    Raises:
        WriteError: It cannot be written.
    """
    write_json(path.with_name(f"{path.name}.json"), shown(row).model_dump(mode="json"))


def sorter(target: Path) -> Finish:
    """What moves files into ``accept``, ``warn`` and ``reject`` of a folder."""
    return lambda path, row: move(path, target / row["decision"])


def move(path: Path, folder: Path) -> None:
    """Move a file into a folder, without taking the place of another one there: where its name is taken it gets a number.

    A move that was cut off anywhere may be done again.

    Raises:
        OSError: It cannot; the file is where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for target in _names(folder / path.name):
        if os.path.lexists(target):
            if not _same(path, target):
                continue
            path.unlink()  # by a move that was cut off
        else:
            try:
                _place(path, target)
            except FileExistsError:  # meanwhile
                continue
        break
    _sync(folder)
    _sync(path.parent)


def _names(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _same(path: Path, target: Path) -> bool:
    """Whether a file is already there, too."""
    first, second = os.lstat(path), os.lstat(target)
    if first.st_dev == second.st_dev:
        return first.st_ino == second.st_ino
    alike = (first.st_size, int(first.st_mtime)) == (second.st_size, int(second.st_mtime))
    return alike and filecmp.cmp(path, target, shallow=False)


def _place(path: Path, target: Path) -> None:
    """A rename that never replaces, also to another file system."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno == errno.EXDEV:
            _copy(path, target)
        else:  # a file system without second names: here another program could take the name in this very moment
            path.rename(target)
            return
    path.unlink()


def _copy(path: Path, target: Path) -> None:
    temporary = target.with_name(f".{path.name}.partial")
    try:
        shutil.copyfile(path, temporary)
        with suppress(OSError):  # there are systems that keep no times
            shutil.copystat(path, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Force the names in a folder onto the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
