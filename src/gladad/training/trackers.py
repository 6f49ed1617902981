"""Where a training's numbers and pictures go: TensorBoard or another of accelerate's trackers, and picture files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.errors import ConfigError, MissingExtraError
from gladad.core.storage import atomic_file
from gladad.training.checkpoints import EXAMPLES, LOGS

TENSORBOARD = "tensorboard"


def tracker_name(name: str) -> str | None:
    """Which of accelerate's trackers a training uses; refuses one that cannot be used, before anything is loaded.

    ``auto`` is TensorBoard where it is installed, and ``none`` is none.

    Raises:
        ConfigError: There is none of this name.
        MissingExtraError: Its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    if name in {"auto", "none"}:
        return TENSORBOARD if name == "auto" and TENSORBOARD in available else None
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"unknown tracker {name!r}; use auto, none, or one of {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
    if name not in available:
        raise MissingExtraError(f"the tracker {name}", name.replace("_", "-"))
    return name


class Tracker:
    """Takes numbers and pictures of a training, named ``run`` in the logs, until it is closed.

    Without a name of `tracker_name` it keeps picture files only, and without a folder nothing. ``first_step`` steps are done already;
    TensorBoard forgets what it knows of later ones.
    """

    def __init__(self, name: str | None, folder: Path | None, run: str, *, first_step: int = 0):
        self._folder, self.run = folder, run
        self._inner: Any = None
        if name is None or folder is None:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": folder / LOGS} if kind.requires_logging_directory else {}
        more = {"purge_step": first_step + 1} if name == TENSORBOARD and first_step else {}
        self._inner = kind(run.replace(" ", "-"), **place, **more)
        self._inner.start()

    def close(self) -> None:
        """Finish the logs."""
        if self._inner is not None:
            self._inner.finish()

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""
        if self._inner is not None:
            self._inner.log(values, step=step)

    def show(self, pictures: dict[str, NDArray[np.uint8]], step: int) -> None:
        """Take pictures ``[H, W, 3]``; each is written as a file, too, whatever the tracker."""
        if self._folder is None or not pictures:
            return
        for name, pixels in pictures.items():
            with atomic_file(self._folder / EXAMPLES / f"{name}-{step:07d}.png") as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
        if hasattr(self._inner, "log_images"):
            form = {"dataformats": "NHWC"} if self._inner.name == TENSORBOARD else {}
            self._inner.log_images({name: pixels[None] for name, pixels in pictures.items()}, step=step, **form)
