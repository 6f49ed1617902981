"""Reconstruction by single denoiser calls instead of a chain, with the same two ideas: ADS and SAFF."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gladad.algorithm.chain import FusionMode
from gladad.algorithm.distance import top_k_mean
from gladad.algorithm.networks import Denoiser, Reconstruction, Retrieve
from gladad.algorithm.schedule import Schedule, add_noise, predict_x0
from gladad.core.errors import ConfigError
from gladad.core.settings import validated


@validated
class OneCallConfig:
    """How an image is rebuilt by independent single calls of the denoiser instead of a chain.

    A denoiser trained towards the *normal* latent rebuilds it in one call; several calls at different timesteps, each with noise of its
    own, cost as much as as many steps of a chain and average their errors away instead of feeding them forward.
    """

    method: Literal["single-calls"] = "single-calls"
    timesteps: tuple[int, ...] = (500, 300)  # probes, from high to low
    noise: Literal["drawn", "mean"] = "drawn"  # "mean": its mean, 0, in place of a draw, so that no score hangs on one
    adaptive: bool = True  # stop, per image, at the first timestep where the difference is clear; False = average all probes
    step_thresholds: tuple[float, ...] = ()  # delta of each timestep (calibrated); needed when adaptive
    top_k: int = 10  # places averaged into the gap score
    fusion: FusionMode = "none"  # SAFF mask; "none" here keeps the model's content everywhere
    fusion_center: float = 0.0  # "calibrated": gap at which the mask is one half
    fusion_width: float = 1.0  # "calibrated": gap over which it rises, > 0

    def __post_init__(self) -> None:
        if any(later <= 0 or later >= earlier for earlier, later in zip((1000, *self.timesteps), self.timesteps, strict=False)):
            raise ConfigError(f"timesteps: must fall and lie between 0 and 1000, such as 600 and 400, not {list(self.timesteps)}")


@torch.no_grad()
def reconstruct_one_call(
    networks: Denoiser,
    latent: Tensor,
    noise: Tensor,
    schedule: Schedule,
    config: OneCallConfig,
    scale: Tensor,
    retrieve: Retrieve | None = None,
) -> Reconstruction:
    """Rebuild each latent from a few single denoiser calls, with a per-image choice of how far down to go.

    The estimate after probe ``k`` is the mean of the first ``k`` rebuilt latents, from the noisiest down. An image whose difference to
    its estimate exceeds that timestep's delta is decided there (ADS: this much noise removed something); the others go on to less noise,
    which rebuilds normal detail more faithfully. All probes share one batch, because on a CPU that costs less than skipping some.

    Args:
        networks: The denoiser.
        latent: ``[B, C, h, w]``.
        noise: ``[B, K, C, h, w]``, one draw per probe.
        schedule: The denoiser's schedule.
        config: Timesteps and options.
        scale: ``[1, D, 1, 1]``, usual magnitude of each feature's residual on normal images.
        retrieve: A memory of normal latents; the denoiser is shown, beside the noisy latent, what it holds nearest to the clean one.

    Returns:
        ``step`` is the timestep each image was decided at.
    """
    count = len(config.timesteps)
    grid = torch.tensor(config.timesteps, device=latent.device)
    timesteps = grid.repeat(latent.shape[0])  # image-major
    alpha_bar = schedule.alpha_bar(timesteps)
    drawn = noise if config.noise == "drawn" else torch.zeros_like(noise)
    x_t = add_noise(latent.repeat_interleave(count, dim=0), drawn.flatten(0, 1), alpha_bar)
    shown = x_t if retrieve is None else torch.cat([x_t, retrieve(latent).repeat_interleave(count, dim=0)], dim=1)
    x0 = predict_x0(x_t, networks.predict_noise(shown, timesteps), alpha_bar).unflatten(0, (-1, count))

    order = torch.arange(1, count + 1, device=latent.device).view(1, -1, 1, 1, 1)
    estimates = x0.cumsum(dim=1) / order  # [B, K, C, h, w]
    features = networks.latent_features(latent)[:, None]
    rebuilt = networks.latent_features(estimates.flatten(0, 1)).unflatten(0, (-1, count))
    gap = ((features - rebuilt) / scale[:, None]).square().mean(dim=2)  # [B, K, h, w]
    trace = top_k_mean(gap.flatten(0, 1), config.top_k).view(-1, count)

    choice = torch.full((latent.shape[0],), count - 1, device=latent.device)
    if config.adaptive:
        differs = trace > trace.new_tensor(config.step_thresholds)
        choice = torch.where(differs.any(dim=1), differs.int().argmax(dim=1), choice)
    rows = torch.arange(latent.shape[0], device=latent.device)
    chosen, chosen_gap = estimates[rows, choice], gap[rows, choice][:, None]
    if config.fusion != "none":  # local: keep the input where it is normal
        mask = torch.sigmoid((chosen_gap - config.fusion_center) / config.fusion_width)
        chosen = mask * chosen + (1 - mask) * latent
    return Reconstruction(latent=chosen, step=grid[choice], gap_score=trace[rows, choice], probes=count * latent.shape[0], trace=trace)
