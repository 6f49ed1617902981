"""Looks on while a job trains: bounded curves of its losses, and its newest example pictures as files."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import GladError
from gladad.core.storage import atomic_file
from gladad.report.pictures import to_png

EXAMPLES = "examples"
POINTS = 120  # of a curve at most
TELL_SECONDS = 0.5
UNIMPORTANT = (OSError, GladError)
"""What may go wrong with pictures that are only looked at; it is logged, and the job goes on."""
log = logging.getLogger("gladad.service.jobs")


class Tell(Protocol):
    """Says something of a job's progress, as JSON-ready values by name."""

    def __call__(self, **line: Any) -> None:
        """Of values that were said before the last ones count."""


class Curve:
    """Means of so many losses each that there are never more than `POINTS`."""

    def __init__(self) -> None:
        self.width, self._sums, self._count = 1, list[float](), 0

    def add(self, value: float) -> None:
        """The loss of the next step."""
        if self._count == POINTS * self.width:
            self._sums = [one + other for one, other in zip(self._sums[::2], self._sums[1::2], strict=True)]
            self.width *= 2
        if self._count % self.width == 0:
            self._sums.append(0.0)
        self._sums[-1] += value
        self._count += 1

    def points(self) -> list[tuple[int, float]]:
        """The last step of each mean, and the mean to four digits."""
        ends = [min(self._count, self.width * (place + 1)) for place in range(len(self._sums))]
        means = [total / (end - self.width * place) for place, (end, total) in enumerate(zip(ends, self._sums, strict=True))]
        return list(zip(ends, (float(f"{mean:.4g}") for mean in means), strict=True))


class Onlooker:
    """A `gladad.core.records.Watch` that tells of losses now and then, and writes pictures below the job's folder."""

    def __init__(self, folder: Path, tell: Tell):
        self._folder, self._tell = folder / EXAMPLES, tell
        self._curves: dict[str, Curve] = {}
        self._shown: dict[str, dict[str, Any]] = {}
        self._told, self._failed = 0.0, False

    def loss(self, stage: str, step: int, value: float) -> None:
        """The loss of a step, counted from 1."""
        self._curves.setdefault(stage, Curve()).add(value)
        if time.monotonic() - self._told >= TELL_SECONDS:
            self.tell_losses()

    def tell_losses(self) -> None:
        """Of all stages so far."""
        self._told = time.monotonic()
        self._tell(losses={stage: curve.points() for stage, curve in self._curves.items()})

    def show(self, stage: str, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Keep pictures ``[H, W, 3]``; one of the same name is replaced. Where they cannot be written, that is logged once."""
        try:
            for name, pixels in pictures.items():
                with atomic_file(self._folder / f"{name}.png") as temporary:
                    temporary.write_bytes(to_png(pixels))
                self._shown[name] = {"name": name, "stage": stage, "step": step}
        except UNIMPORTANT as error:
            if not self._failed:
                log.warning("examples of the training are not shown: %s", error)
            self._failed = True
        self._tell(examples=list(self._shown.values()))
