"""The baselines as a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from gladad.core.errors import ConfigError
from gladad.core.records import Progress
from gladad.core.settings import to_json, with_values
from gladad.data.foreground import Foreground
from gladad.features import stack
from gladad.features.extractor import DEFAULT_EXTRACTOR, load_extractor
from gladad.models.baselines.anomalib import AnomalibConfig, AnomalibModel, AnomalibSettings, fit_anomalib
from gladad.models.baselines.feature_baselines import (
    METHODS,
    FeatureBaseline,
    FeatureBaselineConfig,
    FeatureBaselineSettings,
    fit_feature_baseline,
)
from gladad.models.family import Model, Pixels, Training
from gladad.models.settings import FitSettings

LONG, SHARED = False, False


def _settings_class(name: str) -> type[FitSettings]:
    return FeatureBaselineSettings if name in METHODS else AnomalibSettings


def make_settings(name: str, values: Mapping[str, Any]) -> FitSettings:
    """The defaults with these values, see `gladad.models.family.Family`."""
    return with_values(_settings_class(name)(), values)


def check(name: str, settings: FitSettings, together: bool) -> None:
    """Refuse settings of another family, and models for several products."""
    if together:
        raise ConfigError(f"{name} has no denoiser that several products could share; fit each by itself")
    if not isinstance(settings, wanted := _settings_class(name)):
        raise ConfigError(f"{name} needs {wanted.__name__}, not {type(settings).__name__}")


def working_size(settings: FitSettings, native: tuple[float, float]) -> tuple[int, int]:
    """That of ``lite`` with two scales."""
    features = settings.features if isinstance(settings, FeatureBaselineSettings) else DEFAULT_EXTRACTOR
    return stack.working_size(native, settings.image_size, 2 * stack.size_multiple(load_extractor(features)))


def foreground(settings: FitSettings, product: str) -> tuple[Foreground | None, str]:
    """There are no synthetic anomalies."""
    return "all", "not used"


def train(images: Mapping[str, Sequence[Pixels]], training: Training) -> Mapping[str, Model]:
    """Remember the images of each product."""
    if training.name in METHODS:
        baseline = FeatureBaselineConfig(method=training.name, settings=training.settings, image_size=training.size)
        return {key: fit_feature_baseline(own, baseline, progress=training.progress) for key, own in images.items()}
    method = cast(Literal["patchcore", "padim"], training.name.removeprefix("anomalib-"))
    config = AnomalibConfig(method=method, settings=training.settings, image_size=training.size)
    return {key: fit_anomalib(own, config, progress=training.progress) for key, own in images.items()}


def training_values(settings: FitSettings) -> dict[str, Any]:
    """All but the rate."""
    return {name: value for name, value in to_json(settings).items() if name != "false_reject_rate"}


def adjust(model: Model, images: Sequence[Pixels], settings: FitSettings, progress: Progress) -> Model:
    """Nothing of a baseline can be changed."""
    raise ConfigError(f"the inspection of a {model.kind} model cannot be adjusted; fit it anew")


def load(folder: Path, config: dict[str, Any]) -> Model:
    """Read what a ``save`` wrote."""
    return (FeatureBaseline if "extractor" in config else AnomalibModel).load(folder, config)
