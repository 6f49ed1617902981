"""``lite`` as a family of models: settings by name, training, loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gladad.algorithm import OneCallConfig
from gladad.core.errors import ConfigError
from gladad.core.records import Progress
from gladad.core.settings import METHOD, to_json, with_values
from gladad.data.foreground import Foreground
from gladad.features import stack
from gladad.features.extractor import load_extractor
from gladad.models.family import Model, Pixels, Training
from gladad.models.feature_diffusion.continuation import Learning, extended
from gladad.models.feature_diffusion.model import FeatureDiffusion, working_multiple
from gladad.models.feature_diffusion.settings import FeatureDiffusionConfig, FeatureDiffusionSettings
from gladad.models.feature_diffusion.training import adjusted, train_models

LONG, SHARED = False, True
load = FeatureDiffusion.load


def make_settings(name: str, values: Mapping[str, Any]) -> FeatureDiffusionSettings:
    """The defaults with these values, see `gladad.models.family.Family`."""
    return with_values(FeatureDiffusionSettings(), values)


def check(name: str, settings: object, together: bool) -> None:
    """Refuse settings of another family, and a step search that has nothing to choose from."""
    if not isinstance(settings, FeatureDiffusionSettings):
        raise ConfigError(f"{name} needs FeatureDiffusionSettings, not {type(settings).__name__}")
    found = settings.reconstruction
    if isinstance(found, OneCallConfig) and found.adaptive and len(found.timesteps) < 2:
        raise ConfigError("reconstruction.adaptive: chooses among timesteps; give two or more, such as reconstruction.timesteps=[600, 400]")


def working_size(settings: FeatureDiffusionSettings, native: tuple[float, float]) -> tuple[int, int]:
    """By the images' own size, in their proportions."""
    return stack.working_size(native, settings.image_size, working_multiple(settings, load_extractor(settings.features)))


def foreground(settings: FeatureDiffusionSettings, product: str) -> tuple[Foreground | None, str]:
    """What the user says, or the images."""
    return (None, "") if settings.foreground == "auto" else (settings.foreground, "set by the user, or the default")


def train(images: Mapping[str, Sequence[Pixels]], training: Training) -> Mapping[str, Model]:
    """Train one denoiser, see `gladad.models.feature_diffusion.training`."""
    categories = tuple(images) if set(images) != {""} else ()
    config = FeatureDiffusionConfig(
        settings=training.settings, image_size=training.size, categories=categories, category=categories[0] if categories else ""
    )
    return train_models(
        images, config, textures=training.textures, foregrounds=training.foregrounds, share=training.share,
        photographs=training.photographs, copies=training.copies, progress=training.progress,
        watch=None if training.run is None else training.run.watch,
    )  # fmt: skip


def training_values(settings: FeatureDiffusionSettings) -> dict[str, Any]:
    """All but the rate and how a trained method is used."""
    values = to_json(settings)
    del values["false_reject_rate"]
    trained = {key: value for key, value in values["reconstruction"].items() if key in {METHOD, "num_timesteps"}}
    return values | {"reconstruction": trained}


def adjust(model: FeatureDiffusion, images: Sequence[Pixels], settings: FeatureDiffusionSettings, progress: Progress) -> Model:
    """A copy with the statistics measured anew."""
    return adjusted(model, settings, images, progress)


def extend(model: FeatureDiffusion, images: Sequence[Pixels], old: Sequence[Pixels] | None, training: Training) -> Model:
    """A copy that has learnt further images, see `gladad.models.feature_diffusion.continuation.extended`."""
    if model.config.categories:
        raise ConfigError("a model whose denoiser several products share cannot learn on; fit them anew together")
    learning = Learning(training.settings, training.foregrounds[""], training.textures, training.progress)
    return extended(model, images, old, learning)
