"""Where the ``lite`` base diffuses: frozen EfficientNet-Lite0 features of two image sizes, and their map to a latent."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.features.efficientnet import CHANNELS, EfficientNetLite0

CELL = 8
"""Pixels per side of a grid cell."""
SIDE_MULTIPLE = 32
"""Image sides are multiples of this: the trunk's stride at half size."""
_WIDTHS = (*CHANNELS, *CHANNELS[1:])
FEATURE_CHANNELS = sum(_WIDTHS)
"""Channels of the stacked features."""
LEVELS = tuple(slice(sum(_WIDTHS[:level]), sum(_WIDTHS[: level + 1])) for level in range(len(_WIDTHS)))
"""Channels of each level, from fine to coarse: strides 4, 8, 16 of the image, and strides 8, 16 of the image at half size."""


def size_for_aspect(aspect: float, side: int) -> tuple[int, int]:
    """The ``(H, W)`` in multiples of 32 with about ``side**2`` pixels, never more, that best keeps a width-to-height ratio."""
    best, found = math.inf, (SIDE_MULTIPLE * 2, SIDE_MULTIPLE * 2)
    sides = range(2 * SIDE_MULTIPLE, 8 * side, SIDE_MULTIPLE)
    for height in sides:
        for width in sides:
            if height * width <= side * side:
                error = abs(math.log(width / height / aspect)) + 0.5 * math.log(side * side / (height * width))
                if error < best - 1e-9:
                    best, found = error, (height, width)
    return found


def stack_features(trunk: EfficientNetLite0, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features of three strides and two image sizes on one grid.

    Every level is averaged over 3x3 of its own cells first: single-cell noise of textures is not what distinguishes a part.

    Args:
        trunk: The frozen network, any dtype.
        images: ``[B, 3, H, W]`` in [0, 1].
        grid: ``(h, w)``.

    Returns:
        ``[B, 328, h, w]`` float32.
    """
    half = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    levels = [*trunk(images), *trunk(half)[1:]]
    pooled = [F.avg_pool2d(level.float(), 3, 1, 1, count_include_pad=False) for level in levels]
    return torch.cat([_to_grid(level, grid) for level in pooled], dim=1)


def _to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    if x.shape[-1] > grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    return x if x.shape[-2:] == grid else F.interpolate(x, grid, mode="bilinear", align_corners=False)


class FeatureSpace(nn.Module):
    """The affine map between stacked features and the latent: standardise, project, whiten.

    Buffers:
        mean, std: ``[1, C, 1, 1]`` of the features on normal images.
        basis: ``[D, C]`` principal directions of the standardised features, rows by falling variance.
        scale: ``[1, D, 1, 1]``, what the coordinates along them are divided by.
        unexplained: scalar in [0, 1], share of the normal images' variance that the ``D`` directions leave out.
    """

    mean: Tensor
    std: Tensor
    basis: Tensor
    scale: Tensor
    unexplained: Tensor

    def __init__(self, dimensions: int, whitening: float):
        super().__init__()
        self.dimensions, self.whitening = dimensions, whitening
        channels = FEATURE_CHANNELS
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.register_buffer("basis", torch.eye(channels)[:dimensions].clone())
        self.register_buffer("scale", torch.ones(1, dimensions, 1, 1))
        self.register_buffer("unexplained", torch.zeros(()))

    def fit(self, features: Iterable[Tensor]) -> None:
        """Fit on feature batches ``[B, C, h, w]`` of normal images (one pass, sums in double precision)."""
        count, total = 0, torch.zeros(FEATURE_CHANNELS, dtype=torch.float64)
        second = torch.zeros(FEATURE_CHANNELS, FEATURE_CHANNELS, dtype=torch.float64)
        for batch in features:
            rows = batch.float().permute(0, 2, 3, 1).reshape(-1, FEATURE_CHANNELS)
            count += len(rows)
            total += rows.double().sum(0)
            second += (rows.T @ rows).double()
        mean = total / count
        covariance = second / count - torch.outer(mean, mean)
        std = covariance.diagonal().clamp_min(0).sqrt() + 1e-5
        eigenvalues, vectors = torch.linalg.eigh(covariance / torch.outer(std, std))
        variances, basis = eigenvalues.flip(0).clamp_min(1e-10), vectors.flip(1).T
        kept, basis = variances[: self.dimensions], basis[: self.dimensions]
        # an eigenvector's sign is arbitrary: fix it, so that the same data give the same model
        signs = torch.sign(basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)))
        self.mean.copy_(mean.view(1, -1, 1, 1))
        self.std.copy_(std.view(1, -1, 1, 1))
        self.basis.copy_(basis * signs)
        unit = (kept ** (1 - self.whitening)).mean().sqrt()  # brings the latent to unit variance
        self.scale.copy_((kept ** (self.whitening / 2) * unit).view(1, -1, 1, 1))
        self.unexplained.copy_(1 - kept.sum() / variances.sum())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, C, h, w]`` -> latent ``[B, D, h, w]``, and the standardised features it cannot hold ``[B, C, h, w]``."""
        standard = (features - self.mean) / self.std
        inside = F.conv2d(standard, self.basis[:, :, None, None])
        return inside / self.scale, standard - F.conv2d(inside, self.basis.T[:, :, None, None])

    def to_features(self, latent: Tensor) -> Tensor:
        """A latent, or a difference of two, ``[B, D, h, w]`` as standardised features ``[B, C, h, w]``."""
        return F.conv2d(latent * self.scale, self.basis.T[:, :, None, None])
