"""Settings of the paper's form, and what a fitted model of it is."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated

from pydantic import Field

from gladad.algorithm import ReconstructionConfig, ScoringConfig
from gladad.core.settings import validated
from gladad.data.foreground import Foreground
from gladad.models.settings import DenoisingSettings
from gladad.models.stable_diffusion.autoencoder_tuning import AutoencoderTuningConfig
from gladad.models.stable_diffusion.components import Sources
from gladad.models.stable_diffusion.pipeline import DEFAULT_PROMPT
from gladad.models.stable_diffusion.presets import MULTI_CLASS, Preset, category_preset
from gladad.models.stable_diffusion.training import FinetuneConfig

DEFAULT_STEPS = 4000  # of the optimiser: the paper's for MVTec AD and MPDD


@validated
class DenoiserSettings(FinetuneConfig):
    """How the denoiser is trained, and how long."""

    steps: Annotated[int, Field(ge=0)] | None = None  # optimiser steps of each training; None = 4000 or the preset's; 0 = adopt as it is


@validated
class StableDiffusionSettings(DenoisingSettings):
    """Everything that may be chosen about a model in the paper's form; ``image_size`` None means 512.

    Guidance is off and delta calibrated by default; the paper's constants are presets, see `from_preset`.
    """

    features: str | None = None  # extractor: folder or Hub id; None = DINO ViT-B/8
    vae: str | None = None  # autoencoder that replaces the base's: folder or Hub id
    revision: str | None = None  # of the base on the Hub: branch, tag or commit
    offline: bool = False  # never ask the Hub
    prompt: str = DEFAULT_PROMPT  # several products add their name, or stand in for {category}
    preset: str | None = None  # the published constants that these settings started from, for the record
    training: DenoiserSettings = field(default_factory=DenoiserSettings)
    autoencoder: AutoencoderTuningConfig | None = None  # training of the autoencoder of a base without weights (``small``)
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0  # classifier-free guidance; 1 = off, the paper uses 9
    feature_size: Annotated[int, Field(ge=32)] | None = None  # side at which input and reconstruction are compared; None = image_size
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    calibrate_step: bool = True  # set reconstruction.step_threshold by the good images
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    scoring_foreground: Foreground = "all"  # where the map counts

    def sources(self, name: str) -> Sources:
        """Where the parts of the base of this name are from."""
        return Sources(name, self.features, self.vae, self.revision, offline=self.offline)

    def of_product(self, product: str, preset: Preset | None) -> StableDiffusionSettings:
        """The settings for one of several products: its name joins the prompt, and a preset's category brings what is its own."""
        if preset is not None and preset.category == MULTI_CLASS:
            own = category_preset(preset, product)
            scoring = replace(self.scoring, symmetric=own.scoring.symmetric)
            return replace(self, prompt=own.prompt, scoring=scoring, scoring_foreground=own.scoring_foreground)
        prompt = self.prompt.replace("{category}", product) if "{category}" in self.prompt else f"{self.prompt} {product}".strip()
        return replace(self, prompt=prompt)


@validated
class StableDiffusionConfig:
    """What a fitted model is: its settings as training has resolved them, and its shape."""

    settings: StableDiffusionSettings = field(default_factory=StableDiffusionSettings)
    image_size: tuple[int, int] = (512, 512)  # (H, W) pixels; multiples of the autoencoder's stride
    adapted: bool = False  # whether the denoiser carries an adapter, of the rank and layers of the training settings

    @property
    def feature_size(self) -> tuple[int, int]:
        """``(H, W)`` at which input and reconstruction are compared."""
        side = self.settings.feature_size
        return self.image_size if side is None else (side, side)
