"""Pictures for people: heat maps, overlays and thumbnails. Pillow and NumPy only.

Maps are in units of the decision threshold: 1 is the threshold, and the colour scale ends at `VMAX`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gladad.core.records import Region

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

OUTLINE, BOX = (0, 230, 255), (255, 255, 255)

_SCALE = json.loads(files("gladad.report").joinpath("colours.json").read_text(encoding="utf-8"))  # the console's, too
VMAX = float(_SCALE["vmax"])  # map value at the top of the colour scale: twice the threshold
# Red, green, blue: dark to light at an even pace, from black over violet and orange to pale yellow, so that it reads in grey as well.
COLOURS: Pixels = np.stack([np.interp(np.linspace(0, 8, 256), range(9), row) for row in _SCALE["channels"]], axis=1).astype(np.uint8)


def heatmap(values: NDArray[np.floating]) -> Pixels:
    """Colour a map ``[H, W]`` as ``[H, W, 3]`` uint8: 0 and less is the darkest colour, `VMAX` and more the lightest.

    Raises:
        ValueError: A value is NaN, which must not look normal.
    """
    if np.isnan(values).any():
        raise ValueError("a map must not hold NaN")
    level = np.asarray(values, dtype=np.float64) / VMAX
    return np.asarray(COLOURS[np.rint(level.clip(0, 1) * 255).astype(np.uint8)])


def overlay(pixels: Pixels, anomaly_map: NDArray[np.floating], mask: Mask | None = None, regions: Iterable[Region] = ()) -> Pixels:
    """Lay a map over a copy of its image: untouched below half of the threshold, ever more colour above.

    Args:
        pixels: ``[H, W, 3]`` uint8.
        anomaly_map: ``[H, W]`` of the same size.
        mask: ``[H, W]`` bool, drawn as an outline.
        regions: Drawn as boxes.

    Raises:
        ValueError: The sizes differ, or a value is NaN.
    """
    for array in (anomaly_map, mask):
        if array is not None and array.shape != pixels.shape[:2]:
            raise ValueError(f"sizes differ: image {list(pixels.shape[:2])}, map or mask {list(array.shape)}")
    strength = 0.75 * (anomaly_map - 0.5).clip(0, 1)[..., None]
    blended = np.rint((1 - strength) * pixels + strength * heatmap(anomaly_map)).astype(np.uint8)
    width = max(1, round(max(pixels.shape[:2]) / 300))  # so that lines are still seen in a thumbnail
    if mask is not None:
        blended[mask & ~_eroded(mask, width)] = OUTLINE
    picture = Image.fromarray(blended)
    draw = ImageDraw.Draw(picture)
    for region in regions:
        left, top, right, bottom = region.box
        draw.rectangle((left, top, right - 1, bottom - 1), outline=BOX, width=width)
    return np.array(picture)


def _eroded(mask: Mask, times: int) -> Mask:
    """The mask without its outermost pixels; the border of the image counts as outside."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG of ``[H, W, 3]`` or grey ``[H, W]`` uint8, packed fast rather than small."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def thumbnail(pixels: Pixels, side: int) -> Pixels:
    """Shrink ``[H, W, 3]`` uint8 so that the longer side is at most ``side`` pixels; never enlarge."""
    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
