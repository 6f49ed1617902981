"""Features of several strides on one grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gladad.core.errors import ConfigError
from gladad.features.extractor import Extractor

CELL = 8
"""Pixels per side of a grid cell, as nearly as an extractor's strides allow."""
SIDES = (256, 384)
"""Sides of squares of as few and as many pixels as features are computed of, unless a size is asked for."""


class FeatureStack:
    """The levels of an extractor for images of ``(H, W)`` pixels, stacked on one grid.

    Every level is averaged over 3x3 of its own cells first: single-cell noise of textures is not what distinguishes a part. The extractor
    may be of any dtype and device.

    Raises:
        ConfigError: The image size does not suit the extractor.
    """

    def __init__(self, extractor: Extractor, image_size: tuple[int, int]):
        self.extractor = extractor
        self.cell = cell_size(extractor)
        multiple = size_multiple(extractor)
        if any(side % multiple or side < 2 * multiple for side in image_size):
            needed = f"two multiples of {multiple}, each at least {2 * multiple}"
            raise ConfigError(f"image_size must be {needed} for the features of {extractor.identity.name}, not {image_size}")
        self.grid = (image_size[0] // self.cell, image_size[1] // self.cell)
        self.channels = sum(level.channels for level in extractor.levels)

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1], on the extractor's device -> ``[B, channels, h, w]`` float32."""
        levels, expected = self.extractor(images), [level.channels for level in self.extractor.levels]
        if (channels := [level.shape[1] for level in levels]) != expected:
            name = self.extractor.identity.name
            raise ConfigError(f"features: {name} gives maps of {channels} channels, and says in its levels that they have {expected}")
        pooled = [F.avg_pool2d(level.float(), 3, 1, 1, count_include_pad=False) for level in levels]
        return torch.cat([_to_grid(level, self.grid) for level in pooled], dim=1)


def cell_size(extractor: Extractor) -> int:
    """Pixels per side of a grid cell: the stride nearest to `CELL`."""
    return min((level.stride for level in extractor.levels), key=lambda stride: abs(stride - CELL))


def size_multiple(extractor: Extractor) -> int:
    """Image sides are multiples of this: every stride divides them, and they have an even number of cells."""
    return math.lcm(extractor.size_multiple, 2 * cell_size(extractor))


def _to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    if x.shape[-1] > grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    return x if x.shape[-2:] == grid else F.interpolate(x, grid, mode="bilinear", align_corners=False)


def working_size(native: tuple[float, float], side: int | None, multiple: int) -> tuple[int, int]:
    """The ``(H, W)`` in multiples of ``multiple`` to work at, for images of ``(H, W)`` pixels: about their own, within `SIDES`.

    Enlarged images cost more and show no more detail; reduced ones lose small defects.

    Args:
        native: ``(H, W)`` of a typical image; its proportions are kept.
        side: Asks for about ``side**2`` pixels instead.
        multiple: Of the extractor.
    """
    height, width = native
    if side is None:
        side = round(min(max(SIDES[0], math.sqrt(height * width)), SIDES[1]))
    return size_for_aspect(width / height, side, multiple)


def size_for_aspect(aspect: float, side: int, multiple: int) -> tuple[int, int]:
    """The ``(H, W)`` in multiples of ``multiple`` with about ``side**2`` pixels that best keeps a width-to-height ratio.

    It never has more pixels, unless ``side`` is below the smallest size, two multiples a side.
    """

    def error(size: tuple[int, int]) -> float:
        height, width = size
        return round(abs(math.log(width / height / aspect)) + 0.5 * math.log(side * side / (height * width)), 9)

    sides = range(2 * multiple, 8 * side, multiple)
    sizes = ((height, width) for height in sides for width in sides if height * width <= side * side)
    return min(sizes, key=error, default=(2 * multiple, 2 * multiple))
