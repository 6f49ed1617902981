"""Settings of ``lite``, and what a fitted one is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from gladad.algorithm import DeviationConfig, OneCallConfig
from gladad.core.errors import ConfigError
from gladad.core.settings import validated
from gladad.data.synthesis import LITE, SynthesisConfig
from gladad.features.extractor import DEFAULT_EXTRACTOR, Identity
from gladad.models.settings import DenoisingSettings

Product = Literal["object", "texture"]
DEFAULT_STEPS = 600


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one kind of product is rebuilt, and which part of the residual counts."""

    timesteps: tuple[int, ...]  # of the denoiser calls at inspection, from high to low
    trained: tuple[int, int]  # training draws timesteps from here to below there
    levels: tuple[int, ...]  # of the stacked features, from fine to coarse; each has the same say
    window: int  # grid cells per side, odd, over which residuals are averaged before their energy is taken
    outside_share: float  # weight of the energy that includes what the latent cannot hold, in [0, 1]


RECIPES: dict[Product, Recipe] = {
    "object": Recipe(timesteps=(600, 400), trained=(200, 700), levels=(0, 1, 2), window=1, outside_share=0.5),
    "texture": Recipe(timesteps=(500, 300), trained=(100, 600), levels=(2, 3, 4), window=7, outside_share=0.0),
}
"""An object's structure can be predicted, so fine detail is evidence; a texture's grain cannot, so what is left on average is."""


@validated
class LatentSettings:
    """The map between features and latent."""

    dimensions: Annotated[int, Field(ge=1)] = 80  # principal components kept
    whitening: Annotated[float, Field(ge=0, le=1)] = 0.5  # exponent: 0 = PCA, 1 = full whitening


@validated
class FeatureTrainingSettings:
    """Budget and recipe of the training."""

    steps: Annotated[int, Field(ge=1)] | None = None  # optimiser steps of each training; None = 600, divided where folds are trained too
    minutes: Annotated[float, Field(gt=0)] | None = None  # wall-clock budget of the whole fit instead; then a second run may differ
    batch_size: Annotated[int, Field(ge=1)] = 16  # latents per step
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3  # peak, of AdamW; warm-up over 50 steps, then a cosine to 0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3  # of AdamW
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995  # decay of the averaged weights, which are the ones kept
    timesteps: tuple[int, int] | None = None  # drawn from here to below there; None = around those of inspection, see RECIPES
    anomaly_oriented: bool = True  # ATP: synthetic anomalies in, normal latent as the target; False = plain diffusion
    anomaly_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability that a sample carries a synthetic anomaly
    weighting: Literal["x0", "velocity"] = "x0"  # loss weight: error of the clean latent, or of the velocity
    pool: Annotated[int, Field(ge=0)] = 2000  # synthetic anomalies made in advance
    decoder_steps: Annotated[int, Field(ge=0)] = 200  # optimiser steps of the picture decoder
    statistics: Annotated[int, Field(ge=1)] = 96  # training images that the residual's usual size is measured on
    step_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9  # delta of each call: this quantile of the gap score on normal images
    synthesis: SynthesisConfig = LITE  # how anomalies look

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("training.steps and training.minutes: give one of them, not both")


@validated
class MapSettings:
    """How residuals become a map and a score."""

    position_share: Annotated[float, Field(ge=0, le=1)] | None = None  # of the per-position normal energy; None = by number of images
    blur_sigma: Annotated[float, Field(gt=0)] = 4.0  # Gaussian blur of the map, pixels
    top_k: Annotated[int, Field(ge=1)] = 250  # pixels averaged into the image score


@validated
class FeatureDiffusionSettings(DenoisingSettings):
    """Everything that may be chosen about a ``lite`` model; ``image_size`` None means 256."""

    product: Literal["auto", "object", "texture"] = "auto"  # which of RECIPES; "auto" = decided by the good images
    features: str = DEFAULT_EXTRACTOR  # extractor: that one, or folder or Hub id of a transformers backbone
    latent: LatentSettings = field(default_factory=LatentSettings)
    widths: tuple[int, ...] = (96, 128, 192)  # channels of the denoiser's levels
    training: FeatureTrainingSettings = field(default_factory=FeatureTrainingSettings)
    reconstruction: Annotated[OneCallConfig | DeviationConfig, Field(discriminator="method")] = field(
        default_factory=lambda: OneCallConfig(timesteps=())  # no timesteps = the product's
    )
    scoring: MapSettings = field(default_factory=MapSettings)


@validated
class FeatureDiffusionConfig:
    """What a fitted model is: its settings as training has resolved them, and its shape."""

    settings: FeatureDiffusionSettings = field(default_factory=FeatureDiffusionSettings)
    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels that every image is resized to
    categories: tuple[str, ...] = ()  # products that share the denoiser, which is told which one it sees; none = it knows one only
    category: str = ""  # the product of this model, one of these
    extractor: Identity | None = None  # whose features; set by training

    def __post_init__(self) -> None:
        if self.categories and self.category not in self.categories:
            raise ConfigError(f"category must be one of {', '.join(self.categories)}, not {self.category!r}")

    @property
    def recipe(self) -> Recipe:
        """That of this kind of product (of an object, as long as the kind is not known)."""
        product = self.settings.product
        return RECIPES["object" if product == "auto" else product]
