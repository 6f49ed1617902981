"""Where the part is in an image: the side of Otsu's threshold that it lies on, and how to see from normal images which one that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from gladad.core.errors import DataError

Foreground = Literal["all", "bright", "dark"]
Pixels = NDArray[np.uint8]

# An image shows a part before a ground when all of these hold. One Gaussian has a separation of 0.64, an even ramp of 0.75.
MIN_SEPARATION = 0.8  # of Otsu's classes
MIN_CONTRAST = 16.0  # grey levels between their means
MIN_BORDER = 0.9  # share of the image's border that is ground
MIN_SIDE = 0.75  # the same of each of its four sides: a thread or a clamp may cross it
MAX_UNEVENNESS = 0.2  # standard deviation of the ground, as a share of the contrast
PART_SHARE = (0.01, 0.85)  # of the image that is not ground
PIECES, MIN_GATHERED = 8, 0.9  # this many pieces hold at least this share of the part
# And the set does when this share of its images agrees, and parts are alike in size.
MIN_AGREEMENT = 0.9
MAX_SPREAD = 1.0  # 10 % to 90 % quantile of the part's share, relative to its median
MASK_SIDE, BORDER = 128, 3  # the shape of a mask is judged at this side, and its border is this wide, pixels


def foreground_mask(pixels: Pixels, foreground: Foreground) -> NDArray[np.bool_] | None:
    """Where the part is: Otsu's threshold on the grey image. None means the whole image, as it does where all of it is one grey.

    Args:
        pixels: ``[H, W, 3]`` uint8.
        foreground: ``bright`` part on dark ground, ``dark`` part on bright ground, or ``all``.
    """
    above = None if foreground == "all" else _bright_side(_grey(pixels))
    return ~above if above is not None and foreground == "dark" else above


def _grey(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _bright_side(grey: Pixels) -> NDArray[np.bool_] | None:
    """What lies above the level that maximises the variance between the two classes; None where there is but one level."""
    from skimage.filters import threshold_otsu

    return None if grey.min() == grey.max() else np.asarray(grey > threshold_otsu(grey))


@dataclass(frozen=True, kw_only=True)
class ForegroundChoice:
    """Which part of the images is the part, and why."""

    foreground: Foreground  # what `foreground_mask` is to take
    reason: str  # one sentence for people
    separation: float  # Otsu's criterion, the median over images: share of the grey levels' variance that lies between the two classes
    share: float  # of the image that the part takes, the median over images; 1 with "all"


def choose_foreground(images: Sequence[Pixels]) -> ForegroundChoice:
    """Decide from normal images whether a part stands before an even ground, and whether it is the brighter or the darker side.

    When in doubt it is ``all``: textures, parts that fill the image, and uneven light. The order of the images does not matter.

    Args:
        images: ``[H, W, 3]`` uint8 normal images, of any sizes. What is judged are the masks that `foreground_mask` would give.

    Raises:
        DataError: There are no images.
    """
    if not len(images):
        raise DataError("choosing a foreground needs at least one image")
    splits = [_split(pixels) for pixels in images]
    of = {name: np.array([split[name] for split in splits]) for name in splits[0]}
    median = {name: float(np.median(values)) for name, values in of.items()}
    failures = [
        (of["contrast"] < MIN_CONTRAST, f"there is no contrast (the classes of Otsu differ by {median['contrast']:.0f} of 255 levels)"),
        (of["separation"] < MIN_SEPARATION, f"Otsu separates only {median['separation']:.0%} of the variance"),
        (of["border"] < MIN_BORDER, f"the ground would hold only {median['border']:.0%} of the border"),
        (of["side"] < MIN_SIDE, f"on one side the ground would hold only {median['side']:.0%} of the border"),
        (of["unevenness"] > MAX_UNEVENNESS, f"the ground would vary by {median['unevenness']:.0%} of its contrast to the part"),
        ((of["share"] < PART_SHARE[0]) | (of["share"] > PART_SHARE[1]), f"the part would take {median['share']:.0%} of the image"),
        (of["gathered"] < MIN_GATHERED, f"only {median['gathered']:.0%} of the part would lie in its {PIECES} largest pieces"),
    ]
    fits = ~np.any([failed for failed, _ in failures], axis=0)
    bright, dark = float(np.mean(fits & (of["bright"] > 0))), float(np.mean(fits & (of["bright"] == 0)))
    low, high = np.quantile(of["share"], (0.1, 0.9))
    doubts = [
        *((failed.mean() > 0.5, why) for failed, why in failures),
        (max(bright, dark) < MIN_AGREEMENT, f"{bright:.0%} of the images show a bright part, {dark:.0%} a dark one"),
        (high - low > MAX_SPREAD * median["share"], f"the part would take {low:.0%} of some images and {high:.0%} of others"),
    ]
    if why := next((why for doubtful, why in doubts if doubtful), None):
        reason = f"the whole image, as no part stands before an even ground: {why}"
        return ForegroundChoice(foreground="all", reason=reason, separation=median["separation"], share=1.0)
    side: Foreground = "bright" if bright > dark else "dark"
    other = "dark" if side == "bright" else "bright"
    shown = f"Otsu separates {median['separation']:.0%} of the variance, the ground holds {median['border']:.0%} of the border"
    reason = f"a {side} part on an even {other} ground: {shown}"
    return ForegroundChoice(foreground=side, reason=reason, separation=median["separation"], share=median["share"])


def _split(pixels: Pixels) -> dict[str, float]:
    """How Otsu's threshold splits an image, the class that most of the border belongs to being the ground; ``bright``: 1 if the part is."""
    grey = _grey(pixels)
    above = _bright_side(grey)
    if above is None:
        return {"bright": 0, "separation": 0, "contrast": 0, "border": 1, "side": 1, "unevenness": 0, "share": 0, "gathered": 0}
    levels = np.bincount(grey[above], minlength=256), np.bincount(grey[~above], minlength=256)
    (bright_mean, bright_std), (dark_mean, dark_std) = map(_moments, levels)
    contrast, weight = bright_mean - dark_mean, float(above.mean())
    between = weight * (1 - weight) * contrast**2
    within = weight * bright_std**2 + (1 - weight) * dark_std**2

    small = Image.fromarray(above).convert("L").resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BOX)
    shape = np.asarray(small) > 127
    ring = np.ones_like(shape)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    bright = bool(shape[ring].mean() <= 0.5)  # the border is dark
    ground = shape != bright
    sides = (ground[:BORDER], ground[-BORDER:], ground[:, :BORDER], ground[:, -BORDER:])
    pieces, count = ndimage.label(~ground)
    areas = np.sort(np.bincount(pieces.ravel(), minlength=count + 1)[1:])[::-1]
    return {
        "bright": bright,
        "separation": between / (between + within),
        "contrast": contrast,
        "border": float(ground[ring].mean()),
        "side": float(min(side.mean() for side in sides)),
        "unevenness": (dark_std if bright else bright_std) / contrast,
        "share": weight if bright else 1 - weight,
        "gathered": float(areas[:PIECES].sum() / max(1, areas.sum())),
    }


def _moments(histogram: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation of the levels counted in a histogram."""
    levels = np.arange(len(histogram))
    mean = float(np.average(levels, weights=histogram))
    return mean, float(np.average((levels - mean) ** 2, weights=histogram)) ** 0.5
