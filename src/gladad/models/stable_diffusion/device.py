"""The device that a process works on, and the memory that is left there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from gladad.core.inference import fast_dtype
from gladad.training.loop import DTYPES, Precision

CGROUP_FILES = [("memory.max", "memory.current", "inactive_file")]  # version 2
CGROUP_FILES += [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]  # version 1


def choose_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def inference_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """In which networks inspect: that of the precision, but float32 on processors that would only emulate bfloat16."""
    dtype = DTYPES[precision]
    return fast_dtype(device) if device.type == "cpu" and dtype is torch.bfloat16 else dtype


def bytes_text(size: int) -> str:
    """Bytes as people read them."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power // 10:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def available_memory(
    device: torch.device | str, *, cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that this process may still use: free ones of a GPU, or of the system and of all control groups (containers) it is in.

    The folders are where Linux shows control groups, of version 1 or 2, and the file where it says which of them this process is in.
    """
    device = torch.device(device)
    if device.type == "cuda":  # what torch holds back is for its own next use
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free: list[int] = [psutil.virtual_memory().available]
    for line in membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        place = (cgroups / "memory" if "memory" in controllers.split(",") else cgroups) / path.lstrip("/")
        for group in (place, *place.parents):  # a path with ".." is one that is seen from inside of a container
            for limit, used, cache in CGROUP_FILES:
                with suppress(OSError, ValueError):  # no such file, or "max"
                    statistics = dict(row.split() for row in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
                    left = int((group / limit).read_text()) - int((group / used).read_text()) + int(statistics.get(cache, 0))
                    free.append(max(0, left))
    return min(free)
