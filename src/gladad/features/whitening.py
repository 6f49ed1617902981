"""Names of the time when EfficientNet-Lite0 was the only extractor: goes with the next commit."""

from __future__ import annotations

from torch import Tensor

from gladad.features import space, stack
from gladad.features.efficientnet import EfficientNetLite0

CELL = 8
_STACK = stack.FeatureStack(EfficientNetLite0(), (64, 64))
SIDE_MULTIPLE = _STACK.size_multiple
FEATURE_CHANNELS = _STACK.channels
LEVELS = _STACK.levels


def size_for_aspect(aspect: float, side: int) -> tuple[int, int]:
    """Goes with the next commit."""
    return stack.size_for_aspect(aspect, side, SIDE_MULTIPLE)


def stack_features(trunk: EfficientNetLite0, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Goes with the next commit."""
    return stack.FeatureStack(trunk, (CELL * grid[0], CELL * grid[1]))(images)


class FeatureSpace(space.FeatureSpace):
    """Goes with the next commit."""

    def __init__(self, dimensions: int, whitening: float):
        super().__init__(FEATURE_CHANNELS, dimensions, whitening)
