"""The methods by which ``lite`` can be trained and can rebuild a latent; the settings' ``reconstruction`` chooses one.

A method is a function of `gladad.algorithm` with its settings class, and this much about its training. The model and the training ask
nothing of which one it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from gladad.algorithm import Networks, OneCallConfig, Reconstruction, Schedule, add_noise, reconstruct_one_call, velocity_to_noise
from gladad.models.feature_diffusion.settings import FeatureTrainingSettings, Recipe


class Method(Protocol):
    """How a denoiser is trained and used."""

    schedule: Schedule
    draws: int
    """Noises ``[D, h, w]`` that an image needs."""
    uses_anomalies: bool
    """Whether training wants synthetic anomalies."""

    def trained_timesteps(self, recipe: Recipe, training: FeatureTrainingSettings) -> tuple[int, int]:
        """Training draws timesteps from the first to below the second."""
        ...

    def example(
        self, z_normal: Tensor, z_input: Tensor, timestep: Tensor, generator: torch.Generator, training: FeatureTrainingSettings
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Input ``[B, D, h, w]`` of the denoiser, its target of the same shape, and the weight of the squared error."""
        ...

    def prediction(self, x_t: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        """The denoiser's raw output as what the algorithm's contract calls the noise prediction."""
        ...

    def reconstruct(self, networks: Networks, latent: Tensor, noise: Tensor, scale: Tensor) -> Reconstruction:
        """Rebuild latents ``[B, D, h, w]`` with noise ``[B, draws, D, h, w]`` and residual scale ``[1, D, 1, 1]``."""
        ...


class SingleCalls:
    """GLAD's training towards the normal latent and single calls at inspection (`gladad.algorithm.single_calls`)."""

    def __init__(self, config: OneCallConfig):
        self.config, self.schedule, self.draws, self.uses_anomalies = config, Schedule.scaled_linear(), len(config.timesteps), True

    def trained_timesteps(self, recipe: Recipe, training: FeatureTrainingSettings) -> tuple[int, int]:
        """Those around the inspection's."""
        return recipe.trained if training.timesteps is None else training.timesteps

    def example(
        self, z_normal: Tensor, z_input: Tensor, timestep: Tensor, generator: torch.Generator, training: FeatureTrainingSettings
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The noised input, and the velocity whose implied clean latent is the normal one."""
        alpha_bar = self.schedule.alpha_bar(timestep)
        x_t = add_noise(z_input, torch.randn(z_normal.shape, generator=generator).to(z_input), alpha_bar)
        target = (alpha_bar.sqrt() * x_t - z_normal) / (1 - alpha_bar).sqrt()
        return x_t, target, 1 - alpha_bar if training.weighting == "x0" else 1.0

    def prediction(self, x_t: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        """Noise from the velocity."""
        return velocity_to_noise(x_t, output, self.schedule.alpha_bar(timestep))

    def reconstruct(self, networks: Networks, latent: Tensor, noise: Tensor, scale: Tensor) -> Reconstruction:
        """See `gladad.algorithm.reconstruct_one_call`."""
        return reconstruct_one_call(networks, latent, noise, self.schedule, self.config, scale)


def method_of(config: OneCallConfig) -> Method:
    """The method that some settings are of."""
    return SingleCalls(config)


def without_search(config: OneCallConfig) -> OneCallConfig:
    """The same for every image, and nothing of the input kept: what statistics of normal residuals are measured with."""
    return replace(config, adaptive=False, fusion="none")
