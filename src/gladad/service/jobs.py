"""Long work: fits, calibrations and evaluations, each in a process of its own, and folders of images; one job at a time.

A job outlives the service: what was waiting or running when it ended is taken up when it starts again. A folder goes on with the first
image that has no decision yet; a Stable Diffusion's fit with its last checkpoint; the other jobs begin anew.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import insert, select, update

from gladad.core.errors import DataError, GladError, NotFiniteError
from gladad.core.images import list_images
from gladad.core.storage import read_json, write_json
from gladad.detector.process import process_context
from gladad.service import audit, feedback
from gladad.service.data_folders import DATA, path_of
from gladad.service.decisions import Row
from gladad.service.inspector import BusyError
from gladad.service.job_process import FILE, LOG, MODEL, run
from gladad.service.line import Line, Origin
from gladad.service.onlooker import EXAMPLES
from gladad.service.products import StoppedError, Version, add_version, all_versions, folder_of, product_of, version_of
from gladad.service.record import new_id, now
from gladad.service.station import UnknownError, check_name
from gladad.service.tables import decisions, jobs

Kind = Literal["fit", "calibrate", "evaluate", "feedback", "inspect"]
WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
FINAL = (DONE, FAILED, CANCELLED)
RESULT = "result.json"
POLL_SECONDS = 0.5
KILL_SECONDS = 20.0
IMAGE_SECONDS = 600.0  # that an image of a folder may wait
Job = dict[str, Any]


class CancelledError(GladError):
    """A job was cancelled."""


def _made_before(folder: Path) -> dict[str, Any] | None:
    """The result of a job whose process had done its work when the service ended."""
    return read_json(folder / RESULT) if (folder / RESULT).is_file() else None


class Jobs:
    """The jobs of a running line; `close` stops the one under way, which goes on at the next start."""

    def __init__(self, line: Line):
        self.line, self.station = line, line.station
        self._wake = threading.Event()
        self._closed = False
        self._cancelled: set[str] = set()
        self._progress: dict[str, dict[str, Any]] = {}
        with self.station.record.write() as connection:
            connection.execute(update(jobs).where(jobs.c.state == RUNNING).values(state=WAITING))
        self._thread = threading.Thread(target=self._run, name="jobs")
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def add(self, kind: Kind, product: str, who: str, request: dict[str, Any]) -> Job:
        """Queue a job.

        Args:
            kind: What to do.
            product: For which product; a fit may be its first.
            who: Asks for it.
            request: ``images``, a folder below the station's data; for a fit also ``base`` and ``settings``; ``note``, ``activate``.

        Raises:
            UnknownError: There is no such folder or product.
            StoppedError: The product has no active version.
        """
        check_name(product)
        path_of(self.station, request["images"])
        if kind != "fit":
            self._version(product)
        identity, asked = new_id(), {"kind": kind, "product": product, "request": request}
        with self.station.record.write() as connection:
            connection.execute(insert(jobs), [{"id": identity, "created": now(), "who": who, "state": WAITING, **asked}])
            audit.append(connection, "job added", identity, who, asked)
        self._wake.set()
        return self.one(identity)

    def one(self, identity: str) -> Job:
        """A job.

        Raises:
            UnknownError: There is none.
        """
        with self.station.record.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == identity)).first()
        if row is None:
            raise UnknownError(f"there is no job {identity!r}")
        return self._shown(row)

    def all(self, limit: int = 100) -> list[Job]:
        """The newest first."""
        with self.station.record.read() as connection:
            return [self._shown(row) for row in connection.execute(select(jobs).order_by(jobs.c.id.desc()).limit(limit))]

    def cancel(self, identity: str, who: str) -> Job:
        """Stop a job that is not finished; what it has decided or saved so far stays.

        Raises:
            UnknownError: There is none.
        """
        self.one(identity)
        with self.station.record.write() as connection:
            open_ = (jobs.c.id == identity) & jobs.c.state.in_((WAITING, RUNNING))
            if connection.execute(update(jobs).where(open_).values(state=CANCELLED)).rowcount:
                audit.append(connection, "job cancelled", identity, who, {})
                self._cancelled.add(identity)
        return self.one(identity)

    def _shown(self, row: Any) -> Job:
        job = dict(row._mapping)
        return job | {"progress": self._progress.get(job["id"], job["progress"])}

    def _run(self) -> None:
        while not self._closed:
            with contextlib.suppress(GladError):  # the record is away: try again
                with self.station.record.write() as connection:
                    row = connection.execute(select(jobs).where(jobs.c.state == WAITING).order_by(jobs.c.id).limit(1)).first()
                    if row is not None:
                        connection.execute(update(jobs).where(jobs.c.id == row.id).values(state=RUNNING))
                if row is not None:
                    self._do(dict(row._mapping))
                    continue
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()

    def _do(self, job: Job) -> None:
        state, result, problem = DONE, None, None
        try:
            images = path_of(self.station, job["request"]["images"])
            result = self._inspect(job, images) if job["kind"] == "inspect" else self._process(job, images)
        except CancelledError:
            state = CANCELLED
        except (GladError, OSError) as error:
            state, problem = FAILED, str(error)
        if self._closed and state != DONE:
            return  # it goes on at the next start
        values = {"state": state, "result": result, "problem": problem, "progress": self._progress.pop(job["id"], None)}
        while not self._closed:
            with contextlib.suppress(GladError), self.station.record.write() as connection:
                connection.execute(update(jobs).where(jobs.c.id == job["id"], jobs.c.state == RUNNING).values(**values))
                audit.append(connection, f"job {state}", job["id"], job["who"], {"result": result, "problem": problem})
                return
            time.sleep(POLL_SECONDS)

    def _version(self, product: str) -> Version:
        """The version that was activated last, even where the product is stopped."""
        with self.station.record.read() as connection:
            number = product_of(connection, product).active
            if number is None:
                raise StoppedError(f"product {product!r} has no active version; activate one")
            return version_of(connection, product, number)

    def example(self, identity: str, name: str) -> bytes:
        """A picture that a training has shown, as PNG; it is kept until the job is done.

        Raises:
            UnknownError: There is none.
        """
        path = self.station.folder / "jobs" / str(self.one(identity)["id"]) / EXAMPLES / f"{check_name(name)}.png"
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise UnknownError(f"job {identity!r} shows no picture {name!r}") from None

    def _tell(self, job: Job, **told: Any) -> None:
        self._progress[job["id"]] = self._progress.get(job["id"], {}) | told

    def _check(self, job: Job) -> None:
        if self._closed or job["id"] in self._cancelled:
            raise CancelledError("the job was cancelled")

    # -- in a process of its own --------------------------------------------------------------------------------

    def _process(self, job: Job, images: Path) -> dict[str, Any]:
        folder = self.station.folder / "jobs" / str(job["id"])
        request: dict[str, Any] = {"base": "lite", "settings": {}} | job["request"]
        request |= {"kind": job["kind"], "product": job["product"], "images": str(images)}
        if request.get("ignore") is not None:
            request["ignore"] = str(path_of(self.station, request["ignore"]))
        limits: dict[str, Any] = {}
        if job["kind"] != "fit":
            version = self._version(job["product"])
            limits = {"warn_limit": version.warn_limit, "reject_limit": version.reject_limit}
            request["model"] = str(folder_of(self.station, job["product"], version.number))
        folder.mkdir(parents=True, exist_ok=True)
        if job["kind"] == "feedback":
            request |= feedback.collect(self.station, version, folder)
        result = _made_before(folder)
        if result is None:
            write_json(folder / FILE, request)
            result = self._followed(job, folder)
            write_json(folder / RESULT, result)
        if job["kind"] == "evaluate":  # whose report is for people
            return result
        if result.get("offered", True):
            result |= {"version": self._added(job, folder, str(request["note"]), limits)}
            if request["activate"]:
                self.line.activate(job["product"], result["version"], job["who"])
        shutil.rmtree(folder, ignore_errors=True)
        return result

    def _added(self, job: Job, folder: Path, note: str, limits: dict[str, Any]) -> int:
        """Make what a job made a version, once, whatever happens in between; returns its number."""
        mark = f"{job['kind']} by job {job['id']}"
        with contextlib.suppress(UnknownError), self.station.record.read() as connection:
            for version in all_versions(connection, job["product"]):
                if version.note.endswith(mark):
                    return version.number
        note = f"{note}; {mark}" if note else mark
        return add_version(self.station, job["product"], folder / MODEL, job["who"], note=note, **limits).number

    def _followed(self, job: Job, folder: Path) -> dict[str, Any]:
        """Run the process of a job and pass on its progress until the result."""
        context, last = process_context(), dict[str, Any]()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=run, args=(folder, sender), name=f"gladad-{job['kind']}")
        process.start()
        sender.close()
        try:
            with contextlib.suppress(EOFError):
                while True:
                    self._check(job)
                    if receiver.poll(POLL_SECONDS / 2):
                        last = receiver.recv()
                        if not last.keys() & {"result", "problem"}:
                            self._tell(job, **last)
            process.join(KILL_SECONDS)
        finally:
            process.terminate()
            process.join(KILL_SECONDS)
            process.kill()
            process.join()
            receiver.close()
        if "result" in last:
            return dict(last["result"])
        raise DataError(str(last.get("problem") or f"its process ended with status {process.exitcode}; see {folder / LOG}"))

    # -- folders ------------------------------------------------------------------------------------------------

    def _inspect(self, job: Job, folder: Path) -> dict[str, Any]:
        paths = list_images(folder)
        if not paths:
            raise DataError(f"{DATA}/{job['request']['images']}: no images")
        with self.station.record.read() as connection:
            query = select(decisions.c.image_name, decisions.c.decision).where(decisions.c.request_id == job["id"])
            known = {name: decision for name, decision in connection.execute(query)}
        counts, refused = Counter(known.values()), []
        under_way: deque[tuple[str, Future[Row]]] = deque()

        def take() -> None:
            name, future = under_way.popleft()
            try:
                counts[future.result()["decision"]] += 1
            except (DataError, NotFiniteError) as error:
                refused.append(f"{name}: {error}")

        for path in paths:
            name = path.relative_to(folder).as_posix()
            if name not in known:
                with contextlib.suppress(DataError):
                    under_way.append((name, self._asked(job, path, name, refused)))
            while len(under_way) > 2 * self.line.inspector.threads:
                take()
            self._tell(job, stage="inspecting", done=sum(counts.values()) + len(refused), total=len(paths))
        while under_way:
            take()
        return {"counts": dict(counts), "refused": refused}

    def _asked(self, job: Job, path: Path, name: str, refused: list[str]) -> Future[Row]:
        """Have one image inspected, as soon as there is room."""
        content, origin = path.read_bytes(), Origin(job["who"], "job", name, job["id"])
        while True:
            self._check(job)
            try:
                return self.line.inspect(job["product"], content, origin, seconds=IMAGE_SECONDS)
            except BusyError:
                time.sleep(POLL_SECONDS / 5)
            except DataError as error:
                refused.append(f"{name}: {error}")
                raise
