"""The narrow contract between the algorithm and the world, and what a reconstruction is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Networks(Protocol):
    """What the algorithm needs from the world. Images are RGB in [0, 1]."""

    def encode(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` image -> ``[B, C, h, w]`` latent."""

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, C, h, w]`` latent -> ``[B, 3, H, W]`` image."""

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Noise prediction for noisy latents ``[B, C, h, w]`` at timesteps ``[B]``; conditioning and guidance are inside.

        Under the method "deviation" (`gladad.algorithm.deviation`) it is the predicted deviation instead.
        """

    def latent_features(self, latent: Tensor) -> Tensor:
        """What the step search compares: ``[B, D, h', w']`` features of what a latent shows."""


@dataclass(frozen=True)
class Reconstruction:
    """What the chain made of a batch."""

    latent: Tensor  # [B, C, h, w], anomaly-free
    step: Tensor  # [B] int64, the denoising step each image was given (max_step when the search is off)
    gap_score: Tensor  # [B], the difference seen at that step (NaN when the search is off)
    probes: int  # image-level comparisons that the search made
    trace: Tensor  # [B, P], the gap score of every comparison from the highest timestep down, NaN where none was made
