"""Threads: several images at once, one thread for each, and work that can be stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from gladad.core.errors import Interrupted

if TYPE_CHECKING:
    from gladad.core.records import Progress

Item = TypeVar("Item")
T = TypeVar("T")
_setting_threads = threading.Lock()
_alone = threading.Lock()  # held by the call of `side_by_side` that uses the helper
_thread = threading.local()


class CancelToken:
    """Asks work that runs on another thread to stop at its next safe place. It may be cancelled from anywhere, and stays so."""

    def __init__(self) -> None:
        self.signal = 0  # number of the signal that cancelled it; 0 if it was none
        self.cancelled = False  # no `threading.Event`: a signal handler may interrupt this thread where it holds the event's lock

    def cancel(self, signal: int = 0) -> None:
        """Ask to stop; returns at once."""
        self.signal = signal or self.signal
        self.cancelled = True

    def check(self) -> None:
        """Called by the work where it may stop.

        Raises:
            Interrupted: The token is cancelled.
        """
        if self.cancelled:
            raise Interrupted("stopped, because it was cancelled", self.signal)


def cancellable(progress: Progress, cancel: CancelToken | None) -> Progress:
    """The same progress, which stops the work that reports to it once the token is cancelled."""
    if cancel is None:
        return progress

    def told(stage: str, done: int, total: int) -> None:
        cancel.check()
        progress(stage, done, total)

    return told


def in_order(
    function: Callable[[Item], T], items: Iterable[Item], workers: int, cancel: CancelToken | None = None
) -> Generator[T, None, None]:
    """Apply a function to every item on several threads; yields the results in the order of the items.

    Items are taken as there is room: at most twice as many as workers are under way or waiting, so memory does not grow with their number.
    The first is finished before the others start: what the function makes once and keeps is made once.

    Args:
        function: May run on any thread. Its exceptions are raised here, at the item's turn.
        items: Any number.
        workers: Threads, at least 1. With one, the calling thread does everything.
        cancel: Looked at between items.

    Raises:
        Interrupted: The token is cancelled; no further item is started.
    """
    token = cancel or CancelToken()
    remaining = iter(items)
    for item in remaining:
        token.check()
        yield function(item)
        if workers > 1:
            break
    with ThreadPoolExecutor(workers, initializer=setattr, initargs=(_thread, "one_of_several", workers > 1)) as executor:
        waiting: deque[Future[T]] = deque()
        try:
            for item in remaining:
                token.check()
                waiting.append(executor.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                token.check()
                yield waiting.popleft().result()
        finally:  # stopped early, or an error: do not start what is left
            for future in waiting:
                future.cancel()


def side_by_side(function: Callable[[Item], T], items: Sequence[Item], cores: int) -> list[T]:
    """Apply a function to every item, to the first on the calling thread and, with two cores, to the rest on a helper; results in order.

    Where several calls may run at the same time, in `in_order` or because others have not ended, the calling thread does everything.

    Args:
        function: May run on any thread, with its tensor operations on that alone. Its exceptions are raised here.
        items: At least one; the first is about as much work as all the rest.
        cores: That there are for all calls.
    """
    if cores < 2 or getattr(_thread, "one_of_several", False) or not _alone.acquire(blocking=False):
        return [function(item) for item in items]
    helped: list[Future[T]] = []
    try:
        helped += [_helper(os.getpid()).submit(function, item) for item in items[1:]]
        return [function(items[0]), *(each.result() for each in helped)]
    finally:
        for each in helped:  # after an error: do not start what is left
            each.cancel()
        _alone.release()


@lru_cache(maxsize=1)
def _helper(process: int) -> ThreadPoolExecutor:
    """One thread for `side_by_side`, kept, as to start one takes longer than some work; a forked process does not have its parent's."""
    # where there is no torch, nothing is to be set
    return ThreadPoolExecutor(1, "gladad-helper", lambda: _set_own_threads(1) if "torch" in sys.modules else None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's tensor operations on the calling thread alone. Other threads, and those that start later, keep their number."""
    import torch  # late: the command line imports this module to show its help

    before = torch.get_num_threads()
    if before != 1:
        _set_own_threads(1)
    try:
        yield
    finally:
        if before != 1:
            _set_own_threads(before)


def _set_own_threads(count: int) -> None:
    """`torch.set_num_threads` for this thread only: by itself it also sets what later threads start with."""
    import torch

    with _setting_threads, ThreadPoolExecutor(1) as fresh:
        torch.get_num_threads()  # a thread takes over the default at its first call, and must have done so
        default = fresh.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        fresh.submit(torch.set_num_threads, default).result()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, where this may be set, so that a block ended from outside still removes what it has begun."""
    before = _replaceable(signal.SIGTERM)
    try:
        _handle(dict.fromkeys(before, signal.default_int_handler))
        yield
    finally:
        _handle(before)


@contextmanager
def cancelled_by_signals(token: CancelToken) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C cancel a token, where this may be set; a second one does what it always does."""
    before = _replaceable(signal.SIGTERM, signal.SIGINT)

    def cancel(number: int, frame: object) -> None:
        _handle(before)
        token.cancel(number)

    try:
        _handle(dict.fromkeys(before, cancel))
        yield
    finally:
        _handle(before)


def _replaceable(*numbers: int) -> dict[int, Any]:
    """The present handlers of those signals that may get another: not off the main thread, nor if ignored (nohup), nor if not Python's."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    present = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in present.items() if handler not in (signal.SIG_IGN, None)}


def _handle(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
