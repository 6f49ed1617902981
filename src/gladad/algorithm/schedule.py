"""The noise schedule and its algebra (section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The cumulative noise schedule of a trained denoiser."""

    alphas_cumprod: Tensor  # [T], decreasing, in (0, 1)

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000) -> Schedule:
        """Betas linear in their square root: the schedule of Stable Diffusion."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def cosine(cls, num_timesteps: int) -> Schedule:
        """``alpha_bar`` falls as a squared cosine (Nichol & Dhariwal, arXiv 2102.09672), with their offset of 0.008."""
        share = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        level = torch.cos((share + 0.008) / 1.008 * math.pi / 2).square()
        kept = (level[1:] / level[:-1]).clamp_min(0.001)  # 1 - beta; the last would be 0
        return cls(torch.cumprod(kept, dim=0).float())

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, timestep: int | Tensor) -> Tensor:
        """``alpha_bar`` at one timestep (scalar) or at ``[B]`` timesteps (``[B, 1, 1, 1]``). Negative means the last, timestep 0."""
        if isinstance(timestep, int):
            return self.alphas_cumprod[max(timestep, 0)]
        return self.alphas_cumprod.to(timestep.device)[timestep.clamp_min(0)].view(-1, 1, 1, 1)


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``sqrt(a) x0 + sqrt(1 - a) eps``: the forward process in closed form."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def predict_x0(x_t: Tensor, noise_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latent that a noise prediction implies."""
    return (x_t - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()


def ddim_step(x0: Tensor, noise_pred: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Deterministic DDIM (eta = 0) to the previous noise level."""
    return add_noise(x0, noise_pred, alpha_bar_prev)


def velocity_to_noise(x_t: Tensor, velocity: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise prediction from a v-prediction, ``v = sqrt(a) eps - sqrt(1 - a) x0`` (Salimans & Ho, arXiv 2202.00512)."""
    return alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * x_t


def chain_timesteps(max_step: int, num_steps: int, every: int = 1) -> list[tuple[int, int]]:
    """The published timestep grid as ``(timestep, previous timestep)``, from high to low.

    ``stride = max_step // num_steps``, timesteps ``i * stride + 1``: 750 in 25 steps is 721, 691, ... 1. The previous timestep of the
    last is negative, which `Schedule.alpha_bar` reads as timestep 0. Of the grid ``every`` so-many-th is kept, from the first on.
    """
    stride = max_step // num_steps
    kept = [i * stride + 1 for i in reversed(range(num_steps))][::every]
    return list(pairwise([*kept, 1 - stride]))


def image_noise(shape: Sequence[int], seed: int, count: int = 1) -> Tensor:
    """Standard normal noise of one image, from a generator of its own: ``[count, *shape]`` float32.

    The seed does not depend on the image's place in a batch, in a folder or among processes, so neither does its score. It is drawn on
    the CPU, to be the same for every device.
    """
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
