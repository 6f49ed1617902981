"""Learning from a handful of good images: each is shown in several slightly moved and re-lit copies.

The copies widen what the model takes for normal, and give the calibration more than one score per image. They are no further parts: the
threshold says how many images it really saw, and never claims a guarantee because of copies (`conformal_threshold`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from gladad.data.synthesis import Draw

Pixels = NDArray[np.uint8]

FEW = 12  # below this many good images copies are made
TRAINED = 24  # images, copies included, that a training gets at least
SCORED = 4  # pictures of each image, itself included, that the calibration scores
MAX_ROTATION, MAX_SHIFT, MAX_LIGHT = 4.0, 0.03, 0.1  # of a copy: degrees, share of the side, relative change of brightness and contrast


def with_copies(images: Sequence[Pixels], seed: int) -> list[Pixels]:
    """The images ``[H, W, 3]`` uint8 and as many copies as make them `TRAINED`, evenly spread over them."""
    return [*images, *(_copy(images[i % len(images)], Draw((seed, 0, i))) for i in range(TRAINED - len(images)))]


def moved_copies(images: Sequence[Pixels], seed: int) -> list[Pixels]:
    """Every image followed by `SCORED` - 1 copies that `with_copies` does not make."""
    return [copy for i, image in enumerate(images) for copy in (image, *(_copy(image, Draw((seed, 1, i, k))) for k in range(1, SCORED)))]


def _copy(pixels: Pixels, draw: Draw) -> Pixels:
    """One image moved and re-lit, with mirrored borders."""
    height, width = pixels.shape[:2]
    angle = np.deg2rad(draw.uniform(-MAX_ROTATION, MAX_ROTATION))
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    shift = np.array([draw.uniform(-MAX_SHIFT, MAX_SHIFT) * height, draw.uniform(-MAX_SHIFT, MAX_SHIFT) * width])
    offset = centre - matrix @ (centre + shift)
    channels = np.moveaxis(pixels.astype(np.float32), 2, 0)
    moved = np.stack([ndimage.affine_transform(channel, matrix, offset, order=1, mode="mirror") for channel in channels], axis=2)
    gain, brightness = 1 + draw.uniform(-MAX_LIGHT, MAX_LIGHT), 1 + draw.uniform(-MAX_LIGHT, MAX_LIGHT)
    mean = moved.mean()
    return np.asarray(np.rint(((moved - mean) * gain + mean * brightness).clip(0, 255)), dtype=np.uint8)
