"""Several images at once, in order. Inspection runs each image on one thread, so cores are filled with images."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Apply a function to every item on several threads; yields the results in the order of the items.

    At most twice as many items as workers are under way or waiting to be taken, so memory does not grow with their number. The first
    item is finished before the others start: what the function makes once and keeps is made once.

    Args:
        function: May run on any thread. Its exceptions are raised here, at the item's turn.
        items: Taken one by one as there is room.
        workers: Threads, at least 1. With one, the calling thread does everything.
    """
    remaining = iter(items)
    for item in remaining:
        yield function(item)
        if workers > 1:
            break
    with ThreadPoolExecutor(max_workers=workers) as executor:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in remaining:
                waiting.append(executor.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # stopped early, or an error: do not start what is left
            for future in waiting:
                future.cancel()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, where this may be set, so that a block ended from outside still removes what it has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
