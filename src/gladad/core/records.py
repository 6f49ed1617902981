"""The records that pass through the whole program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import NotFiniteError

Progress = Callable[[str, int, int], None]  # called as ``progress(stage, done, total)``; the shell shows it as a bar


def prefixed(progress: Progress, prefix: str) -> Progress:
    """The same progress, with a word before each stage."""
    return lambda stage, done, total: progress(prefix + stage, done, total)


def no_progress(stage: str, done: int, total: int) -> None:
    """The progress function of callers that want none."""


@runtime_checkable
class Watch(Protocol):
    """Looks on while a model is trained; the result does not depend on it."""

    def loss(self, stage: str, step: int, value: float) -> None:
        """The loss of a step, counted from 1."""

    def show(self, stage: str, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Pictures ``[H, W, 3]`` of what has been learnt so far, by name."""


def _require_finite(**quantities: float | NDArray[np.floating]) -> None:
    """Comparing with NaN is always false, so that it would be accepted as normal."""
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            raise NotFiniteError(f"{name} is NaN or infinite; the model is damaged, or its precision is too low for this image")


@dataclass(frozen=True)
class Sample:
    """One image of a data set."""

    image_path: Path
    mask_path: Path | None = None  # its ground-truth mask, if there is one; a folder stands for the union of the masks in it
    gt_label: int = 0  # 0 normal, 1 anomalous
    category: str = ""  # name of the product
    defect_type: str = "good"  # name of the folder the image came from ("good" for normal ones)
    split: str = "test"  # "train", "validation" or "test"
    line: int = 0  # of the manifest it is from, counted from 1; 0 for folders


@dataclass(frozen=True)
class Inspection:
    """What a base says about one image, in its own units; `gladad.detector.glad` turns it into a `Prediction`.

    Raises:
        NotFiniteError: The map or the score is not finite.
    """

    map: NDArray[np.float32]  # [h, w] raw anomaly map at the base's own size
    score: float  # raw image score, higher is more anomalous
    step: int  # diffusion timestep chosen for this image
    latent: Any  # the rebuilt latent (a tensor [1, C, h', w']), for `picture`

    def __post_init__(self) -> None:
        _require_finite(map=self.map, score=self.score)


@dataclass(frozen=True)
class Region:
    """One connected area of the predicted mask, in pixels of the inspected image."""

    box: tuple[int, int, int, int]  # (left, top, right, bottom), right and bottom exclusive
    area: int  # pixels
    peak: float  # largest value of the anomaly map inside


@dataclass(frozen=True)
class Prediction:
    """What inspection says about one image.

    Raises:
        NotFiniteError: The score, the p-value or the map is not finite.
    """

    pred_score: float  # on an absolute scale: in units of the decision threshold, so that above 1 means reject
    p_value: float  # share of held-out normal images that score at least as high, (k + 1) / (n + 1): small means anomalous
    pred_label: bool  # rejected
    step: int  # diffusion timestep the image was given by the adaptive search
    anomaly_map: NDArray[np.float32]  # [H, W] at the size of the inspected image; above 1 means anomalous
    pred_mask: NDArray[np.bool_]  # [H, W]: the map at the pixel threshold
    regions: tuple[Region, ...]  # connected areas of the mask, largest peak first
    image_size: tuple[int, int]  # (H, W) of the inspected image
    reconstruction: NDArray[np.uint8] | None = None  # [H, W, 3], the anomaly-free counterpart, for people; None if not asked for
    image_path: Path | None = None  # the file, if the image came from one
    seconds: float = 0.0  # time taken by the inspection of this image
    model_id: str = ""  # what the model is called; empty if nobody said, like the two that follow
    model_version: str = ""  # its version
    calibration_id: str = ""  # which calibration its thresholds are from

    def __post_init__(self) -> None:
        _require_finite(pred_score=self.pred_score, p_value=self.p_value, anomaly_map=self.anomaly_map)

    def to_record(self) -> dict[str, Any]:
        """The JSON-ready part: everything but the arrays. ``pred_label`` is 0 or 1."""
        return {
            "image_path": None if self.image_path is None else str(self.image_path),
            "pred_score": self.pred_score,
            "p_value": self.p_value,
            "pred_label": int(self.pred_label),
            "step": self.step,
            "width": self.image_size[1],
            "height": self.image_size[0],
            "regions": [asdict(region) for region in self.regions],
            "seconds": self.seconds,
            "model_id": self.model_id,
            "model_version": self.model_version,
            "calibration_id": self.calibration_id,
        }


@dataclass(frozen=True)
class Report:
    """The result of an evaluation."""

    metrics: dict[str, float]  # name -> value; pixel metrics are absent where there are no masks
    counts: dict[str, int]  # of normal and anomalous images, of masks, of those that are missing or vanish, and of images skipped
    rows: list[dict[str, Any]] = field(repr=False)  # one JSON-ready record per image
    details: dict[str, Any] = field(default_factory=dict)  # data set, model and settings
