"""Settings of ``lite``, and what a fitted one is."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from gladad.algorithm import DeviationConfig, OneCallConfig
from gladad.core.errors import ConfigError
from gladad.core.settings import validated
from gladad.data.synthesis import LITE, SynthesisConfig
from gladad.features.extractor import DEFAULT_EXTRACTOR, Identity
from gladad.models.settings import DenoisingSettings

DEFAULT_STEPS = 400


@validated
class LatentSettings:
    """The map between features and latent, of every scale."""

    dimensions: Annotated[int, Field(ge=1)] | None = None  # principal components kept; None = nine tenths of the channels, at most 80
    whitening: Annotated[float, Field(ge=0, le=1)] = 0.5  # exponent: 0 = PCA, 1 = full whitening

    def of(self, channels: int) -> int:
        """Dimensions for features of so many channels.

        Raises:
            ConfigError: There are no more channels than dimensions.
        """
        found = min(80, channels * 9 // 10) if self.dimensions is None else self.dimensions
        if found >= channels:
            raise ConfigError(f"latent.dimensions must be from 1 to {channels - 1}, not {found}")
        return found


@validated
class FeatureTrainingSettings:
    """Budget and recipe of the training."""

    steps: Annotated[int, Field(ge=1)] | None = None  # optimiser steps of each denoiser; None = 400, divided where folds are trained too
    minutes: Annotated[float, Field(gt=0)] | None = None  # wall-clock budget of the whole fit instead; then a second run may differ
    batch_size: Annotated[int, Field(ge=1)] = 16  # latents per step; fewer of those above 1536 cells
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3  # peak, of Muon; warm-up over 50 steps, then a cosine to 0
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3  # decoupled
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995  # decay of the averaged weights, which are the ones kept
    timesteps: tuple[int, int] = (200, 700)  # drawn from here to below there, around those of inspection
    anomaly_oriented: bool = True  # ATP: synthetic anomalies in, normal latent as the target; False = plain diffusion
    anomaly_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability that a sample carries a synthetic anomaly
    weighting: Literal["x0", "velocity"] = "x0"  # loss weight: error of the clean latent, or of the velocity
    pool: Annotated[int, Field(ge=0)] = 400  # synthetic anomalies made in advance
    copies: Literal["auto", "none"] = "auto"  # turned copies of the good images, where those say that parts lie so
    decoder_steps: Annotated[int, Field(ge=0)] = 200  # optimiser steps of the picture decoder
    apart: Annotated[float, Field(ge=0, lt=1)] = 0.2  # share of the good images that the denoiser is not shown: usual residuals are theirs
    step_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9  # delta of each call: this quantile of the gap score on normal images
    keep_latents: bool = False  # keep some with the model, so that the training can go on without the images
    synthesis: SynthesisConfig = LITE  # how anomalies look

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("training.steps and training.minutes: give one of them, not both")


@validated
class MapSettings:
    """How residuals become a map and a score."""

    blur_sigma: Annotated[float, Field(gt=0)] = 0.5  # Gaussian blur of a scale's map, in its cells
    top_k: Annotated[int, Field(ge=1)] = 16  # cells averaged into a scale's score
    whole: bool = True  # the mean of all cells is a score, too


@validated
class FeatureDiffusionSettings(DenoisingSettings):
    """Everything that may be chosen about a ``lite`` model; ``image_size`` None: see `features.stack`."""

    features: str = DEFAULT_EXTRACTOR  # extractor: any name that `load_extractor` takes
    scales: Annotated[int, Field(ge=1, le=4)] = 2  # the image itself, at half its size, at a quarter, ...
    latent: LatentSettings = field(default_factory=LatentSettings)
    memory: Annotated[int, Field(ge=0)] = 30_000  # normal latent vectors kept of a scale, more of one above 1024 cells; 0 = none are shown
    gaussians: bool = True  # residuals are measured by how those of similar normal latents vary, not by their length alone
    widths: tuple[int, ...] = (64, 96, 128)  # channels of the denoiser's levels
    training: FeatureTrainingSettings = field(default_factory=FeatureTrainingSettings)
    reconstruction: Annotated[OneCallConfig | DeviationConfig, Field(discriminator="method")] = field(
        default_factory=lambda: OneCallConfig(timesteps=(400,), noise="mean", adaptive=False)
    )
    scoring: MapSettings = field(default_factory=MapSettings)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 16 or any(width % 16 for width in self.widths) or self.widths[-1] < 32:
            raise ConfigError(f"widths: multiples of 16, the last one at least 32, such as 64, 96 and 128; not {list(self.widths)}")


@validated
class FeatureDiffusionConfig:
    """What a fitted model is: its settings as training has resolved them, and its shape."""

    settings: FeatureDiffusionSettings = field(default_factory=FeatureDiffusionSettings)
    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels that every image is resized to
    categories: tuple[str, ...] = ()  # products that share the denoisers, which are told which one they see; none = they know one only
    category: str = ""  # the product of this model, one of these
    turned: float | None = None  # distance of good images to the memory with turned copies of others, 1 = without; None = not tried
    extractor: Identity | None = None  # whose features; set by training

    def __post_init__(self) -> None:
        if self.categories and self.category not in self.categories:
            raise ConfigError(f"category must be one of {', '.join(self.categories)}, not {self.category!r}")
