"""What the detector needs of a model, and of the module that trains and loads a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gladad.core.records import Inspection, Progress, no_progress
from gladad.data.foreground import Foreground
from gladad.models.settings import FitSettings

if TYPE_CHECKING:
    from gladad.training.loop import TrainingRun

Pixels = NDArray[np.uint8]


class Model(Protocol):
    """A fitted model."""

    @property
    def kind(self) -> str:
        """Name of its form on disk."""
        ...

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        ...

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one image ``[H, W, 3]`` uint8 of any size, in the model's own units."""
        ...

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels | None:
        """The anomaly-free counterpart, for people; None if the model makes none."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the JSON-ready config, with all settings as the training has resolved them."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config, and where the weights are from."""
        ...

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and everything learned."""
        ...


@dataclass(frozen=True)
class Training:
    """What a training is asked for.

    Attributes:
        name: Of the model or its weights, as in `gladad.models.registry.family_of`.
        settings: Of the family's class.
        size: ``(H, W)`` of the images.
        foregrounds: Product -> where synthetic anomalies may appear.
        textures: Images of the same size that synthetic anomalies take content from.
        share: Number of trainings that a default budget is divided among; a budget that was set is that of each.
        run: Checkpoints, logs and examples of a long training; None writes nothing.
        progress: Told of every stage.
    """

    name: str
    settings: Any
    size: tuple[int, int]
    foregrounds: Mapping[str, Foreground]
    textures: Sequence[Pixels] = ()
    share: int = 1
    run: TrainingRun | None = None
    progress: Progress = field(default=no_progress)


class Family(Protocol):
    """A module that trains and loads models of one family."""

    @property
    def LONG(self) -> bool:
        """Whether its trainings are long: they write checkpoints, and several processes may share them."""
        ...

    @property
    def SHARED(self) -> bool:
        """Whether several products can share one denoiser."""
        ...

    def make_settings(self, name: str, values: Mapping[str, Any]) -> FitSettings:
        """Settings of the family, by dotted or nested names.

        Raises:
            ConfigError: A name is unknown, or a value is wrong.
        """
        ...

    def check(self, name: str, settings: FitSettings, together: bool) -> None:
        """Refuse what cannot be fitted.

        Raises:
            ConfigError: The settings are of another family or do not fit together, or the model cannot be shared by products.
        """
        ...

    def working_size(self, settings: Any, aspect: float) -> tuple[int, int]:
        """``(H, W)`` to work at, for images of this ratio of width to height."""
        ...

    def foreground(self, settings: Any, product: str) -> tuple[Foreground | None, str]:
        """Where synthetic anomalies may appear and why; None leaves the choice to the images."""
        ...

    def train(self, images: Mapping[str, Sequence[Pixels]], training: Training) -> Mapping[str, Model]:
        """Train one model for each product, over one denoiser if there are several.

        Args:
            images: Product -> ``[H, W, 3]`` uint8 normal images of the training's size.
            training: What is asked for.

        Raises:
            ConfigError: The training would not fit into memory.
            Interrupted: It was asked to stop, and has saved where it is.
        """
        ...

    def training_values(self, settings: Any) -> dict[str, Any]:
        """JSON-ready: those settings that the training depends on. Models that agree in them differ by `adjust` only."""
        ...

    def adjust(self, model: Any, images: Sequence[Pixels], settings: Any, progress: Progress) -> Model:
        """A copy of a model that inspects as other settings say, as if it had been trained with them.

        Args:
            model: It is not changed.
            images: ``[H, W, 3]`` uint8, those it was trained on, at its size.
            settings: They agree with its own in `training_values`.
            progress: Told of every stage.

        Raises:
            ConfigError: Models of this family cannot be adjusted.
        """
        ...

    def load(self, folder: Path, config: dict[str, Any]) -> Model:
        """Read what a model's ``save`` wrote.

        Raises:
            ModelFormatError: Folder and config do not fit together.
        """
        ...
