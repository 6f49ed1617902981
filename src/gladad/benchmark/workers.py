"""Jobs in processes of their own, which end when they are done, when they are stopped, and when the program that started them dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from gladad.core.errors import GladError
from gladad.detector.process import end_with_parent, process_context

T = TypeVar("T")
KILLED = "its process was killed; most often memory ran out"


class Starter(Protocol):
    """Runs jobs somewhere: `Workers` on this machine, `gladad.cluster.tasks.RayTasks` on several."""

    cores: int  # that the jobs share
    limit: int  # that one may have at most
    stopped: bool  # nothing more is started

    def run(self, job: Callable[..., None], *arguments: Any, threads: int) -> str:
        """See `Workers.run`."""

    def stop(self) -> None:
        """Kill what runs and start nothing more."""


def threads_of(workers: Starter, jobs: int) -> int:
    """Threads of each of so many jobs at a time, which share the cores evenly."""
    return max(1, min(workers.limit, workers.cores // jobs))


def in_parallel(work: Callable[[T], None], items: Iterable[T], jobs: int, workers: Starter) -> None:
    """Call a function, which starts jobs by the workers, with every item, so many at a time; what interrupts that stops the workers."""
    with ThreadPoolExecutor(jobs) as executor:
        try:
            for future in as_completed([executor.submit(work, item) for item in items]):
                future.result()
        except BaseException:
            workers.stop()
            executor.shutdown(wait=True, cancel_futures=True)
            raise


class Workers:
    """Starts jobs in processes of their own, and can stop all of them."""

    def __init__(self) -> None:
        import torch

        self.cores = self.limit = torch.get_num_threads()
        self._context = process_context()
        self._lock = threading.Lock()
        self._running: set[Any] = set()
        self.stopped = False

    def run(self, job: Callable[..., None], *arguments: Any, threads: int) -> str:
        """Call a module's function, whose arguments are pickled, with so many threads of PyTorch, and wait for its end.

        May be called from several threads at a time, but not from the main one.

        Returns:
            What went wrong, in a sentence; empty if nothing did.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(sender, threads, job, *arguments))
        with self._lock:
            if self.stopped:
                return KILLED
            with _without_ctrl_c():
                process.start()
            self._running.add(process)
        sender.close()
        try:
            problem = str(receiver.recv())
        except EOFError:
            problem = KILLED
        process.join()
        receiver.close()
        with self._lock:
            self._running.discard(process)
        return problem

    def stop(self) -> None:
        """Kill what runs and start nothing more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.kill()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Block SIGINT, which a process started meanwhile inherits: Ctrl-C is for this program, which stops its children."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which unblocks SIGINT when it starts, with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(sender: Connection, threads: int, job: Callable[..., None], *arguments: Any) -> None:
    end_with_parent()
    sender.send(attempt(threads, job, *arguments))


def attempt(threads: int, job: Callable[..., None], *arguments: Any) -> str:
    """Do a job in this process, with so many threads of PyTorch; returns what went wrong, in a sentence, as `Workers.run` does."""
    os.environ["TQDM_DISABLE"] = "1"  # several bars at a time can be read by nobody
    import torch

    # Two OpenMP programs that both take all cores wait for each other most of the time.
    torch.set_num_threads(threads)
    try:
        job(*arguments)
    except GladError as error:
        return str(error)
    except Exception as error:  # as a sentence: not every exception survives the way between processes
        return f"{type(error).__name__}: {error}"
    return ""
