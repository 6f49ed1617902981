"""Synthetic anomalies for training and for calibration: a random mask, something foreign inside it, the normal image outside.

The published recipe (paper, section 3.3, after DRAEM): Perlin-noise masks, and inside them a texture image or the image's own shuffled
tiles under three random colour augmentations. Two things are added, and can be switched off: small local blobs, because many real defects
are much smaller, and two more sources (the image itself shifted and re-lit; a flat colour). A sample depends on its seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from gladad.core.settings import validated
from gladad.data.foreground import Foreground, Pixels, foreground_mask


@validated
class SynthesisConfig:
    """How synthetic anomalies look."""

    perlin_scales: tuple[int, int] = (0, 5)  # noise cells per axis are 2^k, k uniform in this closed range
    perlin_threshold: float = 0.3  # Perlin noise in about [-1, 1] above which the mask is set
    rotation: float = 90.0  # degrees, masks are rotated by up to +- this
    max_beta: float = 0.8  # largest share of the original inside the mask
    local_share: float = 0.0  # probability of a few small blobs instead of a Perlin mask
    local_radius: tuple[float, float] = (0.012, 0.25)  # blob radius, as a share of the shorter side
    source_weights: tuple[float, float, float, float] = (0.5, 0.5, 0.0, 0.0)  # texture, shuffled tiles, shifted self, flat colour
    augmentations: int = 3  # random colour or geometry changes of a texture or tile source


# The mix used for the ``lite`` base: half of the masks are small, and half of the sources stay close to the part's own look.
LITE = SynthesisConfig(local_share=0.5, perlin_scales=(1, 5), source_weights=(0.35, 0.2, 0.3, 0.15), augmentations=1)


class Draw:
    """Random numbers of a seed: one or several numbers >= 0, such as a training's and a sample's. No two different ones draw the same."""

    def __init__(self, seed: int | Sequence[int]):
        numbers = (seed,) if isinstance(seed, int) else tuple(seed)
        # NumPy fills up with zeros: (1, 2) and (1, 2, 0) would be one. Pairs are as they are; others have their length as a part.
        self.rng = np.random.default_rng(np.random.SeedSequence(numbers, spawn_key=() if len(numbers) == 2 else (len(numbers),)))

    def uniform(self, low: float, high: float) -> float:
        """Uniform in ``[low, high)``."""
        return float(self.rng.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """Uniform in the closed range."""
        return int(self.rng.integers(low, high + 1))


def perlin_noise(size: tuple[int, int], cells: tuple[int, int], draw: Draw) -> NDArray[np.float32]:
    """Perlin noise ``[H, W]`` of about [-1, 1] over a lattice of ``cells`` (K. Perlin, 2002: quintic fade)."""
    angle = draw.rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    gy, gx = np.sin(angle), np.cos(angle)
    ys = np.linspace(0, cells[0], size[0], endpoint=False, dtype=np.float32)
    xs = np.linspace(0, cells[1], size[1], endpoint=False, dtype=np.float32)
    yi, xi = ys.astype(np.int64), xs.astype(np.int64)
    fy, fx = (ys - yi)[:, None], (xs - xi)[None, :]

    def corner(dy: int, dx: int) -> NDArray[np.float32]:
        rows, columns = (yi + dy)[:, None], (xi + dx)[None, :]
        return np.asarray(gy[rows, columns] * (fy - dy) + gx[rows, columns] * (fx - dx))

    def fade(f: NDArray[np.float32]) -> NDArray[np.float32]:
        return f**3 * (f * (f * 6 - 15) + 10)

    u, v = fade(fy), fade(fx)
    top = corner(0, 0) * (1 - v) + corner(0, 1) * v
    bottom = corner(1, 0) * (1 - v) + corner(1, 1) * v
    return np.asarray((top * (1 - u) + bottom * u) * math.sqrt(2), dtype=np.float32)


def perlin_mask(size: tuple[int, int], config: SynthesisConfig, draw: Draw) -> NDArray[np.bool_]:
    """Thresholded, randomly rotated Perlin noise: ``[H, W]`` bool."""
    low, high = config.perlin_scales
    cells = (2 ** draw.integer(low, high), 2 ** draw.integer(low, high))
    noise = Image.fromarray(perlin_noise(size, cells, draw))
    turned = noise.rotate(draw.uniform(-config.rotation, config.rotation), Image.Resampling.BILINEAR)
    return np.asarray(turned) > config.perlin_threshold


def local_mask(size: tuple[int, int], config: SynthesisConfig, draw: Draw, foreground: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """One to three small ellipses with ragged edges, centred on the foreground: ``[H, W]`` bool."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    places = None if foreground is None else np.flatnonzero(foreground)
    for _ in range(draw.integer(1, 3)):
        if places is not None and len(places):
            cy, cx = divmod(int(places[draw.integer(0, len(places) - 1)]), width)
        else:
            cy, cx = draw.integer(0, height - 1), draw.integer(0, width - 1)
        low, high = (math.log(r * min(size)) for r in config.local_radius)
        radius, stretch, angle = math.exp(draw.uniform(low, high)), math.exp(draw.uniform(-1.2, 1.2)), draw.uniform(0, math.pi)
        y, x = np.arange(height)[:, None] - cy, np.arange(width)[None, :] - cx
        along = (x * math.cos(angle) + y * math.sin(angle)) / (radius * stretch**0.5)
        across = (-x * math.sin(angle) + y * math.cos(angle)) / (radius / stretch**0.5)
        cells = (2 ** draw.integer(3, 5), 2 ** draw.integer(3, 5))
        mask |= np.hypot(along, across) + 0.6 * perlin_noise(size, cells, draw) < 1
    return mask


def _change_gamma(image: Image.Image, draw: Draw) -> Image.Image:
    gamma = draw.uniform(0.5, 2.0)
    return image.point([round(255 * (level / 255) ** gamma) for level in range(256)] * 3)


def _shift_hue(image: Image.Image, draw: Draw) -> Image.Image:
    hsv = np.asarray(image.convert("HSV")).astype(np.int16)
    hsv[..., 0] = (hsv[..., 0] + draw.integer(-35, 35)) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] + draw.integer(-50, 50), 0, 255)
    return Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")


# Colour and geometry changes of a source image; each draws its own strength. The list is the published one.
AUGMENTATIONS: tuple[Callable[[Image.Image, Draw], Image.Image], ...] = (
    _change_gamma,
    lambda image, draw: ImageEnhance.Brightness(image).enhance(draw.uniform(0.8, 1.2)),
    lambda image, draw: ImageEnhance.Sharpness(image).enhance(draw.uniform(0.0, 3.0)),
    _shift_hue,
    lambda image, draw: ImageOps.solarize(image, draw.integer(32, 128)),
    lambda image, draw: ImageOps.posterize(image, draw.integer(2, 6)),
    lambda image, draw: ImageOps.invert(image),
    lambda image, draw: ImageOps.autocontrast(image),
    lambda image, draw: ImageOps.equalize(image),
    lambda image, draw: image.rotate(draw.uniform(-45, 45), Image.Resampling.BILINEAR),
)


def augment(pixels: Pixels, count: int, draw: Draw) -> Pixels:
    """Apply ``count`` different random augmentations."""
    image = Image.fromarray(pixels)
    for index in draw.rng.choice(len(AUGMENTATIONS), size=count, replace=False):
        image = AUGMENTATIONS[int(index)](image, draw)
    return np.asarray(image)


def shuffled_tiles(pixels: Pixels, draw: Draw, tiles: int = 8) -> Pixels:
    """The image cut into ``tiles`` x ``tiles`` pieces and shuffled; sides that do not divide keep a border."""
    height, width = pixels.shape[0] // tiles, pixels.shape[1] // tiles
    out = pixels.copy()
    pieces = [(row * height, column * width) for row in range(tiles) for column in range(tiles)]
    for (y, x), source in zip(pieces, draw.rng.permutation(len(pieces)), strict=True):
        sy, sx = pieces[int(source)]
        out[y : y + height, x : x + width] = pixels[sy : sy + height, sx : sx + width]
    return out


def shifted_self(pixels: Pixels, draw: Draw) -> Pixels:
    """The image moved by up to an eighth of its size and re-lit: content of the part, in the wrong place or light."""
    height, width = pixels.shape[:2]
    moved = np.roll(pixels, (draw.integer(-height // 8, height // 8), draw.integer(-width // 8, width // 8)), axis=(0, 1))
    lit = (moved.astype(np.float32) - 127.5) * draw.uniform(0.6, 1.4) + 127.5 + draw.uniform(-50, 50)
    return lit.clip(0, 255).astype(np.uint8)


def flat_colour(pixels: Pixels, draw: Draw) -> Pixels:
    """One colour, near grey, with a little grain."""
    grey = draw.uniform(0, 255)
    colour = grey + draw.rng.uniform(-38, 38, 3)
    grain = draw.rng.normal(0, 12, (*pixels.shape[:2], 1))
    return (colour + grain).clip(0, 255).astype(np.uint8)


def procedural_texture(size: tuple[int, int], draw: Draw) -> Pixels:
    """A random texture of ``(H, W)`` without any texture images: two colours blended by stripes, cells, grain or clouds of random scale."""
    high = max(1, int(math.log2(min(size))) - 1)
    cells = (2 ** draw.integer(1, high), 2 ** draw.integer(1, high))
    pattern = perlin_noise(size, cells, draw)
    kind = draw.integer(0, 3)
    if kind == 0:  # stripes, bent by the noise
        angle, period = draw.uniform(0, math.pi), draw.uniform(3, min(size) / 4)
        y, x = np.arange(size[0])[:, None], np.arange(size[1])[None, :]
        pattern = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period) + 2 * pattern).astype(np.float32)
    elif kind == 1:  # hard-edged patches
        pattern = np.sign(pattern - draw.uniform(-0.3, 0.3))
    elif kind == 2:  # grain
        pattern = (0.5 * pattern + 0.5 * draw.rng.normal(size=size)).astype(np.float32)
    first, second = draw.rng.uniform(0, 255, (2, 3)) if draw.uniform(0, 1) < 0.5 else draw.rng.uniform(0, 255, (2, 1)).repeat(3, axis=1)
    share = (0.5 + 0.5 * pattern).clip(0, 1)[..., None]
    return np.asarray(np.rint(share * first + (1 - share) * second), dtype=np.uint8)


def synthesise(
    pixels: Pixels, draw: Draw, config: SynthesisConfig, textures: Sequence[Pixels] = (), foreground: Foreground = "all"
) -> tuple[Pixels, NDArray[np.bool_]]:
    """Put one synthetic anomaly into a normal image.

    Args:
        pixels: ``[H, W, 3]`` uint8 normal image.
        draw: The sample's random numbers.
        config: How anomalies look.
        textures: ``[H, W, 3]`` images of the same size to take content from; without any, textures are generated.
        foreground: Where anomalies may appear.

    Returns:
        The image with the anomaly, and its mask ``[H, W]`` bool (never empty).
    """
    size = (pixels.shape[0], pixels.shape[1])
    allowed = foreground_mask(pixels, foreground)
    mask = np.zeros(size, dtype=bool)
    for attempt in range(8):
        local = attempt >= 4 or draw.uniform(0, 1) < config.local_share
        mask = local_mask(size, config, draw, allowed) if local else perlin_mask(size, config, draw)
        if allowed is not None and allowed.any():
            mask &= allowed
        if mask.any():
            break
    else:
        mask[size[0] // 2, size[1] // 2] = True

    weights = np.array(config.source_weights, dtype=np.float64)
    kind = int(draw.rng.choice(4, p=weights / weights.sum()))
    if kind == 0:
        texture = textures[draw.integer(0, len(textures) - 1)] if len(textures) else procedural_texture(size, draw)
        source = augment(texture, config.augmentations, draw)
    elif kind == 1:
        source = augment(shuffled_tiles(pixels, draw), config.augmentations, draw)
    elif kind == 2:
        source = shifted_self(pixels, draw)
    else:
        source = flat_colour(pixels, draw)

    beta = draw.uniform(0, config.max_beta)
    blended = beta * pixels.astype(np.float32) + (1 - beta) * source.astype(np.float32)
    return np.where(mask[..., None], np.rint(blended).astype(np.uint8), pixels), mask
