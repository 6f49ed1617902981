"""The database of a station: SQLite in its folder, or any that SQLAlchemy reaches by URL (PostgreSQL is tested).

Every write is one transaction that holds the only write lock, so that several processes may share a station and the audit log stays one
chain. It is on the disk when the block ends (SQLite: WAL, ``synchronous=FULL``).
"""

from __future__ import annotations

import errno
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, TimeoutError

from gladad.core.errors import ConfigError, GladError, ModelFormatError
from gladad.core.storage import WriteError

FILE = "record.sqlite"
LOCK = 7_137_041  # of PostgreSQL's advisory locks
BUSY_SECONDS = 60
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
REMEDY = "make room, or have the disk written to again, then send it again"
_FULL_SQLITE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_FULL_POSTGRESQL = ("53100", "25006")  # disk full; read-only


class StorageError(GladError):
    """The disk or the database refuses to keep something: it is full, read-only or away. Nothing of it was acknowledged."""


def now() -> str:
    """The time in UTC with microseconds, as it is recorded; such texts sort by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def new_id() -> str:
    """32 hexadecimal digits that nothing else has; later ones sort later, to the millisecond."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


class Record:
    """A connection to the database of a station, whose tables are brought up to date when it is opened.

    Args:
        folder: Of the station.
        url: Of the database; empty is SQLite in the folder.

    Raises:
        ConfigError: The URL is none, or its driver is not installed.
        StorageError: The database cannot be reached or written to.
        ModelFormatError: It was made by a newer version of this program.
    """

    def __init__(self, folder: Path, url: str = ""):
        self.engine = _engine(folder, url)
        self.sqlite = self.engine.dialect.name == "sqlite"
        try:
            with translated(), FileLock(folder / ".record.lock"):
                self._upgrade()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that no other one writes beside.

        Raises:
            StorageError: It could not be kept; nothing was changed.
        """
        with self._fresh(), self.engine.connect().execution_options(gladad_write=True) as connection, connection.begin():
            if not self.sqlite:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees the record as it was when it began."""
        with self._fresh(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        try:
            with translated():
                yield
        except StorageError as error:
            if self._broken(error.__cause__):
                self.renew()
            raise

    def _broken(self, cause: BaseException | None) -> bool:
        """Whether the connections are of no use any more: not where all are in use, or somebody else holds the lock for too long."""
        if isinstance(cause, DBAPIError):
            return _disk_failed(cause.orig) if self.sqlite else cause.connection_invalidated
        return self.sqlite and not isinstance(cause, TimeoutError)  # a file could not be written: the disk may be another one soon

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def renew(self) -> None:
        """Connect anew from now on: a disk that is mounted again is another one, and open files keep it from being checked."""
        self.engine.dispose()

    def _upgrade(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        scripts = ScriptDirectory.from_config(config)
        with self.read() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        known = {script.revision for script in scripts.walk_revisions()}
        if current is not None and current not in known:
            raise ModelFormatError(f"{self.engine.url!r}: was written by a newer gladad (revision {current}); upgrade gladad")
        if current != scripts.get_current_head():
            with self.write() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def _engine(folder: Path, url: str) -> Engine:
    try:
        chosen = make_url(url) if url else URL.create("sqlite", database=str((folder / FILE).absolute()))
        engine = create_engine(chosen, pool_pre_ping=bool(url), **({} if url else {"connect_args": {"timeout": BUSY_SECONDS}}))
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(f"database: {error}; write a URL such as postgresql+psycopg://user@host/name, or nothing for SQLite") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, _: Any) -> None:
    """Transactions are ours to begin (Python's module would begin them late), and are on the disk when they end."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("gladad_write") else "BEGIN")


@contextmanager
def translated() -> Iterator[None]:
    """Make what a disk or database refuses a `StorageError`; other mistakes stay what they are."""
    try:
        yield
    except (OSError, WriteError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in FULL:
            raise
        told = f"{cause.filename or 'the station'}: cannot be written ({cause.strerror})" if cause is error else str(error)
        raise StorageError(f"{told}; {REMEDY}") from error
    except DBAPIError as error:
        if not _refused(error):
            raise
        raise StorageError(f"the record cannot be written ({error.orig}); {REMEDY}") from error
    except TimeoutError as error:  # none of its connections is free
        raise StorageError(f"the record cannot be reached ({error})") from error


def _refused(error: DBAPIError) -> bool:
    """Whether it is the database's state that is at fault, not the statement."""
    if isinstance(error.orig, sqlite3.Error):
        return _disk_failed(error.orig) or _code(error.orig) == sqlite3.SQLITE_BUSY
    return error.connection_invalidated or getattr(error.orig, "sqlstate", None) in (*_FULL_POSTGRESQL, None)


def _disk_failed(error: BaseException | None) -> bool:
    return _code(error) in _FULL_SQLITE


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code; 0 of other errors."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
