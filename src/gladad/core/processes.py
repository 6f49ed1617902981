"""Several processes of one machine that share the images of a run, started by ``torchrun`` or ``accelerate launch``.

Each takes every n-th image, and what they find is put back into the order of the images: results do not depend on their number. Only
records and errors go between them, large things lie in files.
"""

from __future__ import annotations

import atexit
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

from gladad.core.errors import ConfigError, GladError
from gladad.core.threads import in_order, interrupted_by_sigterm

T = TypeVar("T")


class Processes:
    """The processes that share a run, as one of them (``rank``, from 0, of ``count``) sees it. Without arguments: this one alone.

    All of them call the same methods in the same order. `main` is the one that prints, writes tables and shows progress. When one fails,
    the others raise its error where they next wait for it.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count, self.main = rank, count, rank == 0
        self._parted = count == 1

    def share(self, function: Callable[[int], T], total: int, workers: int) -> Generator[tuple[int, T], None, None]:
        """Apply a function to the numbers ``rank``, ``rank + count``, ... below ``total``, on several threads (`in_order`).

        When it is closed (`contextlib.closing`), no thread is at work any more.

        Yields:
            Each number with its result, rising.
        """
        numbers = range(self.rank, total, self.count)
        with closing(in_order(function, numbers, workers)) as results:
            yield from zip(numbers, results, strict=True)

    def merge(self, own: Sequence[T]) -> list[T]:
        """The results of all shares in the order of the numbers, from one result for each number of the own share; all get them."""
        parts = self._exchange(own)
        return [parts[number % self.count][number // self.count] for number in range(sum(map(len, parts)))]

    def on_main(self, function: Callable[[], T]) -> T:
        """What the function returns in the main process; it is called there only, and all get the value."""
        return cast(T, self._exchange(function() if self.main else None)[0])

    @contextmanager
    def one(self, block: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Make and enter a block in the main process only, such as a temporary folder. All get its value, and are done before it ends."""
        with ExitStack() as stack:
            value = self.on_main(lambda: stack.enter_context(block()))
            with self._together():
                yield value

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A block that no process leaves before the others have come to its end; if one fails in it, all do."""
        try:
            yield
            self._exchange(None)
        except BaseException as error:
            if not self._parted:
                told = GladError(str(error) if isinstance(error, GladError) else f"process {self.rank}: {type(error).__name__}: {error}")
                told.add_note("".join(traceback.format_exception(error)))
                with suppress(BaseException):  # that one, or another's
                    self._exchange(None, told)
            raise

    def _exchange(self, value: T, error: GladError | None = None) -> list[T]:
        """The values of all processes in the order of their ranks; raises the first error among theirs."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object  # late: it takes a second, and a process alone needs none of it

        self._parted = True  # an exchange that was broken off cannot be followed by another
        try:
            records: list[tuple[T, GladError | None]] = gather_object([(value, error)])
        except RuntimeError as gone:
            raise GladError(f"one of the {self.count} processes has ended without a word, perhaps for want of memory") from gone
        for _, found in records:
            if found is not None:
                raise found
        self._parted = False
        return [found for found, _ in records]


@contextmanager
def started() -> Iterator[Processes]:
    """The processes that ``torchrun`` or ``accelerate launch`` has started with this one; elsewhere this process alone.

    None leaves the block before all are done. The main process raises the error of any; the others end silently.

    Raises:
        ConfigError: The environment is not that of processes on one machine.
    """
    if (count := process_count()) == 1:
        yield Processes()
        return
    if "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE is {count}, but RANK is not set; start the processes with torchrun")
    if (here := os.environ.get("LOCAL_WORLD_SIZE", str(count))) != str(count):
        raise ConfigError(f"only {here} of the {count} processes are on this machine; run them all on one")
    from accelerate import PartialState

    # One that has ended is noticed at once, so the limit on waiting for one that works need not be short.
    state = PartialState(cpu=True, backend="gloo", timeout=timedelta(days=7))
    end_group_at_exit()
    processes = Processes(state.process_index, count)
    try:
        with interrupted_by_sigterm(), processes._together():
            yield processes
    except BaseException:
        if processes.main:
            raise
        raise SystemExit(0) from None  # at another status torchrun would end the main process before it has told of the error


@cache
def end_group_at_exit() -> None:
    """Leave the group of processes while its threads still have an interpreter: gloo aborts otherwise, now and then.

    The threads outlive the group where DistributedDataParallel was used (torch 2.13 leaks references to it), and a result is there a
    moment before the thread that made it lets go of its tensors: it is given that moment.
    """
    from accelerate import PartialState

    state = PartialState()

    def leave() -> None:
        state.destroy_process_group()
        time.sleep(0.3)

    atexit.register(leave)


def process_count() -> int:
    """Number of processes that were started together with this one, itself included.

    Raises:
        ConfigError: The environment does not say a number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE is {text!r}, not a number of processes; start them with torchrun")
    return int(text)
