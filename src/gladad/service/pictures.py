"""The pictures of decisions on disk: images by their content, maps by their decision; deleted by age and size."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

from gladad.core.storage import atomic_file
from gladad.service.record import REMEDY, StorageError, translated

DAY, GIB = 86_400.0, 2**30


class PictureStore:
    """Files below a folder: ``images/ab/<sha256>.<type>`` as they were sent, and ``maps/ab/<decision>.png``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def image_path(self, sha256: str, kind: str) -> Path:
        """Where an image is, if it is kept."""
        return self.folder / "images" / sha256[:2] / f"{sha256}.{kind}"

    def map_path(self, decision: str) -> Path:
        """Where the map of a decision is, if it is kept. The first digits of its ID are a time, the last ones random."""
        return self.folder / "maps" / decision[-2:] / f"{decision}.png"

    def add(self, path: Path, content: bytes) -> None:
        """Write a file whole and to the disk; one that is there becomes young again.

        Raises:
            StorageError: The disk refuses.
        """
        check_there(self.folder.parent)
        with translated():
            if path.is_file():
                path.touch()
                return
            with atomic_file(path) as temporary:
                temporary.write_bytes(content)

    def clean(self, days: float, gib: float) -> tuple[int, int]:
        """Delete files that are older than so many days, then the oldest until the rest takes no more than so many GiB.

        Returns:
            Number of files deleted, and their bytes.
        """
        files = sorted(self._files(), key=lambda file: file[0])
        total, limit, oldest = sum(size for _, size, _ in files), gib * GIB, time.time() - days * DAY
        count = freed = 0
        for changed, size, path in files:
            if changed >= oldest and total - freed <= limit:
                break
            path.unlink(missing_ok=True)
            count, freed = count + 1, freed + size
        return count, freed

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for path in self.folder.glob("*/*/*"):
            try:
                status = path.stat()
            except OSError:  # gone meanwhile
                continue
            yield status.st_mtime, status.st_size, path


def check_there(station: Path) -> None:
    """Refuse to write below a station whose disk has gone: folders would be made where it belongs.

    Raises:
        StorageError: There is no such folder.
    """
    if not station.is_dir():
        raise StorageError(f"{station}: is not there any more; {REMEDY}")


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()
