"""One scale of a ``lite`` model: the image at full size, half of it, ..., each with a latent space, a memory and a denoiser of its own."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.algorithm import Reconstruction, gaussian_blur, image_noise, top_k_mean
from gladad.core.threads import one_thread
from gladad.features.extractor import Extractor
from gladad.features.memory import ClusterGaussians, Memory
from gladad.features.space import FeatureSpace
from gladad.features.stack import FeatureStack
from gladad.models.feature_diffusion.methods import Method, method_of
from gladad.models.feature_diffusion.networks import LatentDenoiser
from gladad.models.feature_diffusion.settings import FeatureDiffusionConfig

MEMORY_CELLS = 1024
"""Of a latent, up to which the memory is as large as the settings say; it grows in proportion beyond."""


class Scale(nn.Module):
    """The denoiser of one scale (`gladad.algorithm.Denoiser`), what it works on, and what is usual on normal images.

    Buffers:
        residual_scale: ``[1, D, 1, 1]`` root mean square of the residual.
        usual_energy: Scalar, mean squared magnitude.
        usual_level: ``[5]`` lowest and highest usual logarithm of `level`; least and most under tolerated changes; and by how much that of
            the largest cells' mean grows with what lies between; 0 where none are.
        usual_scores: ``[K, 2]`` mean and standard deviation of the logarithm of each of its scores.

    Raises:
        ConfigError: Settings and image size do not suit the extractor.
    """

    residual_scale: Tensor
    usual_energy: Tensor
    usual_level: Tensor
    usual_scores: Tensor

    def __init__(self, config: FeatureDiffusionConfig, number: int, extractor: Extractor):
        super().__init__()
        latent = config.settings.latent
        self.image_size = (config.image_size[0] >> number, config.image_size[1] >> number)
        self.stack = FeatureStack(extractor, self.image_size)
        self.dimensions = latent.of(self.stack.channels)
        self.configure(config)
        self.space = FeatureSpace(self.stack.channels, self.dimensions, latent.whitening)
        self.memory = Memory(self.dimensions)
        self.gaussians = ClusterGaussians(self.dimensions)
        shown = self.dimensions if config.settings.memory else 0
        self.denoiser = LatentDenoiser(self.dimensions, self.grid, config.settings.widths, len(config.categories), shown)
        self.register_buffer("residual_scale", torch.ones(1, self.dimensions, 1, 1))
        self.register_buffer("usual_energy", torch.ones(()))
        self.register_buffer("usual_level", torch.zeros(5))
        self.register_buffer("usual_scores", torch.tensor([[0.0, 1.0]]).repeat(1 + config.settings.scoring.whole, 1))

    def configure(self, config: FeatureDiffusionConfig) -> None:
        """Inspect as other settings say."""
        self.config = config
        self.method: Method = method_of(config.settings.reconstruction)

    @property
    def learns_repairs(self) -> bool:
        """Whether its training wants synthetic anomalies."""
        return self.config.settings.training.anomaly_oriented and self.method.uses_anomalies

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.usual_scores.device

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)`` of the latent."""
        return self.stack.grid

    @property
    def capacity(self) -> int:
        """Vectors that its memory may hold: the more cells a latent has, the more differ."""
        return round(self.config.settings.memory * max(1.0, math.prod(self.grid) / MEMORY_CELLS))

    def features(self, image: Tensor) -> Tensor:
        """Features ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [0, 1] of the model's full size, or of this scale's."""
        if image.shape[-2:] != self.image_size:
            image = F.interpolate(image, self.image_size, mode="bilinear", antialias=True)
        return self.stack(image)

    def encode(self, image: Tensor) -> Tensor:
        """Latent ``[B, D, h, w]`` of such images."""
        latent: Tensor = self.space(self.features(image))
        return latent

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """What the method makes of the denoiser's output."""
        noisy = latent[:, : self.dimensions]
        output = self.denoiser(latent, timestep, self.labels(latent.shape[0]))
        return self.method.prediction(noisy, output, timestep)

    def latent_features(self, latent: Tensor) -> Tensor:
        """The latent itself: it is made of features."""
        return latent

    @torch.inference_mode()
    def inspect(self, image: Tensor) -> tuple[Reconstruction, Tensor]:
        """What is rebuilt of images ``[B, 3, H, W]`` in [0, 1], and the evidence ``[B, 1, h, w]``; on the calling thread alone."""
        with one_thread():
            latent = self.encode(image)
            rebuilt = self.rebuild(latent)
            return rebuilt, self.evidence(self.magnitude(latent, rebuilt.latent))

    def rebuild(self, latent: Tensor, owners: Tensor | None = None, nearest: Tensor | None = None) -> Reconstruction:
        """Anomaly-free latents of ``[B, D, h, w]``; with ``owners`` ``[B]``, as if the memory did not know these images.

        With ``nearest`` ``[B, D, h, w]``, the memory has been asked already.
        """
        settings = self.config.settings
        noise = _kept_noise((self.dimensions, *self.grid), settings.seed, self.method.draws).to(latent)
        noises = noise[None].expand(latent.shape[0], -1, -1, -1, -1)
        retrieve = (lambda z: self.memory(z, owners) if nearest is None else nearest) if settings.memory else None
        return self.method.reconstruct(self, latent, noises, self.residual_scale, retrieve)

    def magnitude(self, latent: Tensor, rebuilt: Tensor) -> Tensor:
        """Of the residual per cell, ``[B, D, h, w] -> [B, 1, h, w]`` >= 0: its length, or its distance by the Gaussians."""
        residual = latent - rebuilt
        if not self.config.settings.gaussians:
            return residual.square().mean(1, keepdim=True).sqrt()
        distance: Tensor = self.gaussians(rebuilt, residual)
        return distance

    def evidence(self, magnitude: Tensor) -> Tensor:
        """The magnitude relative to what is usual on normal images, blurred, ``[B, 1, h, w]``."""
        sigma = self.config.settings.scoring.blur_sigma
        return gaussian_blur(magnitude / self.usual_energy.sqrt(), sigma, 2 * math.ceil(4 * sigma) + 1)

    def level(self, evidence: Tensor, counted: int | None = None) -> Tensor:
        """Median of the cells of each image, ``[B, 1, h, w] -> [B]``; of the ``counted`` ones, if in the others there is no evidence."""
        cells = evidence.flatten(1).sort(1).values
        count = cells.shape[1] if counted is None else counted
        return cells[:, cells.shape[1] - (max(count, 1) + 1) // 2].clamp_min(1e-12)

    def scores(self, evidence: Tensor, counted: Tensor | None = None) -> Tensor:
        """Mean of the largest cells and, with ``scoring.whole``, of all that count: ``[B, 1, h, w] -> [K, B]``.

        Where changes of a picture are tolerated, that of the largest is relative to what it is in pictures changed as much as the level
        of this one says. ``counted`` ``[1, 1, h, w]`` is 1 in cells that count and 0 in others, in which there is no evidence; None is all.
        """
        scoring = self.config.settings.scoring
        found = [top_k_mean(evidence, min(scoring.top_k, math.prod(self.grid)))]
        if self.config.settings.tolerate:
            level = self.level(evidence, None if counted is None else int(counted.sum())).log()
            lowest, highest, least, most, slope = self.usual_level
            # by ramps, as the exporter's optimiser breaks two clamps of one value
            beyond = F.relu(level - highest) - F.relu(level - most) - F.relu(lowest - level) + F.relu(least - level)
            found[0] = found[0] * (-slope * beyond).exp()
        if scoring.whole:
            mean = evidence.mean((1, 2, 3))
            found.append(mean if counted is None else mean / counted.mean().clamp_min(1 / math.prod(self.grid)))
        return torch.stack(found)

    def labels(self, count: int) -> Tensor | None:
        """What the denoiser is told of the product, for that many latents: ``[count]`` int64, or None if it knows one only."""
        if not self.config.categories:
            return None
        return torch.full((count,), self.config.categories.index(self.config.category), device=self.device)


@lru_cache(maxsize=8)
def _kept_noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """`image_noise`, made once: every image is given the same."""
    return image_noise(shape, seed, count)
