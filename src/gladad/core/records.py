"""The records that pass through the whole program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import NotFiniteError

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; the shell shows it as a bar."""


def no_progress(stage: str, done: int, total: int) -> None:
    """The progress function of callers that want none."""


def _require_finite(**quantities: float | NDArray[np.floating]) -> None:
    """Comparing with NaN is always false, so that it would be accepted as normal."""
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            raise NotFiniteError(f"{name} is NaN or infinite; the model is damaged, or its precision is too low for this image")


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        image_path: The file.
        mask_path: Its ground-truth mask, if there is one; a folder stands for the union of the masks in it.
        gt_label: 0 normal, 1 anomalous.
        category: Name of the product.
        defect_type: Name of the folder the image came from ("good" for normal ones).
        split: "train", "validation" or "test".
    """

    image_path: Path
    mask_path: Path | None = None
    gt_label: int = 0
    category: str = ""
    defect_type: str = "good"
    split: str = "test"


@dataclass(frozen=True)
class Inspection:
    """What a base says about one image, in its own units; `gladad.detector.glad` turns it into a `Prediction`.

    Attributes:
        map: ``[h, w]`` float32 raw anomaly map at the base's own size.
        score: Raw image score, higher is more anomalous.
        step: Diffusion timestep chosen for this image.
        latent: The rebuilt latent (a tensor ``[1, C, h', w']``), for `picture`.

    Raises:
        NotFiniteError: The map or the score is not finite.
    """

    map: NDArray[np.float32]
    score: float
    step: int
    latent: Any

    def __post_init__(self) -> None:
        _require_finite(map=self.map, score=self.score)


@dataclass(frozen=True)
class Region:
    """One connected area of the predicted mask, in pixels of the inspected image.

    Attributes:
        box: ``(left, top, right, bottom)``, right and bottom exclusive.
        area: Pixels.
        peak: Largest value of the anomaly map inside.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float


@dataclass(frozen=True)
class Prediction:
    """What inspection says about one image.

    Attributes:
        pred_score: Anomaly score on an absolute scale: in units of the decision threshold, so that above 1 means reject.
        p_value: Share of held-out normal images that score at least as high, ``(k + 1) / (n + 1)``: small means anomalous.
        pred_label: Rejected.
        step: The diffusion timestep the image was given by the adaptive search.
        anomaly_map: ``[H, W]`` float32 at the size of the inspected image; above 1 means anomalous.
        pred_mask: ``[H, W]`` bool: the map at the pixel threshold.
        regions: Connected areas of the mask, largest peak first.
        image_size: ``(H, W)`` of the inspected image.
        reconstruction: ``[H, W, 3]`` uint8, the anomaly-free counterpart, for people to look at; None when it was not asked for.
        image_path: The file, if the image came from one.
        seconds: Time taken by the inspection of this image.
        model_id: What the model is called; empty if nobody said, like the two that follow.
        model_version: Its version.
        calibration_id: Which calibration its thresholds are from.

    Raises:
        NotFiniteError: The score, the p-value or the map is not finite.
    """

    pred_score: float
    p_value: float
    pred_label: bool
    step: int
    anomaly_map: NDArray[np.float32]
    pred_mask: NDArray[np.bool_]
    regions: tuple[Region, ...]
    image_size: tuple[int, int]
    reconstruction: NDArray[np.uint8] | None = None
    image_path: Path | None = None
    seconds: float = 0.0
    model_id: str = ""
    model_version: str = ""
    calibration_id: str = ""

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
    """The result of an evaluation.

    Attributes:
        metrics: Name -> value; pixel metrics are absent where there are no masks.
        counts: Number of normal and anomalous images, of masks, of those that are missing or vanish, and of images skipped.
        rows: One JSON-ready record per image.
        details: Data set, model and settings.
    """

    metrics: dict[str, float]
    counts: dict[str, int]
    rows: list[dict[str, Any]] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)
