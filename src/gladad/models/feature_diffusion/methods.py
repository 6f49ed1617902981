"""The methods by which ``lite`` can be trained and can rebuild a latent; the settings' ``reconstruction`` chooses one.

A method is a function of `gladad.algorithm` with its settings class, and this much about its training. The model and the training ask
nothing of which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gladad.algorithm import (
    Denoiser,
    DeviationConfig,
    OneCallConfig,
    Reconstruction,
    Retrieve,
    Schedule,
    add_noise,
    corrupt_cells,
    deviation_target,
    random_cells,
    reconstruct_deviation,
    reconstruct_one_call,
    velocity_to_noise,
)
from gladad.models.feature_diffusion.settings import FeatureTrainingSettings


class Method(Protocol):
    """How a denoiser is trained and used."""

    schedule: Schedule
    draws: int
    """Noises ``[D, h, w]`` that an image needs."""
    uses_anomalies: bool
    """Whether training wants synthetic anomalies."""

    def trained_timesteps(self, training: FeatureTrainingSettings) -> tuple[int, int]:
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

    def reconstruct(self, networks: Denoiser, latent: Tensor, noise: Tensor, scale: Tensor, retrieve: Retrieve | None) -> Reconstruction:
        """Rebuild latents ``[B, D, h, w]`` with noise ``[B, draws, D, h, w]`` and residual scale ``[1, D, 1, 1]``."""
        ...

    def plain(self) -> Any:
        """The settings without what differs from image to image: statistics of normal residuals are measured with them."""
        ...

    def settled(self, deltas: Sequence[float], gap: float) -> Any:
        """The settings with what normal images say.

        Args:
            deltas: Usual gap score after each call.
            gap: The 99 % quantile of the gap of single cells.
        """
        ...


class SingleCalls:
    """GLAD's training towards the normal latent and single calls at inspection (`gladad.algorithm.single_calls`)."""

    def __init__(self, config: OneCallConfig):
        self.config, self.schedule, self.draws, self.uses_anomalies = config, Schedule.scaled_linear(), len(config.timesteps), True

    def trained_timesteps(self, training: FeatureTrainingSettings) -> tuple[int, int]:
        """Those of the settings."""
        return training.timesteps

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

    def reconstruct(self, networks: Denoiser, latent: Tensor, noise: Tensor, scale: Tensor, retrieve: Retrieve | None) -> Reconstruction:
        """See `gladad.algorithm.reconstruct_one_call`."""
        return reconstruct_one_call(networks, latent, noise, self.schedule, self.config, scale, retrieve)

    def plain(self) -> OneCallConfig:
        """No search and no fusion."""
        return replace(self.config, adaptive=False, fusion="none")

    def settled(self, deltas: Sequence[float], gap: float) -> OneCallConfig:
        """Delta of every call, unless they were given, and the fusion mask."""
        found = replace(self.config, fusion_center=gap, fusion_width=gap / 4)
        return replace(found, step_thresholds=tuple(deltas)) if found.adaptive and not found.step_thresholds else found


class Deviation:
    """Deviation correction (`gladad.algorithm.deviation`): trained on normal latents alone, of which some cells are noised."""

    draws, uses_anomalies = 0, False

    def __init__(self, config: DeviationConfig):
        self.config, self.schedule = config, Schedule.cosine(config.num_timesteps)

    def trained_timesteps(self, training: FeatureTrainingSettings) -> tuple[int, int]:
        """All of its schedule."""
        return 0, self.config.num_timesteps

    def example(
        self, z_normal: Tensor, z_input: Tensor, timestep: Tensor, generator: torch.Generator, training: FeatureTrainingSettings
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The latent with some cells noised, and what has to be taken off them."""
        alpha_bar = self.schedule.alpha_bar(timestep)
        mask = random_cells((len(z_normal), *z_normal.shape[-2:]), generator).to(z_normal.device)
        noise = torch.randn(z_normal.shape, generator=generator).to(z_normal)
        return corrupt_cells(z_normal, mask, noise, alpha_bar), deviation_target(z_normal, mask, noise, alpha_bar), 1.0

    def prediction(self, x_t: Tensor, output: Tensor, timestep: Tensor) -> Tensor:
        """The deviation, as it is."""
        return output

    def reconstruct(self, networks: Denoiser, latent: Tensor, noise: Tensor, scale: Tensor, retrieve: Retrieve | None) -> Reconstruction:
        """See `gladad.algorithm.reconstruct_deviation`."""
        return reconstruct_deviation(networks, latent, self.schedule, self.config, retrieve)

    def plain(self) -> DeviationConfig:
        """It has no choices."""
        return self.config

    def settled(self, deltas: Sequence[float], gap: float) -> DeviationConfig:
        """Nothing is learned."""
        return self.config


_METHODS: dict[type, Callable[[Any], Method]] = {OneCallConfig: SingleCalls, DeviationConfig: Deviation}


def method_of(config: Any) -> Method:
    """The method that some settings are of."""
    return _METHODS[type(config)](config)
