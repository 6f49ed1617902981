"""A watched folder: images that appear below it are inspected, each once, and put where their decision says.

A file is known by its number, size and time, so that a rename is no new file, but another content is. The device is no part of that: its
number changes when a share is mounted again. That a file was decided is kept in the transaction that keeps the decision.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, delete, insert, select, update

from gladad.core.errors import ConfigError, DataError, GladError, NotFiniteError
from gladad.core.images import SUFFIXES
from gladad.core.storage import printable
from gladad.core.threads import CancelToken
from gladad.service.decisions import Row
from gladad.service.inspector import BusyError, DeadlineError
from gladad.service.line import Line, Origin
from gladad.service.products import StoppedError
from gladad.service.record import StorageError
from gladad.service.sorting import Finish
from gladad.service.tables import decisions, watched

POLL_SECONDS = 0.5  # between two looks at the folder, or this many times as long as a look takes:
LOOKS = 5.0
BUSY_SECONDS = 0.1
IMAGE_SECONDS = 600.0  # that an image may wait
ATTEMPTS = 3  # at an image that fails for no reason of its own, before it is refused
ENDINGS = tuple(SUFFIXES)
CHUNK = 500  # files that the record is asked about at a time
REFUSED = "refused"  # key of a count


class Watch:
    """The inspection of the images below a folder.

    Args:
        line: Inspects them; it is not closed.
        product: Its active version decides.
        folder: Watched. Links, hidden files and hidden folders are passed over.
        who: For the record.
        settle: Seconds that a file must not have changed to be complete.
        retry: Seconds to the next try where nothing can be decided now.
        finish: What is done with a file whose decision is kept; None leaves it as it is.
        apart: Folders that are passed over.
        tell: Told, in a sentence, what cannot be inspected.
        cancel: Ends `run`; what is under way is finished.

    Raises:
        ConfigError: The folder is none, or is watched already.
        UnknownError: There is no such product.
    """

    def __init__(
        self,
        line: Line,
        product: str,
        folder: Path,
        who: str,
        *,
        settle: float = 1.0,
        retry: float = 2.0,
        finish: Finish | None = None,
        apart: Iterable[Path] = (),
        tell: Callable[[str], None] = print,
        cancel: CancelToken | None = None,
    ):
        self.line, self.product, self.who, self.settle, self.finish, self.tell = line, product, who, settle, finish, tell
        self.folder, self.cancel, self.counts = folder.resolve(), cancel or CancelToken(), Counter[str]()
        station = line.station.folder.resolve()
        self._retry = retry
        self._apart = {path.resolve() for path in (*apart, station, station / "pictures")}
        if not self.folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        if inside := [path for path in self._apart - {station} if self.folder.is_relative_to(path)]:  # it may be in the station's data
            raise ConfigError(f"{folder}: lies in {inside[0]}, whose images are not to be inspected; watch another folder")
        with suppress(StoppedError):  # it waits until the product inspects
            line.active(product)
        self._key = printable(self.folder)
        self._limit = min(2 * line.inspector.threads, line.station.settings.queue)
        self._known: set[str] = set()  # files in the folder that are decided or refused
        self._seen: dict[str, float] = {}  # the others, and since when they have not changed
        self._unfinished: dict[str, Row] = {}  # decided, but not where they belong
        self._finished: list[str] = []  # and those that are, which the record does not know yet
        self._failures = Counter[str]()
        self._told: set[str] = set()
        self._trouble: Exception | None = None  # why nothing can be decided now
        self._untidy = False  # files cannot be put where they belong now

    def run(self, once: bool = False) -> Counter[str]:
        """Inspect what is there and what appears, until cancelled.

        Args:
            once: Only what is there now; what is still being written is left.

        Returns:
            How many were accepted, warned of, rejected and refused.

        Raises:
            GladError: Nothing can be decided now; only if it is `once`.
        """
        name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        lock = FileLock(self.line.station.folder / f".watch-{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"{self.folder}: is being watched already") from error
        try:
            self._run(once)
        finally:
            lock.release()
        return self.counts

    def _run(self, once: bool) -> None:
        loaded, looks = False, 0
        while not self.cancel.cancelled:
            began, pause = time.monotonic(), self.settle if once else POLL_SECONDS
            self._trouble, self._untidy = None, False
            try:
                if not loaded:
                    self._unfinished = self._load_unfinished()
                    loaded = True
                ready = self._look()
                pause = max(pause, LOOKS * (time.monotonic() - began))
                self._decide(ready)
                self._mark_finished()
            except (GladError, OSError) as error:
                self._trouble = error
            looks += 1
            if self._trouble is not None:
                if once:
                    raise self._trouble
                self._tell_once(f"waiting: {self._trouble}")
                pause = self._retry
            elif not self._untidy:
                self._told = {each for each in self._told if not each.startswith("waiting: ")}
            if once and looks > 1 and not self._failures:
                return
            self._sleep(pause)

    # -- the folder ---------------------------------------------------------------------------------------------

    def _look(self) -> list[tuple[Path, str]]:
        """Files that are complete and not decided, with their identities; those that changed first before the others."""
        present = {identity_of(status): (status.st_mtime_ns, path) for path, status in _images(self.folder, self._apart)}
        self._known &= present.keys()
        self._known |= self._decided([each for each in present if each not in self._known and each not in self._seen])
        moment = time.monotonic()
        self._seen = {each: self._seen.get(each, moment) for each in present if each not in self._known}
        self._failures = Counter({each: count for each, count in self._failures.items() if each in self._seen})
        for identity in self._unfinished.keys() & present.keys():
            self._finish(identity, Path(present[identity][1]), self._unfinished[identity])
        ready = sorted((*present[each], each) for each, since in self._seen.items() if moment - since >= self.settle)
        return [(Path(path), identity) for _, path, identity in ready]

    def _decided(self, identities: Sequence[str]) -> set[str]:
        """Which of these files the record knows."""
        found = set[str]()
        for start in range(0, len(identities), CHUNK):
            query = select(watched.c.file).where(watched.c.folder == self._key, watched.c.file.in_(identities[start : start + CHUNK]))
            with self.line.station.record.read() as connection:
                found.update(connection.execute(query).scalars())
        return found

    def _load_unfinished(self) -> dict[str, Row]:
        """Files that were decided, after which the program was cut off."""
        query = select(watched.c.file, decisions).join(decisions, decisions.c.id == watched.c.decision_id)
        with self.line.station.record.read() as connection:
            rows = connection.execute(query.where(watched.c.folder == self._key, watched.c.moved.is_(False))).all()
        return {row.file: dict(row._mapping) for row in rows}

    def _read(self, path: Path, identity: str) -> bytes | None:
        """The content of a file; None if it is not the one that was seen any more.

        Raises:
            DataError: It is too large.
        """
        limit = self.line.station.settings.max_bytes
        try:
            with path.open("rb") as file:
                if (status := os.fstat(file.fileno())).st_size > limit:
                    raise DataError(f"{status.st_size} bytes is more than is accepted ({limit}); crop or shrink it")
                content = file.read()
                same = identity_of(status) == identity_of(os.fstat(file.fileno())) == identity and len(content) == status.st_size
        except FileNotFoundError:  # renamed or gone: the next look shows
            return None
        except OSError as error:
            self._tell_once(f"{self._name(path)}: cannot be read ({error.strerror or error})")
            return None
        return content if same else None

    def _name(self, path: Path) -> str:
        return printable(path.relative_to(self.folder).as_posix())

    # -- decisions ----------------------------------------------------------------------------------------------

    def _decide(self, ready: Sequence[tuple[Path, str]]) -> None:
        """Inspect files, some at a time, until there are no more, or nothing can be decided now."""
        under_way: deque[tuple[Path, str, Future[Row]]] = deque()
        for path, identity in ready:
            if self.cancel.cancelled or self._trouble is not None:
                break
            try:
                future = self._asked(path, identity)
            except DataError as error:
                self._refuse(path, identity, error)
            except (GladError, OSError) as error:
                self._trouble = error
            else:
                if future is not None:
                    under_way.append((path, identity, future))
            while len(under_way) >= self._limit:
                self._take(*under_way.popleft())
        while under_way:
            self._take(*under_way.popleft())

    def _asked(self, path: Path, identity: str) -> Future[Row] | None:
        """Have a file inspected, as soon as there is room; None if it is another one meanwhile, or the watch ends."""
        content = self._read(path, identity)
        if content is None:
            return None
        origin, values = Origin(self.who, "watch", self._name(path)), {"moved": self.finish is None}

        def also(connection: Connection, row: Row) -> None:
            self._keep(connection, identity, origin.name, values | {"decision_id": row["id"]})

        while not self.cancel.cancelled:
            try:
                return self.line.inspect(self.product, content, origin, seconds=IMAGE_SECONDS, also=also)
            except BusyError:
                time.sleep(BUSY_SECONDS)
        return None

    def _take(self, path: Path, identity: str, future: Future[Row]) -> None:
        """Wait for a decision, and do what follows of it."""
        try:
            row = future.result()
        except (DataError, NotFiniteError) as error:
            self._refuse(path, identity, error)
        except (StorageError, BusyError, DeadlineError, StoppedError) as error:
            self._trouble = error
        except Exception as error:  # the worker died of it, or has a mistake
            self._failures[identity] += 1
            if self._failures[identity] >= ATTEMPTS:
                self._refuse(path, identity, error)
        else:
            self._settled(identity)
            self.counts[row["decision"]] += 1
            if self.finish is not None:
                self._finish(identity, path, row)

    def _refuse(self, path: Path, identity: str, error: Exception) -> None:
        """Keep why a file is not inspected; it is not tried again before it changes."""
        name = self._name(path)
        try:
            with self.line.station.record.write() as connection:
                self._keep(connection, identity, name, {"problem": str(error), "moved": True})
        except StorageError as refused:
            self._trouble = refused
            return
        self._settled(identity)
        self.counts[REFUSED] += 1
        self.tell(f"refused: {name}: {error}")

    def _settled(self, identity: str) -> None:
        self._known.add(identity)
        self._seen.pop(identity, None)
        self._failures.pop(identity, None)

    def _keep(self, connection: Connection, identity: str, name: str, values: Row) -> None:
        """Deleted first: an error here would undo the decisions of others, which are kept in the same transaction."""
        connection.execute(delete(watched).where(watched.c.folder == self._key, watched.c.file == identity))
        connection.execute(insert(watched), [{"folder": self._key, "file": identity, "name": name} | values])

    # -- afterwards ---------------------------------------------------------------------------------------------

    def _finish(self, identity: str, path: Path, row: Row) -> None:
        """Put a decided file where it belongs; where that fails it is tried again at the next look."""
        self._unfinished[identity] = row
        if self.finish is None or self._untidy:
            return
        try:
            if identity_of(os.lstat(path)) != identity:  # overwritten meanwhile: what is there now is not decided
                return
            self.finish(path, row)
        except FileNotFoundError:
            return
        except (GladError, OSError) as error:
            self._untidy = True
            self._tell_once(f"waiting: {error}")
            return
        del self._unfinished[identity]
        self._finished.append(identity)
        if len(self._finished) >= CHUNK:
            self._mark_finished()

    def _mark_finished(self) -> None:
        if self._finished:
            files = watched.c.file.in_(self._finished)
            with self.line.station.record.write() as connection:
                connection.execute(update(watched).where(watched.c.folder == self._key, files).values(moved=True))
            self._finished.clear()

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self.tell(sentence)

    def _sleep(self, seconds: float) -> None:
        """In short pieces, since a signal does not end a sleep."""
        end = time.monotonic() + seconds
        while not self.cancel.cancelled and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def identity_of(status: os.stat_result) -> str:
    """What tells a file from others, and from itself with another content."""
    return f"{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _images(folder: Path, apart: set[Path]) -> Iterator[tuple[str, os.stat_result]]:
    """Image files below a folder, which must be readable; folders below it that are not are passed over. Paths are slow, texts are not."""
    folders, passed_over = [str(folder)], {str(path) for path in apart}
    while folders:
        here = folders.pop()
        try:
            entries = os.scandir(here)
        except OSError:
            if here == str(folder):
                raise
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders += [entry.path] if entry.path not in passed_over else []
                elif entry.name.lower().endswith(ENDINGS) and entry.is_file(follow_symlinks=False):
                    with suppress(OSError):  # gone meanwhile
                        yield entry.path, os.lstat(entry.path)  # the entry's own is not complete everywhere
