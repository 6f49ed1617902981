"""Inspection as a service: from an image that came in to a decision that is kept."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from sqlalchemy import Connection

from gladad.core.errors import GladError
from gladad.models.exported.engines import cores
from gladad.service import audit, decisions, drift, golden
from gladad.service.decisions import Row
from gladad.service.inspector import BusyError, DeadlineError, Inspector
from gladad.service.intake import check_image
from gladad.service.outputs import Outbox
from gladad.service.products import Version, active_version, all_products, check_version, folder_of, product_of, stop, version_of
from gladad.service.record import StorageError, new_id, now
from gladad.service.recorder import Also, Pending, Recorder
from gladad.service.station import Station, UnknownError
from gladad.service.worker import Draw, Inspect, Load, Nearest, Outcome

CACHE_SECONDS = 1.0  # other processes may activate versions, too
LOAD_SECONDS = 600.0
CLEAN_SECONDS = 600.0
COLLECT_SECONDS = 10.0  # refusals leave circles of exceptions behind; Python by itself waits until there are very many


class NotReadyError(BusyError):
    """A product is not ready yet: send it again a little later."""


@dataclass(frozen=True)
class Origin:
    """Where an image is from."""

    who: str
    source: str  # "rest", "job" or "watch"
    name: str = ""  # of the image
    request_id: str = ""


class Line:
    """The inspection of the products of a station: the worker, the record, and what watches over them.

    Every active version is loaded and checked (its files, its golden parts) before its product inspects. `close` it.

    Args:
        station: Whose products.
        threads: Images inspected at a time; None is one for each core.
        only: The one product that is loaded; None: all.
    """

    def __init__(self, station: Station, threads: int | None = None, only: str | None = None):
        self.station, self._only = station, only
        self.outbox = Outbox(station)
        self.inspector = Inspector(station.settings.queue, threads or cores(), station.settings.loaded)
        self.recorder = Recorder(station, self._in_transaction, self._tell)
        self.on_decision: list[Callable[[Row], None]] = []  # called on the recorder's thread when decisions are on the disk
        self._active: dict[str, tuple[float, Version]] = {}
        self._ready: set[tuple[str, int]] = set()
        self._closed = threading.Event()
        self._caring = threading.Thread(target=self._care, name="line-care")
        self._caring.start()

    def close(self) -> None:
        """Finish what is under way and keep it, then stop."""
        self._closed.set()
        self.inspector.close()
        self._caring.join()
        self.recorder.close()
        self.outbox.close()

    @property
    def ready(self) -> bool:
        """Whether every product that can inspect does."""
        with self.station.record.read() as connection:
            wanted = set(self._inspecting(connection))
        return self.inspector.ready and wanted <= self._ready

    def _inspecting(self, connection: Connection) -> list[tuple[str, int]]:
        """Products that are to inspect, and the number of the version of each that does."""
        products = all_products(connection) if self._only is None else [product_of(connection, self._only)]
        return [(each.name, each.active) for each in products if each.active and not each.stopped]

    def active(self, product: str) -> Version:
        """The version that inspects now.

        Raises:
            UnknownError: There is no such product.
            StoppedError: It does not inspect.
        """
        known = self._active.get(product)
        if known is not None and time.monotonic() - known[0] < CACHE_SECONDS:
            return known[1]
        with self.station.record.read() as connection:
            version = active_version(connection, product)
        self._active[product] = (time.monotonic(), version)
        return version

    def inspect(
        self,
        product: str,
        content: bytes,
        origin: Origin,
        media_type: str = "",
        seconds: float | None = None,
        also: Also | None = None,
    ) -> Future[Row]:
        """Inspect an image.

        Args:
            product: Its active version inspects.
            content: Of the image file.
            origin: Where it is from.
            media_type: What the sender says it is.
            seconds: In which it must be done; None is the station's deadline.
            also: What else is kept in the same transaction.

        Returns:
            The decision, once it is kept. Cancelling gives its place free.

        Raises:
            UnknownError: There is no such product.
            StoppedError: It does not inspect.
            BusyError: There is no room, or the product is not ready.
            DataError: The image is refused.
        """
        version = self.active(product)
        if (product, version.number) not in self._ready:
            raise NotReadyError(f"product {product!r} is being loaded and checked; send it again a little later")
        ending = check_image(content, media_type, self.station.settings.max_pixels)
        folder = str(folder_of(self.station, product, version.number))
        asked = self.inspector.submit(Inspect(folder, content), seconds or self.station.settings.deadline)
        kept: Future[Row] = Future()
        held = [content]  # the futures know each other by their callbacks, and would keep it until the next collection of such circles

        def inspected(done: Future[Outcome]) -> None:
            sent = held.pop()
            if done.cancelled():
                kept.cancel()
            elif error := done.exception():
                Pending({}, "", b"", b"", kept).tell(error)
            else:
                outcome = done.result()
                row = _row(version, outcome, origin, ending)
                self.recorder.add(Pending(row, origin.who, sent, outcome.map_png, kept, also))

        kept.add_done_callback(lambda done: asked.cancel() if done.cancelled() else None)
        asked.add_done_callback(inspected)
        return kept

    def reconstruction(self, row: Row) -> Future[bytes | None]:
        """Inspect the image of a decision again for the picture of its reconstruction, a PNG; None where the model makes none.

        Raises:
            UnknownError: The image is not kept any more.
        """
        content = self.image(row)
        folder = str(folder_of(self.station, row["product"], row["version"]))
        return self.inspector.submit(Draw(folder, content), self.station.settings.deadline)

    def nearest_good(self, row: Row, place: int | None) -> Future[bytes | None]:
        """The kept good part that looks most like the part of a decision, a PNG; None where its version keeps none.

        Args:
            row: The decision.
            place: Around which of its regions, from 1; None: everywhere.

        Raises:
            UnknownError: The image is not kept any more, or there is no such region.
        """
        if place is not None and place > len(row["regions"]):
            raise UnknownError(f"decision {row['id']} has {len(row['regions'])} regions, not {place}")
        box = None if place is None else tuple(row["regions"][place - 1]["box"])
        folder = str(folder_of(self.station, row["product"], row["version"]))
        return self.inspector.submit(Nearest(folder, self.image(row), box), self.station.settings.deadline)

    def image(self, row: Row) -> bytes:
        """The image of a decision as it was sent.

        Raises:
            UnknownError: It is not kept any more.
        """
        try:
            return self.station.pictures.image_path(row["image_sha256"], row["image_type"]).read_bytes()
        except FileNotFoundError:
            raise UnknownError(f"the image of decision {row['id']} is not kept any more") from None

    def activate(self, product: str, number: int, who: str, *, force: bool = False) -> Version:
        """Load and check a version, then have it inspect; what is under way is finished by the one before.

        Args:
            product: Of which product.
            number: Of the version.
            who: Activates it.
            force: Even where golden parts are decided otherwise.

        Raises:
            UnknownError: There is no such version.
            DataError: It cannot be loaded, its files were changed, or it decides golden parts otherwise than the version before.
        """
        with self.station.record.read() as connection:
            version = version_of(connection, product, number)
        self._load(version)
        golden.promote(self.station, version, who, self._outcome, force=force)
        self._ready.add((product, number))
        self.forget(product)
        return version

    def check(self, version: Version) -> None:
        """Load a version and check its files and golden parts; the product is stopped if they are not as they were."""
        try:
            self._load(version)
            golden.check(self.station, version, self._outcome)
        except (BusyError, DeadlineError, StorageError):  # closing, or the worker or the record is away: try again
            raise
        except GladError as error:
            stop(self.station, version.product, str(error), drift.SYSTEM)
        self._ready.add((version.product, version.number))
        self.forget(version.product)

    def add_golden(self, product: str, content: bytes, name: str, who: str) -> Row:
        """Make an image a golden part of the active version, see `gladad.service.golden.add`."""
        return golden.add(self.station, self.active(product), content, name, who, self._outcome)

    def forget(self, product: str) -> None:
        """Look anew at which version of a product is active."""
        self._active.pop(product, None)

    def _load(self, version: Version) -> None:
        check_version(self.station, version)
        self.inspector.submit(Load(str(folder_of(self.station, version.product, version.number))), LOAD_SECONDS).result()

    def _outcome(self, folder: str, content: bytes) -> Outcome:
        outcome: Outcome = self.inspector.submit(Inspect(folder, content), LOAD_SECONDS).result()
        return outcome

    def _in_transaction(self, connection: Connection, made: list[Pending]) -> None:
        """Say of every decision whether the promise holds, let the drift tests see what was accepted, and address it to the outputs."""
        for name in dict.fromkeys(pending.row["product"] for pending in made):
            drift.watch(connection, name, [pending.row for pending in made if pending.row["product"] == name])
        self.outbox.add(connection, [pending.row for pending in made])

    def _tell(self, row: Row) -> None:
        self.outbox.wake()
        for listener in self.on_decision:
            listener(row)

    def _care(self) -> None:
        """Thread: get the products ready, notice versions that other processes activate, delete old pictures, and keep memory flat."""
        cleaned, collected = float("-inf"), time.monotonic()
        while not self._closed.is_set():
            try:
                with self.station.record.read() as connection:
                    missing = [version_of(connection, *each) for each in self._inspecting(connection) if each not in self._ready]
                for version in missing:
                    self.check(version)
                if time.monotonic() - cleaned > CLEAN_SECONDS:
                    cleaned = time.monotonic()
                    self.clean()
            except (GladError, OSError):  # the record is away, or we are closing: try again
                pass
            if time.monotonic() - collected > COLLECT_SECONDS:
                gc.collect()
                collected = time.monotonic()
            self._closed.wait(CACHE_SECONDS)

    def clean(self) -> None:
        """Delete the pictures that the settings do not keep."""
        settings = self.station.settings
        count, freed = self.station.pictures.clean(settings.keep_days, settings.keep_gib)
        if count:
            with self.station.record.write() as connection:
                audit.append(connection, "pictures deleted", "", drift.SYSTEM, {"files": count, "bytes": freed})


def _row(version: Version, outcome: Outcome, origin: Origin, ending: str) -> Row:
    return {
        "id": new_id(),
        "time": now(),
        "product": version.product,
        "version": version.number,
        "model_id": version.model_id,
        "calibration_id": version.calibration_id,
        "source": origin.source,
        "request_id": origin.request_id,
        "image_name": origin.name,
        "image_sha256": "",  # the recorder's
        "image_type": ending,
        "width": outcome.size[1],
        "height": outcome.size[0],
        "score": outcome.score,
        "warn_limit": version.warn_limit,
        "reject_limit": version.reject_limit,
        "p_value": outcome.p_value,
        "decision": decisions.decide(outcome.score, version.warn_limit, version.reject_limit),
        "step": outcome.step,
        "regions": outcome.regions,
        "brightness": outcome.brightness,
        "sharpness": outcome.sharpness,
        "promise_suspended": False,
        "milliseconds": outcome.milliseconds,
    }
