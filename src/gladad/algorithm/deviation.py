"""Deviation correction ("DeCo-Diff", CVPR 2025): the second method, in which an anomaly is the deviation from the normal latent.

In training only some places of a normal latent are noised, and the network learns what has to be taken off where. At inspection no noise
is added at all: the input is followed down a short deterministic chain that takes off what the network believes to be a deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gladad.algorithm.networks import Denoiser, Reconstruction, Retrieve
from gladad.algorithm.schedule import Schedule, add_noise
from gladad.core.errors import ConfigError
from gladad.core.settings import validated


@validated
class DeviationConfig:
    """How an image is rebuilt by correcting its deviation."""

    method: Literal["deviation"] = "deviation"
    timesteps: tuple[int, ...] = (8, 6, 4, 2, 0)  # of the corrections, from high to low
    num_timesteps: Annotated[int, Field(ge=2)] = 10  # of the cosine schedule that the network was trained with

    def __post_init__(self) -> None:
        falling = all(high > low for high, low in zip((self.num_timesteps, *self.timesteps), (*self.timesteps, -1), strict=True))
        if not self.timesteps or not falling:
            raise ConfigError(f"timesteps: must fall strictly, from below {self.num_timesteps} to 0 at least, not {self.timesteps}")


def random_cells(
    shape: Sequence[int], generator: torch.Generator, *, share: tuple[float, float] = (0.0, 1.0), sides: Sequence[int] = (1, 2, 4, 8)
) -> Tensor:
    """Which cells of each latent are noised in training: square patches at random places.

    Every latent draws the side of its patches, where their lattice begins, and its expected share of noised cells.

    Args:
        shape: ``(B, h, w)``; the masks are ``[B, 1, h, w]`` bool, on the generator's device.
        generator: Of all draws; the same state gives the same masks.
        share: Limits between which the expected share is uniform, in [0, 1].
        sides: Sides of a patch in cells, each as likely as the others.
    """
    count, height, width = shape
    device, masks = generator.device, []
    for _ in range(count):
        side = sides[int(torch.randint(len(sides), (), generator=generator, device=device))]
        top, left = torch.randint(side, (2,), generator=generator, device=device).tolist()
        level = share[0] + (share[1] - share[0]) * torch.rand((), generator=generator, device=device)
        lattice = torch.rand(height // side + 2, width // side + 2, generator=generator, device=device) < level
        cells = lattice.repeat_interleave(side, 0).repeat_interleave(side, 1)
        masks.append(cells[top : top + height, left : left + width])
    return torch.stack(masks)[:, None]


def corrupt_cells(z: Tensor, mask: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Clean latents ``[B, C, h, w]`` after the forward process inside a mask ``[B, 1, h, w]`` (bool), with noise ``[B, C, h, w]``."""
    return torch.where(mask, add_noise(z, noise, alpha_bar), z)


def deviation_target(z: Tensor, mask: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network is to predict for `corrupt_cells` of the same arguments: ``(x - z) / sqrt(1 - alpha_bar)``; 0 outside the mask."""
    sigma = (1 - alpha_bar).sqrt()
    return torch.where(mask, noise - (1 - alpha_bar.sqrt()) / sigma * z, torch.zeros_like(z))


@torch.no_grad()
def reconstruct_deviation(
    networks: Denoiser, latent: Tensor, schedule: Schedule, config: DeviationConfig, retrieve: Retrieve | None = None
) -> Reconstruction:
    """Take off each latent ``[B, C, h, w]`` what the network believes to be its deviation, in a few corrections and without noise.

    Of the networks only ``predict_noise`` is used, which returns the predicted *deviation* here; the schedule is that of training. There is
    no choice per image: ``step`` is the first timestep of all. ``trace`` is the mean squared change of every correction. With a memory of
    normal latents, the network is shown what it holds nearest to each latent.
    """
    x, trace = latent, []
    nearest = None if retrieve is None else retrieve(latent)
    sigmas = [float((1 - schedule.alpha_bar(timestep)).sqrt()) for timestep in config.timesteps]
    for timestep, sigma, after in zip(config.timesteps, sigmas, [*sigmas[1:], 0.0], strict=True):
        times = torch.full((latent.shape[0],), timestep, dtype=torch.int64, device=latent.device)
        shown = x if nearest is None else torch.cat([x, nearest], dim=1)
        change = (sigma - after) * networks.predict_noise(shown, times)
        x = x - change
        trace.append(change.square().flatten(1).mean(dim=1))
    return Reconstruction(
        latent=x,
        step=torch.full((latent.shape[0],), config.timesteps[0], dtype=torch.int64, device=latent.device),
        gap_score=latent.new_full((latent.shape[0],), float("nan")),
        probes=0,
        trace=torch.stack(trace, dim=1),
    )
