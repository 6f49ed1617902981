"""A bounded queue before the worker process, which is started again when it dies."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from gladad.core.errors import GladError
from gladad.detector.process import process_context
from gladad.service.worker import READY, Asked, run

ATTEMPTS = 2  # that the worker may die of one request before this is given up
RESTART_SECONDS = (0.0, 0.5, 2.0, 10.0)  # waits before a start, the longer the more of them failed in a row
HUNG_SECONDS = 60.0  # after its deadline a request that is still under way proves that the worker hangs


class BusyError(GladError):
    """The queue is full: send it again a little later."""


class DeadlineError(GladError):
    """A request was not done in time."""


class WorkerError(GladError):
    """The worker process failed."""


@dataclass(eq=False)
class Ticket:
    """A request and its place."""

    request: Asked
    deadline: float  # by time.monotonic()
    future: Future[Any] = field(default_factory=Future)
    attempts: int = 0

    def resolve(self, value: Any = None, error: BaseException | None = None) -> None:
        """Tell who waits; whoever has gone away is not told."""
        with suppress(InvalidStateError):
            if error is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(error)


class Inspector:
    """Passes requests to the worker process, in order, at most as many at a time as keep it busy.

    Args:
        capacity: Requests that may wait or be under way; one more is refused at once.
        threads: Images that the worker inspects at a time.
        loaded: Models that it keeps in memory.
    """

    def __init__(self, capacity: int, threads: int, loaded: int):
        self.capacity, self.threads = capacity, threads
        self.restarts = 0
        self._loaded = loaded
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._sent: dict[int, Ticket] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._connection: Connection | None = None
        self._process: Any = None
        self._threads = [
            threading.Thread(target=target, name=f"inspector-{target.__name__}") for target in (self._keep_alive, self._pass_on)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait or are under way."""
        return len(self._waiting) + len(self._sent)

    @property
    def ready(self) -> bool:
        """Whether there is a worker process."""
        return self._connection is not None

    @property
    def pid(self) -> int | None:
        """Of the worker process."""
        return None if self._process is None else int(self._process.pid)

    def check_room(self) -> None:
        """Refuse early what `submit` would refuse now.

        Raises:
            BusyError: The queue is full.
        """
        if self.depth >= self.capacity:
            raise BusyError(f"{self.capacity} images wait or are under way; send it again a little later")

    def submit(self, request: Asked, seconds: float) -> Future[Any]:
        """Queue a request; cancelling the future gives its place free unless it is under way.

        Args:
            request: For the worker.
            seconds: In which it must be done, or its future fails with a `DeadlineError`.

        Raises:
            BusyError: The queue is full, or the service is closing.
        """
        ticket = Ticket(request, time.monotonic() + seconds)
        with self._changed:
            self._drop_dead()
            if self._closed:
                raise BusyError("the service is closing")
            self.check_room()
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket.future

    def close(self) -> None:
        """Finish what is under way, refuse what waits, and end the worker."""
        with self._changed:
            self._closed = True
            for ticket in self._waiting:
                ticket.resolve(error=BusyError("the service is closing"))
            self._waiting.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._sent, timeout=30)
            process = self._process
        if process is not None:
            process.terminate()
        for thread in self._threads:
            thread.join()

    def _drop_dead(self) -> None:
        """Forget waiting requests that nobody waits for or that are too late; the lock is held."""
        present = time.monotonic()
        for ticket in [each for each in self._waiting if each.future.cancelled() or each.deadline <= present]:
            self._waiting.remove(ticket)
            ticket.resolve(error=DeadlineError("not done within its deadline, because many others were before it; send it again later"))

    def _kill_hung(self) -> None:
        """End a worker that does not finish; the lock is held."""
        limit = time.monotonic() - HUNG_SECONDS
        if self._process is not None and any(ticket.deadline < limit for ticket in self._sent.values()):
            self._process.kill()

    def _pass_on(self) -> None:
        """Thread: send what waits while the worker has room, one more than it can begin at once."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_send(), timeout=0.25)
                if self._closed:
                    return
                self._drop_dead()
                self._kill_hung()
                if not self._may_send():
                    continue
                ticket, number = self._waiting.popleft(), next(self._numbers)
                if ticket.attempts == 0 and not ticket.future.set_running_or_notify_cancel():
                    continue
                ticket.attempts += 1
                self._sent[number] = ticket
                connection = self._connection
            with self._sending, suppress(OSError, ValueError):  # where it has died, `_lost` takes care of what is under way
                assert connection is not None
                connection.send((number, ticket.request))

    def _may_send(self) -> bool:
        return bool(self._waiting) and self._connection is not None and len(self._sent) <= self.threads

    def _keep_alive(self) -> None:
        """Thread: start the worker, hand on its answers, and start it again when it is gone."""
        failures = 0
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)])
                if self._closed:
                    return
            connection = self._start()
            began = self._receive(connection)
            self._lost(connection)
            failures = 0 if began else failures + 1

    def _start(self) -> Connection:
        context = process_context()
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs, self.threads, self._loaded), daemon=True, name="gladad-worker")
        process.start()
        theirs.close()
        with self._changed:
            self._process = process
            if self._closed:
                process.terminate()
        return ours

    def _receive(self, connection: Connection) -> bool:
        """Hand on answers until the worker is gone. It is asked nothing before it says that it is ready; returns whether it was."""
        ready = False
        with suppress(EOFError, OSError):
            ready = connection.recv() == READY
            with self._changed:
                self._connection = connection
                self._changed.notify_all()
            while True:
                number, value, error = connection.recv()
                with self._changed:
                    ticket = self._sent.pop(number, None)
                    self._changed.notify_all()
                if ticket is not None:
                    ticket.resolve(value, error)
        return ready

    def _lost(self, connection: Connection) -> None:
        """Put what the dead worker was asked back to the front of the queue, or give it up if it may be what it died of."""
        with self._changed:
            self._connection = None
        with self._sending:  # its number may be given to another file as soon as it is closed
            connection.close()
        self._process.join()
        with self._changed:
            self.restarts += not self._closed
            lost = [self._sent[number] for number in sorted(self._sent, reverse=True)]
            self._sent.clear()
            for ticket in lost:
                if self._closed or ticket.attempts >= ATTEMPTS:
                    ticket.resolve(error=WorkerError("the inspection process ended while it inspected this image"))
                else:
                    self._waiting.appendleft(ticket)
            self._changed.notify_all()
