"""Patch distance, anomaly map and image score (section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gladad.core.settings import validated


def top_k_mean(values: Tensor, k: int) -> Tensor:
    """Mean of the ``k`` largest entries of each image (all of them when there are fewer): ``[B, ...] -> [B]``."""
    flat = values.flatten(1)
    return flat.topk(min(k, flat.shape[1]), dim=1).values.mean(dim=1)


@validated
class ScoringConfig:
    """How input and reconstruction become an anomaly map and a score. The defaults are the paper's."""

    symmetric: bool = False  # add the distance of every reconstruction patch to its nearest input patch
    window: Annotated[int, Field(ge=0)] | None = None  # pixels around a place where its nearest patch is sought; None = the whole image
    pixel_weight: float = 0.0  # v: share of the pixel difference, relative to the map's own maximum
    blur_sigma: float = 6.0  # Gaussian blur of the map, pixels
    blur_kernel: int = 49  # its support, pixels, odd
    top_k: int = 250  # pixels averaged into the image score


def patch_distance(features: Tensor, others: Tensor, radius: int | None = None) -> Tensor:
    """Distance of every patch to its nearest patch of the other image: ``min_j (1 - cos(F_i, G_j))``, in [0, 2].

    With a radius only patches that lie at most so many rows and columns away are looked at; the paper looks at all.
    ``[B, D, h, w]``, F, and ``[B, D, h', w']``, G -> ``[B, 1, h, w]``; with a radius both are of one size.
    """
    height, width = features.shape[-2:]
    if radius is None or radius >= max(height, width) - 1:  # all are within it
        f, g = F.normalize(features.flatten(2), dim=1), F.normalize(others.flatten(2), dim=1)
        nearest = torch.bmm(f.transpose(1, 2), g).amax(dim=2)
        return (1 - nearest).view(len(features), 1, height, width)
    f, g = F.normalize(features, dim=1), F.pad(F.normalize(others, dim=1), (radius,) * 4, mode="replicate")
    closest = features.new_full((len(features), 1, height, width), -1.0)
    for y in range(2 * radius + 1):
        for x in range(2 * radius + 1):
            closest = torch.maximum(closest, (f * g[..., y : y + height, x : x + width]).sum(dim=1, keepdim=True))
    return 1 - closest


def gaussian_blur(x: Tensor, sigma: float, kernel: int) -> Tensor:
    """Separable Gaussian blur of ``[B, C, H, W]`` with reflected borders. The support shrinks where the image is smaller than it."""
    for dim in (3, 2):
        radius = min(kernel // 2, x.shape[dim] - 1)
        offset = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        weight = torch.exp(-0.5 * (offset / sigma) ** 2)
        weight = (weight / weight.sum()).view((1, 1, 1, -1) if dim == 3 else (1, 1, -1, 1)).expand(x.shape[1], -1, -1, -1)
        pad = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), weight, groups=x.shape[1])
    return x


def soft_foreground(mask: Tensor, config: ScoringConfig) -> Tensor:
    """The published scoring weight of a foreground mask: blurred, binarised at > 0 and blurred again.

    ``[B, 1, H, W]`` in {0, 1} or bool -> float in [0, 1]. The part itself and a margin of a kernel's radius around it keep full weight,
    and the ground fades to 0.
    """
    weight = mask if mask.is_floating_point() else mask.float()
    grown = gaussian_blur(weight, config.blur_sigma, config.blur_kernel) > 0
    return gaussian_blur(grown.to(weight.dtype), config.blur_sigma, config.blur_kernel)


def anomaly_map(
    features: Sequence[Tensor],
    reconstruction_features: Sequence[Tensor],
    size: tuple[int, int],
    config: ScoringConfig,
    *,
    pixel_difference: Tensor | None = None,
    foreground: Tensor | None = None,
) -> Tensor:
    """Where input and reconstruction differ (section 3.5).

    Args:
        features: One ``[B, D, h, w]`` per layer, of the input.
        reconstruction_features: The same layers of the reconstruction.
        size: ``(H, W)`` of the map.
        config: Options; each term can be switched off.
        pixel_difference: ``[B, 1, H, W]`` >= 0, used when ``pixel_weight`` is not 0. Scaled by its own and the map's maximum *per image*.
        foreground: ``[B, 1, H', W']`` in [0, 1]: how much each place counts, see `soft_foreground`. Multiplies the blurred map.

    Returns:
        ``[B, 1, H, W]`` >= 0.
    """
    total = features[0].new_zeros(len(features[0]), 1, *size)
    for f, g in zip(features, reconstruction_features, strict=True):
        radius = None if config.window is None else round(config.window * f.shape[-1] / size[1])
        distances = [patch_distance(*pair, radius) for pair in ((f, g), (g, f))[: 1 + config.symmetric]]
        for distance in distances:
            total = total + F.interpolate(distance, size, mode="bilinear", align_corners=True)
    if config.pixel_weight and pixel_difference is not None:
        ratio = total.amax((1, 2, 3), keepdim=True) / pixel_difference.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        total = total + config.pixel_weight * ratio * pixel_difference
    total = gaussian_blur(total, config.blur_sigma, config.blur_kernel)
    if foreground is not None:
        total = total * F.interpolate(foreground.to(total.dtype), size, mode="bilinear")
    return total


def image_score(maps: Tensor, config: ScoringConfig) -> Tensor:
    """Mean of the ``top_k`` largest pixels: ``[B, 1, H, W] -> [B]``; higher is more anomalous."""
    return top_k_mean(maps, config.top_k)
