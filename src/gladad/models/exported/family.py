"""Exported models as a family: they are loaded and calibrated; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError
from gladad.core.records import Progress
from gladad.core.settings import with_values
from gladad.models.exported.model import Exported
from gladad.models.family import Model, Training
from gladad.models.settings import FitSettings

if TYPE_CHECKING:
    from gladad.data.foreground import Foreground

LONG, SHARED = False, False
load = Exported.load


def make_settings(name: str, values: Mapping[str, Any]) -> FitSettings:
    """What every model has; its other settings are in its config."""
    return with_values(FitSettings(), values)


def check(name: str, settings: object, together: bool) -> NoReturn:
    """Refuse any training."""
    raise ConfigError("an exported model cannot be trained or changed; do that with the model it is from, and export that again")


def working_size(settings: FitSettings, native: tuple[float, float]) -> tuple[int, int]:
    """It has one; see `check`."""
    check("exported", settings, False)


def foreground(settings: FitSettings, product: str) -> tuple[Foreground | None, str]:
    """See `check`."""
    check("exported", settings, False)


def train(images: Mapping[str, Sequence[NDArray[np.uint8]]], training: Training) -> Mapping[str, Model]:
    """See `check`."""
    check("exported", training.settings, False)


def training_values(settings: FitSettings) -> dict[str, Any]:
    """None."""
    return {}


def adjust(model: Exported, images: Sequence[NDArray[np.uint8]], settings: FitSettings, progress: Progress) -> Model:
    """See `check`."""
    check("exported", settings, False)
