"""Shifts of test images: the same parts under other light, focus, noise, compression or position, in five severities.

Names, definitions and constants of the photometric shifts are those of ImageNet-C (D. Hendrycks and T. Dietterich, "Benchmarking neural
network robustness to common corruptions and perturbations", ICLR 2019); ``darkness`` is their brightness downwards. The two geometric
shifts are ours. What differs: lengths of the blurs, published for 224 pixels, grow with the image's shorter side (noise and JPEG act on
pixels and blocks of 8x8 at any size, as a sensor and a file do: resize first to compare with others); motion blur is centred, so that a
part stays under its mask; levels are rounded to the nearest. Everything random comes from the seed, and is the same in all severities.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from gladad.core.errors import ConfigError

Pixels = NDArray[np.uint8]
SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 224  # shorter side in pixels for which the published lengths are meant


def corrupt(pixels: Pixels, name: str, severity: int, seed: int | Sequence[int]) -> Pixels:
    """The image under one shift; the same arguments give the same result.

    Args:
        pixels: ``[H, W, 3]`` uint8, and so is the result, a new array.
        name: A key of `SHIFTS`.
        severity: 1 (mild) to 5 (heavy).
        seed: One number >= 0 or several; decides noise and directions. Give every image one of its own.

    Raises:
        ConfigError: The name is unknown, or the severity is not 1...5.
    """
    if name not in SHIFTS:
        raise ConfigError(f"unknown shift {name!r}; known are {', '.join(SHIFTS)}")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity!r} of {name}: must be 1, 2, 3, 4 or 5")
    apply, strengths = SHIFTS[name]
    return apply(pixels, strengths[severity - 1], np.random.default_rng(seed))


def _to_pixels(levels: NDArray[np.floating[Any]]) -> Pixels:
    return np.asarray(np.rint(levels.clip(0, 255)), dtype=np.uint8)


def brightness(pixels: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    """Add ``amount`` in [-1, 1] to the value of HSV, which scales the three channels of a pixel alike."""
    value = pixels.max(axis=2, keepdims=True).astype(np.float64)
    lit = (value + 255 * amount).clip(0, 255)
    return _to_pixels(np.where(value > 0, pixels * (lit / value.clip(1)), lit))


def contrast(pixels: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Scale the distance of every level to its channel's mean by ``factor`` in [0, 1]."""
    mean = pixels.mean(axis=(0, 1))
    return _to_pixels((pixels - mean) * factor + mean)


def gaussian_noise(pixels: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Add independent normal noise to every level; ``sigma`` as a share of full scale."""
    return _to_pixels(pixels + rng.standard_normal(pixels.shape) * (255 * sigma))


def gaussian_blur(pixels: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Blur by a Gaussian of ``sigma`` reference pixels."""
    sigma *= _scale(pixels)
    return _to_pixels(ndimage.gaussian_filter(pixels.astype(np.float64), (sigma, sigma, 0), mode="nearest"))


def defocus_blur(pixels: Pixels, disk: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """Blur by a disk; ``disk`` is its radius in reference pixels, and the sigma in pixels that smooths its edge."""
    radius, edge = disk[0] * _scale(pixels), disk[1]
    support = math.ceil(radius) + 2
    y, x = np.mgrid[-support : support + 1, -support : support + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(np.float64)
    return _convolve(pixels, ndimage.gaussian_filter(kernel, edge, mode="constant", radius=2 if radius > 8 else 1))


def motion_blur(pixels: Pixels, streak: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """Blur along a line within 45 degrees of the horizontal: a streak (half its length, sigma of its fading) about its centre of mass."""
    angle = math.radians(rng.uniform(-45, 45))
    half, sigma = (length * _scale(pixels) for length in streak)
    along = np.arange(math.floor(2 * half) + 1, dtype=np.float64)
    weight = np.exp(-0.5 * (along / max(sigma, 1e-6)) ** 2)
    along -= np.average(along, weights=weight)
    support = math.ceil(np.abs(along).max()) + 1
    kernel = np.zeros((2 * support + 1, 2 * support + 1))
    y, x = support - along * math.sin(angle), support - along * math.cos(angle)
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    for dy, share_y in ((0, row + 1 - y), (1, y - row)):  # each point is shared among its four pixels
        for dx, share_x in ((0, column + 1 - x), (1, x - column)):
            np.add.at(kernel, (row + dy, column + dx), weight * share_y * share_x)
    return _convolve(pixels, kernel)


def jpeg_compression(pixels: Pixels, quality: int, rng: np.random.Generator) -> Pixels:
    """Through a JPEG file of ``quality`` 1...100 and back."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))


def _scale(pixels: Pixels) -> float:
    return float(min(pixels.shape[:2])) / REFERENCE_SIDE


def _convolve(pixels: Pixels, kernel: NDArray[np.float64]) -> Pixels:
    """Convolve every channel with an odd square kernel, scaled to a sum of 1, with mirrored borders."""
    from scipy import signal  # late, as it takes half a second

    pad = len(kernel) // 2
    padded = np.pad(pixels.astype(np.float64), ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    return _to_pixels(signal.oaconvolve(padded, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1)))


def rotation(pixels: Pixels, degrees: float, rng: np.random.Generator) -> Pixels:
    """Turn about the centre by ``degrees``, either way; bilinear, with mirrored borders."""
    degrees *= _sign(rng)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.array([[cos, sin], [-sin, cos]])
    centre = (np.array(pixels.shape[:2]) - 1) / 2
    channels = np.moveaxis(pixels.astype(np.float64), 2, 0)
    turned = [ndimage.affine_transform(channel, matrix, centre - matrix @ centre, order=1, mode="mirror") for channel in channels]
    return _to_pixels(np.stack(turned, axis=2))


def translation(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """Move by ``share`` of each side, either way along each, with mirrored borders; whole pixels, and at least one unless it is 0."""
    out = pixels
    for axis in (0, 1):
        side, sign = pixels.shape[axis], _sign(rng)
        move = sign * max(1, round(share * side)) if share else 0
        pad = [(abs(move), abs(move)) if a == axis else (0, 0) for a in range(3)]
        start = abs(move) - move
        out = np.pad(out, pad, mode="reflect").take(range(start, start + side), axis=axis)
    return out


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


# Every shift by its name: what it does to an image, and how strongly in severity 1...5.
SHIFTS: dict[str, tuple[Callable[[Pixels, Any, np.random.Generator], Pixels], Sequence[Any]]] = {
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "darkness": (brightness, (-0.1, -0.2, -0.3, -0.4, -0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
    "rotation": (rotation, (1, 2, 3, 5, 10)),
    "translation": (translation, (0.01, 0.02, 0.03, 0.05, 0.1)),
}
