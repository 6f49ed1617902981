"""The narrow contract between the algorithm and the world, and what a reconstruction is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Retrieve = Callable[[Tensor], Tensor]
"""Latents ``[B, C, h, w]`` -> for each cell the nearest one that a memory of normal images holds, ``[B, C, h, w]``."""


class Denoiser(Protocol):
    """What rebuilds latents."""

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Noise prediction ``[B, C, h, w]`` for noisy latents ``[B, C, h, w]`` at timesteps ``[B]``; conditioning is inside.

        Where a memory is asked (`Retrieve`), ``latent`` is ``[B, 2C, h, w]``: the noisy latents, then what the memory shows.
        Under the method "deviation" (`gladad.algorithm.deviation`) the result is the predicted deviation instead.
        """

    def latent_features(self, latent: Tensor) -> Tensor:
        """What the step search compares: ``[B, D, h', w']`` features of what a latent shows."""


class Networks(Denoiser, Protocol):
    """What the algorithm needs from the world. Images are RGB in [0, 1]."""

    def encode(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` image -> ``[B, C, h, w]`` latent."""

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, C, h, w]`` latent -> ``[B, 3, H, W]`` image."""


@dataclass(frozen=True)
class Reconstruction:
    """What the chain made of a batch."""

    latent: Tensor  # [B, C, h, w], anomaly-free
    step: Tensor  # [B] int64, the denoising step each image was given (max_step when the search is off)
    gap_score: Tensor  # [B], the difference seen at that step (NaN when the search is off)
    probes: int  # image-level comparisons that the search made
    trace: Tensor  # [B, P], the gap score of every comparison from the highest timestep down, NaN where none was made
