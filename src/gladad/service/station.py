"""A station: a folder with its settings, keys, products, pictures and record."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path
from typing import Any

from gladad.core.errors import ConfigError, GladError, ModelFormatError
from gladad.core.settings import from_json, to_json
from gladad.core.storage import read_json, write_json
from gladad.service import audit
from gladad.service.pictures import PictureStore
from gladad.service.record import Record
from gladad.service.settings import StationSettings

FILE, KEYS_FILE = "station.json", "keys.json"
PRIVATE = 0o600  # mode of files that hold secrets, or what they are compared with
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class UnknownError(GladError):
    """There is nothing of this name."""


def check_name(name: str, what: str = "product") -> str:
    """A name that is safe in a path and a URL.

    Raises:
        ConfigError: It is none.
    """
    if not NAME.fullmatch(name) or ".." in name:
        raise ConfigError(f"{what} {name!r}: use 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return name


class Station:
    """An open station; several processes may have it open.

    Args:
        folder: Of the station; made if it is not there, in an empty place.

    Raises:
        ConfigError: The folder holds something else, or its settings are wrong.
        StorageError: It cannot be read or written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()
        if not (self.folder / FILE).is_file():
            self._make()
        try:
            self.settings = from_json(StationSettings, read_json(self.folder / FILE))
        except (ConfigError, ModelFormatError) as error:
            raise ConfigError(f"{self.folder / FILE}: {error}") from error
        self.record = Record(self.folder, self.settings.database)
        self.pictures = PictureStore(self.folder / "pictures")

    def _make(self) -> None:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"{self.folder}: is not a station (no {FILE}) and not empty; give another folder")
        write_json(self.folder / FILE, to_json(StationSettings()), PRIVATE)

    def close(self) -> None:
        """Give the connections back."""
        self.record.close()

    # -- keys ---------------------------------------------------------------------------------------------------

    def add_key(self, name: str, who: str) -> str:
        """Make an API key, which is told once: only its hash is kept. A key of that name is replaced."""
        check_name(name, "key")
        key = f"glad_{secrets.token_urlsafe(32)}"
        with self.record.write() as connection:
            write_json(self.folder / KEYS_FILE, self.keys() | {name: _hashed(key)}, PRIVATE)
            audit.append(connection, "key added", name, who, {})
        return key

    def remove_key(self, name: str, who: str) -> None:
        """Make a key worthless.

        Raises:
            UnknownError: There is no such key.
        """
        keys = self.keys()
        if keys.pop(name, None) is None:
            raise UnknownError(f"there is no key {name!r}")
        with self.record.write() as connection:
            write_json(self.folder / KEYS_FILE, keys, PRIVATE)
            audit.append(connection, "key removed", name, who, {})

    def keys(self) -> dict[str, Any]:
        """Name of each key -> its SHA-256."""
        path = self.folder / KEYS_FILE
        return read_json(path) if path.is_file() else {}

    def key_name(self, key: str) -> str | None:
        """Whose key it is; takes as long for one that is wrong."""
        given, found = _hashed(key), None
        for name, known in self.keys().items():
            if hmac.compare_digest(given, str(known)):
                found = name
        return found


def _hashed(key: str) -> str:
    """The keys are 256 random bits, which nobody can try out: no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()
