"""Several processes of one machine that share the images of a run, started by ``torchrun`` or ``accelerate launch``.

Each process takes every n-th image. What they find is put back into the order of the images, so results do not depend on their number.
They talk over gloo: only records and errors go that way, large things lie in files. An error of one process is the error of all.
"""

from __future__ import annotations

import itertools
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from gladad.core.errors import ConfigError, GladError
from gladad.core.threads import in_order, interrupted_by_sigterm

T = TypeVar("T")

START_LIMIT = timedelta(minutes=10)
"""How long processes wait for each other at the start; later ones may be slow to import."""

WORK_LIMIT = timedelta(days=7)
"""How long they wait for each other's work. One that has ended is noticed at once, so this need not be short."""

FAILED = "failed"
_starts = itertools.count()


class ProcessError(GladError):
    """Another process is gone without a word, such as one that the system has killed."""


class Link(Protocol):
    """What joins the processes."""

    def exchange(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks; waits for them. A value must survive pickling.

        Raises:
            ProcessError: One of them has ended.
        """
        ...

    def alarm(self) -> None:
        """Let the others know that they need not go on."""
        ...

    def alarmed(self) -> bool:
        """Whether a process has raised the alarm; does not wait for anyone."""
        ...


class Processes:
    """The processes that share a run, as one of them sees it. Without arguments: this one alone.

    All of them call the same methods in the same order.

    Attributes:
        rank: Which one this is, from 0.
        count: How many there are.
        local_rank: The GPU to use, if there are any.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, link: Link | None = None):
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self._link = link
        self._over = False

    @property
    def main(self) -> bool:
        """Whether this is the one that prints, writes tables and shows progress."""
        return self.rank == 0

    # -- sharing ------------------------------------------------------------------------------------------------

    def share(self, function: Callable[[int], T], total: int, workers: int) -> Iterator[tuple[int, T]]:
        """Apply a function to the numbers of this process's share: ``rank``, ``rank + count``, ... below ``total``.

        Args:
            function: As in `gladad.core.threads.in_order`.
            total: Number of items of all processes; a share may be empty.
            workers: Threads of this process.

        Yields:
            Each number with its result, rising.

        Raises:
            BaseException: That of another process which has failed meanwhile.
        """
        numbers = range(self.rank, total, self.count)
        for number, result in zip(numbers, in_order(function, numbers, workers), strict=True):
            if self._link is not None and self._link.alarmed():
                self.gather(None)
            yield number, result

    def merge(self, own: Sequence[T]) -> list[T]:
        """The results of all shares in the order of the numbers, from one result for each number of the own share; all get them."""
        parts = self.gather(own)
        return [parts[number % self.count][number // self.count] for number in range(sum(map(len, parts)))]

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks; waits for them.

        Raises:
            BaseException: That of another process which has failed, or `ProcessError` if it was killed.
        """
        return [value] if self._link is None else self._exchange(self._link, value, None)

    def on_main(self, function: Callable[[], T]) -> T:
        """What the function returns in the main process; it is called there only, and all get the value."""
        return cast(T, self.gather(function() if self.main else None)[0])

    @contextmanager
    def one(self, block: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Make and enter a block in the main process only, such as a temporary folder. All get its value, and are done before it ends."""
        with ExitStack() as stack:
            value = self.on_main(lambda: stack.enter_context(block()))
            with self.together():
                yield value

    # -- failing ------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that no process leaves before the others have come to its end; if one fails in it, all do."""
        try:
            yield
            self.gather(None)
        except BaseException as error:
            self._fail(error)
            raise

    def outlast_main(self) -> None:
        """Wait until the main process has closed its link: torchrun ends it when another is gone, and it is to tell of the error."""
        if self._link is not None and not self.main:
            with suppress(BaseException):
                self._link.exchange(None)

    def _fail(self, error: BaseException) -> None:
        """Tell the others of an error, and wait until they have stopped."""
        if self._link is not None and not self._over:
            with suppress(BaseException):  # the answer is that error, or one of theirs
                self._link.alarm()
                self._exchange(self._link, None, _portable(error, self.rank))

    def _exchange(self, link: Link, value: T, error: BaseException | None) -> list[T]:
        self._over = True  # an exchange that was broken off cannot be followed by another
        outcomes = link.exchange((value, error))
        for _, found in outcomes:
            if found is not None:
                raise found
        self._over = False
        values: list[T] = [found for found, _ in outcomes]
        values[self.rank] = value
        return values


@contextmanager
def started() -> Iterator[Processes]:
    """The processes that ``torchrun`` or ``accelerate launch`` has started with this one; elsewhere this process alone.

    No process leaves the block before all are done. When one fails, all stop at their next image. The main process raises the error;
    the others are silent, so that it is told once.

    Raises:
        ConfigError: The environment is not that of processes on one machine, or they do not find each other.
        SystemExit: In the other processes, with status 1, or 130 if they were interrupted.
    """
    rank, count, local_rank = _environment()
    if count == 1:
        yield Processes()
        return
    link = _Gloo(rank, count)
    processes = Processes(rank, count, local_rank, link)
    try:
        with interrupted_by_sigterm(), processes.together():
            yield processes
    except BaseException as error:
        if processes.main:
            raise
        if isinstance(error, KeyboardInterrupt):  # perhaps in the middle of an exchange, which another cannot follow
            raise SystemExit(130) from None
        processes.outlast_main()
        raise SystemExit(1) from None
    finally:
        link.close()


class _Gloo:
    """The link over ``torch.distributed``."""

    def __init__(self, rank: int, count: int):
        import torch.distributed

        self._count = count
        self._dist: Any = torch.distributed  # its stubs do not export stores
        try:
            # Of its own for each start: the store keeps what an earlier one has left there.
            self._store = self._dist.PrefixStore(f"gladad-{next(_starts)}", _meeting_point(rank, count))
            self._dist.init_process_group("gloo", store=self._store, rank=rank, world_size=count, timeout=WORK_LIMIT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n", 1)[0]
            raise ConfigError(f"the {count} processes do not find each other ({reason}); start them with torchrun") from error

    def exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._count
        try:
            self._dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise self._gone() from error
        return values

    def alarm(self) -> None:
        self._store.set(FAILED, "1")

    def alarmed(self) -> bool:
        try:
            return bool(self._store.check([FAILED]))
        except RuntimeError as error:  # the process that held the store is gone
            raise self._gone() from error

    def _gone(self) -> ProcessError:
        return ProcessError(f"one of the {self._count} processes has ended without a word, perhaps for want of memory")

    def close(self) -> None:
        self._dist.destroy_process_group()


@cache
def _meeting_point(rank: int, count: int) -> Any:
    """The store of all processes, the main one of which may hold it: kept until the process ends."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", rank, count, timeout=START_LIMIT))[0]


def _environment() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as torchrun sets them."""
    count = process_count()
    if count == 1:
        return 0, 1, 0
    rank = _number("RANK")
    if not 0 <= rank < count:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE {count}; start the processes with torchrun")
    if (here := _number("LOCAL_WORLD_SIZE", count)) != count:
        raise ConfigError(f"only {here} of the {count} processes are on this machine; run them all on one")
    return rank, count, _number("LOCAL_RANK", rank)


def process_count() -> int:
    """Number of processes that were started together with this one, itself included.

    Raises:
        ConfigError: The environment does not say a number.
    """
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{variable} is {text!r}, not a number; start the processes with torchrun") from error


def _portable(error: BaseException, rank: int) -> BaseException:
    """A copy of the error that can be sent, with its traceback as a note."""
    try:
        copy: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:  # some need more than their message
        copy = GladError(str(error)) if isinstance(error, GladError) else RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in process {rank}:\n{''.join(traceback.format_exception(error))}")
    return copy
