"""Ray as the commands need it: started here or connected to, silent, and its errors as ours."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gladad.core.errors import ConfigError, GladError, MissingExtraError

OBJECT_STORE = 128 * 2**20  # bytes of shared memory of a Ray that is started here: only numbers of blocks and sentences go through it


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """The module ``ray``, connected for the block; what is started here ends with it.

    Args:
        address: Of a cluster, such as ``auto`` or ``ray-head:6379``. Without one Ray is started on this machine, with the cores that this
            process may use, and no dashboard. A connection that the program has already is taken as it is.

    Raises:
        MissingExtraError: Ray is not installed.
        GladError: There is no cluster at the address, or Ray's own processes fail.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of later versions, which this one warns of
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the rest is in Ray's own log files
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError("this command", "'gladad[ray]'") from error
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)  # what goes wrong is raised, and is in Ray's log files
    own = not ray.is_initialized()
    if own:
        here: dict[str, Any] = {"num_cpus": _cores(), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
        try:
            with _silent():
                ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **({} if address else here))
        except Exception as error:  # Ray raises bare ones, too
            raise GladError(f"Ray at {address or 'this machine'}: {error}") from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, GladError) else GladError(f"Ray: {error}") from error
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what compiled code writes off standard error; what goes wrong comes as exceptions."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def places(ray: Any, cpus: int, gpus: float) -> int:
    """How many actors of so many CPUs and GPUs have room on the nodes that are there, each on one of them.

    Raises:
        ConfigError: Not one has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else float("inf"))) for node in nodes)
    if count < 1:
        there = ", ".join(f"{node.get('CPU', 0):.0f} CPUs and {node.get('GPU', 0):.0f} GPUs" for node in nodes)
        raise ConfigError(f"no node has {cpus} CPUs and {gpus:g} GPUs for one actor; there are nodes with {there}")
    return count


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
