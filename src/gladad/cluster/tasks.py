"""Jobs in processes of their own on the machines of a cluster: what `gladad.benchmark.workers.Workers` is on one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gladad.benchmark.workers import KILLED, attempt

RETRIES = 2  # of a job whose process or node dies; jobs find what is finished on the disk


class RayTasks:
    """Starts jobs as tasks of Ray, and can stop all of them.

    Attributes:
        cores: CPUs of the whole cluster.
        limit: CPUs of its largest node, more than which no job can have.
        stopped: Nothing more is started.
    """

    def __init__(self, ray: Any):
        self._ray, self._lock = ray, threading.Lock()
        self._running: set[Any] = set()
        sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.cores, self.limit, self.stopped = sum(sizes), max(sizes), False

    def run(self, job: Callable[..., None], *arguments: Any, threads: int) -> str:
        """As `gladad.benchmark.workers.Workers.run`."""
        # A process for every job: its peak memory is its own.
        task = self._ray.remote(num_cpus=threads, max_calls=1, max_retries=RETRIES)(attempt)
        with self._lock:
            if self.stopped:
                return KILLED
            reference = task.remote(threads, job, *arguments)
            self._running.add(reference)
        try:
            return str(self._ray.get(reference))
        except self._ray.exceptions.RayError:
            return KILLED
        finally:
            with self._lock:
                self._running.discard(reference)

    def stop(self) -> None:
        """Kill what runs and start nothing more."""
        with self._lock:
            self.stopped = True
            for reference in self._running:
                self._ray.cancel(reference, force=True)
