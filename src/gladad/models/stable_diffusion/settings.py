"""Settings of the paper's form, and what a fitted model of it is."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from gladad.algorithm import ReconstructionConfig, ScoringConfig
from gladad.core.errors import ConfigError
from gladad.core.settings import validated
from gladad.data.foreground import Foreground
from gladad.models.settings import DenoisingSettings
from gladad.models.stable_diffusion.autoencoder_tuning import AutoencoderTuningConfig
from gladad.models.stable_diffusion.components import Sources
from gladad.models.stable_diffusion.pipeline import DEFAULT_PROMPT
from gladad.models.stable_diffusion.presets import MULTI_CLASS, Preset, category_preset
from gladad.models.stable_diffusion.training import FinetuneConfig

DEFAULT_STEPS = 4000  # of the optimiser: the paper's for MVTec AD and MPDD
Reference = Literal["input", "decoded", "both"]
Speed = Literal["exact", "balanced", "fast"]
SPEEDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"search_stride": 7},
    "fast": {"probe": "latent", "call_stride": 4},
}
"""What each speed changes of the reconstruction; docs/speed.md has what that saves and costs. ``fast`` also leaves guidance out."""


@validated
class DenoiserSettings(FinetuneConfig):
    """How the denoiser is trained, and how long."""

    steps: Annotated[int, Field(ge=0)] | None = None  # optimiser steps of each training; None = 4000 or the preset's; 0 = adopt as it is
    apart: Annotated[float, Field(ge=0, lt=1)] = 0.2  # share of the good images not trained on, by which delta is set; 0 in presets
    minutes: Annotated[float, Field(gt=0)] | None = None  # after which the trainings' steps end before; a second run may differ then


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
    reference: Reference = "input"  # what a reconstruction is compared with: the image, what the autoencoder makes of it, or both
    feature_size: Annotated[int, Field(ge=32)] | None = None  # side at which input and reconstruction are compared; None = image_size
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    speed: Speed = "exact"  # of an inspection, see `SPEEDS`
    calibrate_step: bool = True  # set reconstruction.step_threshold by the good images; that of latents always is
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    scoring_foreground: Foreground = "all"  # where the map counts

    def __post_init__(self) -> None:
        for key, value in SPEEDS[self.speed].items():
            if getattr(self.reconstruction, key) not in (value, getattr(ReconstructionConfig, key)):
                raise ConfigError(f"reconstruction.{key}: speed {self.speed} sets it to {value!r}; leave one of the two out")

    @property
    def chain(self) -> ReconstructionConfig:
        """The reconstruction at the speed, but for the delta of latents."""
        return replace(self.reconstruction, **SPEEDS[self.speed])

    @property
    def guidance(self) -> float:
        """Weight of classifier-free guidance at the speed; 1 is off."""
        return 1.0 if self.speed == "fast" else self.guidance_scale

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
    latent_deltas: dict[str, float] = field(default_factory=dict)  # speed -> delta of its search, where that compares latents

    @property
    def chain(self) -> ReconstructionConfig:
        """How images are rebuilt at the speed of the settings.

        Raises:
            ConfigError: The search compares latents, and their delta has not been calibrated.
        """
        speed, found = self.settings.speed, self.settings.chain
        if found.probe == "features" or not found.adaptive:
            return found
        if speed not in self.latent_deltas:
            raise ConfigError(f"speed: the model has no delta for {speed}; adjust it with the images of its fit, or fit it again")
        return with_delta(replace(found, fusion_center=0.0), self.latent_deltas[speed])  # a centre is of the features' gaps

    @property
    def feature_size(self) -> tuple[int, int]:
        """``(H, W)`` at which input and reconstruction are compared."""
        side = self.settings.feature_size
        return self.image_size if side is None else (side, side)


def with_delta(chain: ReconstructionConfig, delta: float) -> ReconstructionConfig:
    """With another delta. A calibrated mask is centred on it, unless its centre is given: where normal images differ, the input is kept."""
    if chain.fusion != "calibrated" or chain.fusion_center:
        return replace(chain, step_threshold=delta)
    return replace(chain, step_threshold=delta, fusion_center=delta, fusion_width=max(delta / 4, 1e-6))
