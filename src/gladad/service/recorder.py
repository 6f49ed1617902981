"""Decisions on their way into the record: those that come together are kept in one transaction, and only then told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Connection

from gladad.service import decisions
from gladad.service.decisions import Row
from gladad.service.pictures import sha256
from gladad.service.record import StorageError
from gladad.service.station import Station

GROUP = 64  # most decisions of a transaction
Added = Callable[[Connection, list["Pending"]], None]
Also = Callable[[Connection, Row], None]


@dataclass(eq=False)
class Pending:
    """A decision that is not kept yet."""

    row: Row
    who: str
    content: bytes  # of the image
    map_png: bytes
    future: Future[Row] = field(default_factory=Future)
    also: Also | None = None  # done in the same transaction, once the row is inserted

    def tell(self, error: BaseException | None = None) -> None:
        """Resolve the future with the row, or an error."""
        with suppress(Exception):  # whoever waited is gone
            if error is None:
                self.future.set_result(self.row)
            else:
                self.future.set_exception(error)


class Recorder:
    """A thread that keeps decisions.

    Args:
        station: Where.
        adds: What else changes in the same transaction; it may change the rows, which are inserted afterwards.
        tell: Told of every decision that is on the disk.
    """

    def __init__(self, station: Station, adds: Added, tell: Callable[[Row], None]):
        self._station, self._adds, self._tell = station, adds, tell
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._files = ThreadPoolExecutor(4, thread_name_prefix="pictures")
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    def add(self, pending: Pending) -> None:
        """Have a decision kept; its future has the row when it is on the disk, or a `StorageError`."""
        self._queue.put(pending)

    def close(self) -> None:
        """Keep what has come, then stop."""
        self._queue.put(None)
        self._thread.join()
        self._files.shutdown()

    def _run(self) -> None:
        running = True
        while running:
            group = [self._queue.get()]
            with suppress(queue.Empty):
                while len(group) < GROUP:
                    group.append(self._queue.get_nowait())
            running = None not in group
            self._keep([pending for pending in group if pending is not None])

    def _keep(self, group: list[Pending]) -> None:
        kept = [pending for pending, written in zip(group, self._files.map(self._pictures, group), strict=True) if written]
        if not kept:
            return
        try:
            with self._station.record.write() as connection:
                self._adds(connection, kept)
                decisions.insert_all(connection, [(pending.row, pending.who) for pending in kept])
                for pending in kept:
                    if pending.also is not None:
                        pending.also(connection, pending.row)
        except Exception as error:
            for pending in kept:
                pending.tell(error)
        else:
            for pending in kept:
                self._tell(pending.row)
                pending.tell()

    def _pictures(self, pending: Pending) -> bool:
        """Hash the image, and write the pictures of a decision where they are wanted; what goes wrong is told."""
        row, keep, store = pending.row, self._station.settings.keep, self._station.pictures
        try:
            row["image_sha256"] = sha256(pending.content)
            if keep == "all" or (keep == "rejected" and row["decision"] != decisions.ACCEPT):
                store.add(store.image_path(row["image_sha256"], row["image_type"]), pending.content)
                store.add(store.map_path(row["id"]), pending.map_png)
        except Exception as error:
            if isinstance(error, StorageError):
                self._station.record.renew()
            pending.tell(error)
            return False
        return True
