"""What the detector needs of a model, and of the module that trains and loads a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.records import Inspection, Progress, no_progress
from gladad.models.settings import FitSettings

if TYPE_CHECKING:
    from gladad.data.foreground import Foreground
    from gladad.training.loop import TrainingRun

Pixels = NDArray[np.uint8]


class Model(Protocol):
    """A fitted model."""

    @property
    def kind(self) -> str:
        """Name of its form on disk."""

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one image ``[H, W, 3]`` uint8 of any size, in the model's own units."""

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels | None:
        """The anomaly-free counterpart, for people; None if the model makes none."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the JSON-ready config, with all settings as the training has resolved them."""

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config, and where the weights are from."""

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and everything learned."""


@dataclass(frozen=True)
class Training:
    """What a training is asked for."""

    name: str  # of the model or its weights, as in `gladad.models.registry.family_of`
    settings: Any  # of the family's class
    size: tuple[int, int]  # (H, W) of the images
    foregrounds: Mapping[str, Foreground]  # product -> where synthetic anomalies may appear
    textures: Sequence[Pixels] = ()  # images of the same size that synthetic anomalies take content from
    photographs: Sequence[int] | None = None  # number of the photograph that each image is, or is a copy or a tile of; None = each is one
    alone: bool = False  # all images are copies and tiles of one photograph
    copies: int = 0  # number of images, the last ones, that are copies of others
    share: int = 1  # number of trainings that a default budget is divided among; a budget that was set is that of each
    run: TrainingRun | None = None  # checkpoints, logs and examples of a long training; None writes nothing
    progress: Progress = field(default=no_progress)  # told of every stage


class Family(Protocol):
    """A module that trains and loads models of one family.

    One whose trainings can go on has ``extend(model, images, old, training)``, too, which gives a copy of a model that has learnt further
    images; ``old`` are those that it was trained on, or None where the model says by ``has_past`` that it does without.
    """

    @property
    def LONG(self) -> bool:
        """Whether its trainings are long: they write checkpoints, and several processes may share them."""

    @property
    def SHARED(self) -> bool:
        """Whether several products can share one denoiser."""

    def make_settings(self, name: str, values: Mapping[str, Any]) -> FitSettings:
        """Settings of the family, by dotted or nested names; raises ConfigError if a name is unknown or a value wrong."""

    def check(self, name: str, settings: FitSettings, together: bool) -> None:
        """Raise ConfigError if settings are of another family or do not fit together, or the model cannot be shared by products."""

    def working_size(self, settings: Any, native: tuple[float, float]) -> tuple[int, int]:
        """``(H, W)`` to work at, for images of typically ``(H, W)`` pixels."""

    def foreground(self, settings: Any, product: str) -> tuple[Foreground | None, str]:
        """Where synthetic anomalies may appear and why; None leaves the choice to the images."""

    def train(self, images: Mapping[str, Sequence[Pixels]], training: Training) -> Mapping[str, Model]:
        """Train one model for each product on its ``[H, W, 3]`` uint8 normal images, over one denoiser if there are several.

        Raises:
            ConfigError: The training would not fit into memory.
            Interrupted: It was asked to stop, and has saved where it is.
        """

    def training_values(self, settings: Any) -> dict[str, Any]:
        """JSON-ready: those settings that the training depends on. Models that agree in them differ by `adjust` only."""

    def adjust(self, model: Any, images: Sequence[Pixels], settings: Any, progress: Progress) -> Model:
        """A copy of a model, given with its training images, that inspects as other settings of the same `training_values` say.

        Raises:
            ConfigError: Models of this family cannot be adjusted.
        """

    def load(self, folder: Path, config: dict[str, Any]) -> Model:
        """Read what a model's ``save`` wrote; raises ModelFormatError if folder and config do not fit together."""


def inspect_where(model: Model, pixels: Pixels, counted: NDArray[np.bool_]) -> Inspection:
    """Map and score of one image where it counts; a family that has no way of its own loses of the score as much as of the map's peak.

    Args:
        model: A model.
        pixels: ``[H, W, 3]`` uint8 of any size.
        counted: ``[H, W]`` over the image, of any size.
    """
    own = getattr(model, "inspect_where", None)
    found: Inspection = model.inspect(pixels) if own is None else own(pixels, counted)
    where = Image.fromarray(counted).resize((found.map.shape[1], found.map.shape[0]), Image.Resampling.NEAREST)
    level: NDArray[np.float32] = np.where(np.asarray(where), found.map, np.float32(0))
    return lowered(found, level) if own is None else replace(found, map=level)


def lowered(found: Inspection, level: NDArray[np.float32]) -> Inspection:
    """An inspection with another map; the score changes as the peak does."""
    peak = float(found.map.max())
    return replace(found, map=level, score=found.score * float(level.max()) / peak if peak > 0 else found.score)
