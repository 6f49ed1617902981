"""Pictures of reconstructions, for people."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gladad.core.images import resize_map, resize_pixels

Pixels = NDArray[np.uint8]


def where_anomalous(rebuilt: Pixels, pixels: Pixels, maps: NDArray[np.float32]) -> Pixels:
    """The rebuilt part where a map is near its threshold or above it, the part itself elsewhere.

    Args:
        rebuilt: ``[h, w, 3]`` uint8.
        pixels: ``[H, W, 3]`` uint8, the part.
        maps: ``[h', w']`` in units of the threshold.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    size = (pixels.shape[0], pixels.shape[1])
    share = ((resize_map(maps, size) - 0.6) / 0.4).clip(0, 1)[..., None]
    return np.rint(share * resize_pixels(rebuilt, size) + (1 - share) * pixels).astype(np.uint8)
