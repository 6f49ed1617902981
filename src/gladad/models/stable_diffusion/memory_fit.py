"""Whether a training fits into the memory there is, and what to change if it does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import torch

from gladad.core.errors import ConfigError
from gladad.models.stable_diffusion.memory_plan import MemoryPlan, PlanRequest

Step = tuple[dict[str, str], PlanRequest]
"""What was changed of a request, in words, and what it is then."""

SMALLEST_SIDE, SIDE_STEP = 128, 64  # pixels, of images that are suggested


def check_fits(
    plan: MemoryPlan,
    available_bytes: int,
    request: PlanRequest,
    replan: Callable[[PlanRequest], MemoryPlan],
    device_type: str = "cpu",
) -> None:
    """Refuse a training that does not fit, before anything is loaded.

    Args:
        plan: Of the request.
        available_bytes: What there is, see `available_memory`.
        request: The training.
        replan: Plan of another training with the same base, for the suggestion.
        device_type: Where it is to run.

    Raises:
        ConfigError: It does not fit; the message says what would.
    """
    if plan.total > available_bytes:
        what = f"training needs {bytes_text(plan.total)} of memory, and {bytes_text(available_bytes)} are available"
        raise ConfigError(f"{what}; {suggestions(request, available_bytes, replan, device_type)}")


def suggestions(request: PlanRequest, available_bytes: int, replan: Callable[[PlanRequest], MemoryPlan], device_type: str = "cpu") -> str:
    """What would fit, as a clause: the least change that keeps the kind of training, and, where all weights were to be trained, LoRA.

    Smaller images hide small defects, so they are the last resort.

    Args:
        request: The training that does not fit.
        available_bytes: What there is.
        replan: Plan of another training with the same base; it is called until something fits, at most a dozen times.
        device_type: Where it is to run; "cuda" alone has an optimiser with 8 bits.
    """
    found = alternatives(request, available_bytes, replan, device_type)
    if not found:
        return f"nothing smaller fits either, down to single images of {SMALLEST_SIDE} pixels"
    return "it fits with " + ", or with ".join(f"{words} ({bytes_text(plan.total)})" for words, _, plan in found)


def alternatives(
    request: PlanRequest, available_bytes: int, replan: Callable[[PlanRequest], MemoryPlan], device_type: str = "cpu"
) -> list[tuple[str, PlanRequest, MemoryPlan]]:
    """What `suggestions` says: the changes in words, the changed request, and its plan."""
    planned = cache(replan)

    def first(route: Sequence[Step]) -> list[tuple[str, PlanRequest, MemoryPlan]]:
        if not route or planned(route[-1][1]).total > available_bytes:  # the last of a route needs least
            return []
        words, changed = next(step for step in route if planned(step[1]).total <= available_bytes)
        return [(_enumerate(words.values()), changed, planned(changed))]

    routes = [list(_smaller(({}, request), device_type))]
    if request.training == "full":
        lora: Step = {"training": "LoRA instead of full training"}, replace(request, training="lora")
        routes.append([lora, *_smaller(lora, device_type)])
    found = [fit for route in routes for fit in first(route)]
    return found or first(list(_smaller_images(routes[-1][-1] if routes[-1] else ({}, request))))


def _smaller(step: Step, device_type: str) -> Iterator[Step]:
    """Requests that need less and less, each with the changes of those before it, those that cost least first."""
    words, request = step
    images = request.batch_size * request.accumulation  # per step of the optimiser: stays as it is
    if not request.gradient_checkpointing:
        words, request = words | {"checkpointing": "gradient checkpointing"}, replace(request, gradient_checkpointing=True)
        yield words, request
    for size in (2, 1):
        if request.batch_size > size:
            words = words | {"batch": f"micro_batch {size}"}
            request = replace(request, batch_size=size, accumulation=math.ceil(images / size))
            yield words, request
    if request.training == "lora" and request.precision == "float32":
        words, request = words | {"precision": "precision bfloat16"}, replace(request, precision="bfloat16")
        yield words, request
    if request.training == "full" and request.optimizer == "adamw" and device_type == "cuda":
        words, request = words | {"optimizer": "optimizer adamw8bit"}, replace(request, optimizer="adamw8bit")
        yield words, request


def _smaller_images(step: Step) -> Iterator[Step]:
    """The same request with images of three quarters, half, three eighths and so on of the size."""
    words, request = step
    before = request.image_size
    for halvings, share in itertools.product(range(8), (0.75, 0.5)):
        height, width = (
            max(min(side, SMALLEST_SIDE), int(side * share / 2**halvings) // SIDE_STEP * SIDE_STEP) for side in request.image_size
        )
        if (height, width) != before:
            before = (height, width)
            yield words | {"size": f"images of {height}x{width} pixels"}, replace(request, image_size=before)


def _enumerate(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def bytes_text(size: int) -> str:
    """Bytes as people read them."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power // 10:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def available_memory(
    device: torch.device | str, *, cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that this process may still use on a device.

    Args:
        device: On "cuda", what is free there; on anything else, what the system can give, or what the limit of this process's control
            group, such as a container's, leaves of it.
        cgroups: Where Linux shows control groups, of version 1 or 2.
        membership: Where it says which of them this process is in.
    """
    device = torch.device(device)
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next use
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    left = [_left(folder) for folder in _own_cgroups(cgroups, membership)]
    return min([int(psutil.virtual_memory().available), *(size for size in left if size is not None)])


def _own_cgroups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process; a limit of any of them counts."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        # inside of a container, the path may be one that is seen from outside only; the container's own folder then is the top
        parts = [part for part in path.split("/") if part not in {"", ".."}]
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _left(folder: Path) -> int | None:
    """What a control group's limit leaves, with the cache of files that it can give up; None without a limit."""
    for limit, usage, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            free = int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(statistics.get(files, 0))
            return max(0, free)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
