"""Where a training's numbers and pictures go: TensorBoard or another of accelerate's trackers, and picture files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from numpy.typing import NDArray
from PIL import Image

from gladad.core.errors import ConfigError, MissingExtraError
from gladad.core.storage import atomic_file
from gladad.training.checkpoints import EXAMPLES, LOGS

AUTO, NONE = "auto", "none"


class Tracker:
    """Takes numbers and pictures of a training; to be used in a ``with`` block.

    Args:
        inner: One of accelerate's trackers, or None.
        folder: For picture files, or None.
    """

    def __init__(self, inner: GeneralTracker | None = None, folder: Path | None = None):
        self.inner, self.folder = inner, folder

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.inner is not None:
            self.inner.finish()

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""
        if self.inner is not None:
            self.inner.log(values, step=step)

    def show(self, pictures: dict[str, NDArray[np.uint8]], step: int) -> None:
        """Take pictures ``[H, W, 3]``; each is written as a file, too, whatever the tracker."""
        if self.folder is None or not pictures:
            return
        for name, pixels in pictures.items():
            with atomic_file(self.folder / EXAMPLES / f"{name}-{step:07d}.png") as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
        log_images: Any = getattr(self.inner, "log_images", None)
        if log_images is not None:
            form = {"dataformats": "NHWC"} if self.inner is not None and self.inner.name == "tensorboard" else {}
            log_images({name: pixels[None] for name, pixels in pictures.items()}, step=step, **form)


def check_tracker(name: str) -> None:
    """Refuse a tracker that cannot be used, before anything is loaded.

    Raises:
        ConfigError: There is none of this name.
        MissingExtraError: Its package is not installed.
    """
    if name in {AUTO, NONE}:
        return
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    if name not in known:
        raise ConfigError(f"unknown tracker {name!r}; use auto, none, or one of {', '.join(known)}")
    if name not in {str(getattr(available, "value", available)) for available in get_available_trackers()}:
        raise MissingExtraError(f"the tracker {name}", name.replace("_", "-"))


def start_tracker(name: str, folder: Path | None, run: str, *, first_step: int = 0) -> Tracker:
    """A tracker of one training.

    Args:
        name: ``auto`` is TensorBoard where it is installed; ``none``; or the name of one of accelerate's.
        folder: For logs and pictures; None starts nothing.
        run: Name of the training in the logs.
        first_step: Steps done already; TensorBoard forgets what it knows of later ones.

    Raises:
        ConfigError: There is none of this name.
        MissingExtraError: Its package is not installed.
    """
    check_tracker(name)
    if folder is None:
        return Tracker()
    if name == AUTO:
        available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
        name = "tensorboard" if "tensorboard" in available else NONE
    if name == NONE:
        return Tracker(folder=folder)
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": folder / LOGS} if kind.requires_logging_directory else {}
    more = {"purge_step": first_step + 1} if name == "tensorboard" and first_step else {}
    inner = kind(run.replace(" ", "-"), **place, **more)
    if hasattr(inner, "start"):
        inner.start()
    return Tracker(inner, folder)
