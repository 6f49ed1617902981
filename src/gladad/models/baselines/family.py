"""The baselines as a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from gladad.core.errors import ConfigError
from gladad.core.records import Progress
from gladad.core.settings import to_json, validated, with_values
from gladad.data.synthesis import Foreground
from gladad.features.whitening import size_for_aspect
from gladad.models.baselines.anomalib import AnomalibBase, AnomalibConfig, fit_anomalib
from gladad.models.baselines.memory_bank import MemoryBank, MemoryBankConfig, fit_memory_bank
from gladad.models.family import Model, Pixels, Training
from gladad.models.settings import FitSettings

LONG, SHARED = False, False


@validated
class MemoryBankSettings(FitSettings):
    """Settings of the memory bank; those that ``lite`` has too have the same values there."""

    memory: Annotated[int, Field(ge=1)] = 20_000  # feature vectors kept at most
    blur_sigma: Annotated[float, Field(gt=0)] = 4.0  # Gaussian blur of the map, pixels
    top_k: Annotated[int, Field(ge=1)] = 250  # pixels averaged into the image score


@validated
class AnomalibSettings(FitSettings):
    """Settings of anomalib's models."""

    coreset: Annotated[float, Field(gt=0, le=1)] = 0.01  # share of the vectors that PatchCore keeps (its paper: 25 %, 10 % and 1 %)
    neighbours: Annotated[int, Field(ge=1)] = 9  # of PatchCore's re-weighting of the score
    dimensions: Annotated[int, Field(ge=1)] = 100  # random feature dimensions that PaDiM keeps (its paper: 100 with ResNet-18)


def _settings_class(name: str) -> type[FitSettings]:
    return MemoryBankSettings if name == MemoryBank.kind else AnomalibSettings


def make_settings(name: str, values: Mapping[str, Any]) -> FitSettings:
    """The defaults with these values, see `gladad.models.family.Family`."""
    return with_values(_settings_class(name)(), values)


def check(name: str, settings: FitSettings, together: bool) -> None:
    """Refuse settings of another family, and models for several products."""
    if together:
        raise ConfigError(f"{name} has no denoiser that several products could share; fit each by itself")
    if not isinstance(settings, wanted := _settings_class(name)):
        raise ConfigError(f"{name} needs {wanted.__name__}, not {type(settings).__name__}")


def working_size(settings: FitSettings, aspect: float) -> tuple[int, int]:
    """That of ``lite``."""
    return size_for_aspect(aspect, settings.image_size or 256)


def foreground(settings: FitSettings, product: str) -> tuple[Foreground | None, str]:
    """There are no synthetic anomalies."""
    return "all", "not used"


def train(images: Mapping[str, Sequence[Pixels]], training: Training) -> Mapping[str, Model]:
    """Remember the images of each product."""
    values = {name: value for name, value in to_json(training.settings).items() if name not in to_json(FitSettings())}
    values |= {"image_size": training.size, "seed": training.settings.seed}
    if training.name == MemoryBank.kind:
        return {key: fit_memory_bank(own, MemoryBankConfig(**values), progress=training.progress) for key, own in images.items()}
    method = cast(Literal["patchcore", "padim"], training.name.removeprefix("anomalib-"))
    return {key: fit_anomalib(own, AnomalibConfig(method=method, **values), progress=training.progress) for key, own in images.items()}


def training_values(settings: FitSettings) -> dict[str, Any]:
    """All but the rate."""
    return {name: value for name, value in to_json(settings).items() if name != "false_reject_rate"}


def adjust(model: Model, images: Sequence[Pixels], settings: FitSettings, progress: Progress) -> Model:
    """Nothing of a baseline can be changed."""
    raise ConfigError(f"the inspection of a {model.kind} model cannot be adjusted; fit it anew")


def load(folder: Path, config: dict[str, Any]) -> Model:
    """Read what a ``save`` wrote."""
    return AnomalibBase.load(folder, config) if "method" in config else MemoryBank.load(folder, config)
