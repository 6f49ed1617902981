"""Registration of parts that stand before an even ground: every image is turned and cropped so that its part lies as all others do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from gladad.core.errors import ConfigError
from gladad.core.images import resize_pixels
from gladad.data.foreground import choose_foreground, foreground_mask

Pixels = NDArray[np.uint8]
SIDE = 256
"""Pixels of the longer side of the small images in which parts are located."""
ANGLES, RADII = 360, 64
"""Of the polar image by which parts are turned."""
SPECK = 0.01  # pieces of a mask below this share of it are no part
MARGIN = 0.05  # left around the part, as a share of its sides
ROUNDS = 2  # of averaging the template


@dataclass(frozen=True)
class Pose:
    """Where the part is in an image: centre ``(x, y)`` in pixels, and the angle in radians that it is turned by, clockwise as seen."""

    x: float
    y: float
    angle: float


@dataclass(frozen=True)
class Alignment:
    """How to find a part, and what of the image is kept.

    A part is located by the centroid of its side of Otsu's threshold, and turned by the rotation about it at which its polar image
    correlates best with the template.

    Attributes:
        foreground: The side of Otsu's threshold that the part lies on.
        template: ``[ANGLES, RADII]`` float32 mean polar image of the good parts, as they are turned after alignment.
        frame: What is kept, ``(left, top, right, bottom)`` relative to the centre and in units of the longer side of the image.
    """

    foreground: Literal["bright", "dark"]
    template: NDArray[np.float32]
    frame: tuple[float, float, float, float]

    @classmethod
    def learn(cls, images: Sequence[Pixels]) -> Alignment:
        """From ``[H, W, 3]`` uint8 normal images, of any sizes.

        Raises:
            ConfigError: They show no part before an even ground.
        """
        small = [_small(pixels) for pixels in images]
        choice = choose_foreground(small)
        if choice.foreground == "all":
            raise ConfigError(f"align: the parts cannot be located; {choice.reason}")
        parts = [_part(pixels, choice.foreground) for pixels in small]
        polar = [_polar(*part) for part in parts]
        template, angles = polar[0], [0.0] * len(polar)
        for _ in range(ROUNDS):
            angles = [_turn(each, template) for each in polar]
            template = np.mean([_turned(each, angle) for each, angle in zip(polar, angles, strict=True)], axis=0)
        # of all directions that the parts may be shown in, that of the smallest frame: its pixels are spent on the part
        outlines = [_outline(mask) for _, mask in parts]
        frames = [
            (_frame([_rotated(each, -angle - extra) for each, angle in zip(outlines, angles, strict=True)]), extra)
            for extra in np.deg2rad(np.arange(0, 180, 3))
        ]
        (left, top, right, bottom), extra = min(frames, key=lambda found: _area(found[0]))
        return cls(choice.foreground, _turned(template, extra).astype(np.float32), (left / SIDE, top / SIDE, right / SIDE, bottom / SIDE))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it, for files."""
        return {"bright": np.array(self.foreground == "bright"), "frame": np.array(self.frame), "template": self.template}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Alignment:
        """Undo `arrays`; raises KeyError or ValueError where they are none of an alignment."""
        left, top, right, bottom = arrays["frame"].tolist()
        template = arrays["template"].reshape(ANGLES, RADII)
        return cls("bright" if arrays["bright"] else "dark", template, (left, top, right, bottom))

    def locate(self, pixels: Pixels) -> Pose:
        """The part in ``[H, W, 3]`` uint8; an image of specks or of one colour is taken as it is."""
        height, width = pixels.shape[:2]
        if (mask := _mask(small := _small(pixels), self.foreground)) is None:
            return Pose((width - 1) / 2, (height - 1) / 2, 0.0)
        (y, x), angle = _centre(mask), _turn(_polar(_signal(small, mask), mask), self.template)
        return Pose((x + 0.5) * width / small.shape[1] - 0.5, (y + 0.5) * height / small.shape[0] - 0.5, angle)

    def size(self, height: float, width: float) -> tuple[float, float]:
        """``(h, w)`` in pixels of what is kept of images of such a size."""
        left, top, right, bottom = (each * max(height, width) for each in self.frame)
        return bottom - top, right - left

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        h, w = self.size(height, width)
        return max(8, round(h)), max(8, round(w))

    def apply(self, pixels: Pixels, pose: Pose) -> Pixels:
        """The part of ``[H, W, 3]`` uint8 as all others lie, cropped: ``[h, w, 3]``. Outside of the image is the ground's median colour."""
        height, width = pixels.shape[:2]
        h, w = self._whole_size(height, width)
        coarse = pixels[:: max(1, height // SIDE), :: max(1, width // SIDE)]
        mask = foreground_mask(coarse, self.foreground)
        ground = np.median(coarse.reshape(-1, 3) if mask is None else coarse[~mask], axis=0)
        moved = Image.fromarray(pixels).transform(
            (w, h),
            Image.Transform.AFFINE,
            self._into_image(pose, height, width),
            Image.Resampling.BILINEAR,
            fillcolor=tuple(int(level) for level in ground),
        )
        return np.asarray(moved)

    def restore(self, values: NDArray[Any], pose: Pose, size: tuple[int, int], default: NDArray[Any]) -> NDArray[Any]:
        """Undo `apply`.

        Args:
            values: ``[h, w]`` float32 or ``[h, w, 3]`` uint8, over the frame.
            pose: Of the part in the image.
            size: ``(H, W)`` of the image.
            default: ``[H, W]`` or ``[H, W, 3]``, outside of the frame.

        Returns:
            ``[H, W]`` or ``[H, W, 3]``, of the same type.
        """
        height, width = size
        h, w = self._whole_size(height, width)
        back = _inverse(self._into_image(pose, height, width))
        scaled = _scaled(back, values.shape[1] / w, values.shape[0] / h)
        moved = np.asarray(Image.fromarray(values).transform((width, height), Image.Transform.AFFINE, scaled, Image.Resampling.BILINEAR))
        whole = Image.new("L", (values.shape[1], values.shape[0]), 255)
        inside = np.asarray(whole.transform((width, height), Image.Transform.AFFINE, scaled, Image.Resampling.NEAREST)) > 0
        return np.where(inside[..., None] if moved.ndim == 3 else inside, moved, default).astype(values.dtype)

    def _into_image(self, pose: Pose, height: int, width: int) -> tuple[float, ...]:
        """Pillow's coefficients: from pixel corners of the frame to those of the image."""
        left, top = (each * max(height, width) for each in self.frame[:2])
        cos, sin = math.cos(pose.angle), math.sin(pose.angle)
        x, y = pose.x + 0.5, pose.y + 0.5
        return (cos, -sin, x + cos * left - sin * top, sin, cos, y + sin * left + cos * top)


def _small(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    return resize_pixels(pixels, (max(8, round(scale * height)), max(8, round(scale * width))))


def _mask(pixels: Pixels, foreground: Literal["bright", "dark"]) -> NDArray[np.bool_] | None:
    """Where the part is, without specks, and with its holes filled: a defect must not move it; None where there is nothing."""
    mask = foreground_mask(pixels, foreground)
    if mask is None:
        return None
    pieces, count = ndimage.label(mask)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = np.asarray((areas >= SPECK * areas.sum())[pieces] & mask)
    return np.asarray(ndimage.binary_fill_holes(kept)) if kept.any() else None


def _signal(pixels: Pixels, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Grey levels relative to the ground's, 0 outside of the part."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
    ground = float(np.median(grey[~mask])) if not mask.all() else 0.0
    return np.where(mask, grey - ground, 0).astype(np.float32)


def _part(pixels: Pixels, foreground: Literal["bright", "dark"]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    mask = _mask(pixels, foreground)
    mask = np.ones(pixels.shape[:2], dtype=bool) if mask is None else mask
    return _signal(pixels, mask), mask


def _centre(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """``(y, x)``."""
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


def _polar(signal: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """``[ANGLES, RADII]`` about the centroid, each radius weighted by the root of its circumference."""
    from skimage.transform import warp_polar

    polar = warp_polar(signal, _centre(mask), radius=SIDE / 2, output_shape=(ANGLES, RADII))
    return np.asarray(polar * np.sqrt(np.arange(RADII) + 0.5), dtype=np.float32)


def _turn(polar: NDArray[np.float32], template: NDArray[np.float32]) -> float:
    """The angle in radians by which a polar image is turned against the template, from the peak of their correlation."""
    spectrum = np.fft.rfft(polar, axis=0) * np.conj(np.fft.rfft(template, axis=0))
    likeness = np.fft.irfft(spectrum, ANGLES, axis=0).sum(axis=1)
    best = int(likeness.argmax())
    before, peak, after = likeness[best - 1], likeness[best], likeness[(best + 1) % ANGLES]
    curve = before - 2 * peak + after
    between = 0.5 * (before - after) / curve if curve < 0 else 0.0  # the vertex of a parabola
    return math.tau * (best + float(between)) / ANGLES


def _turned(polar: NDArray[Any], angle: float) -> NDArray[Any]:
    """A polar image turned back by an angle in radians."""
    return np.asarray(ndimage.shift(polar, (-angle * ANGLES / math.tau, 0), order=1, mode="grid-wrap"))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``[N, 2]`` pixels ``(x, y)`` of the part's border, relative to its centre."""
    y, x = _centre(mask)
    rows, columns = np.nonzero(mask & ~ndimage.binary_erosion(mask))
    return np.stack([columns - x, rows - y], axis=1)


def _rotated(points: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.asarray(points @ np.array([[cos, sin], [-sin, cos]]))


def _frame(outlines: Sequence[NDArray[np.float64]]) -> tuple[float, float, float, float]:
    """``(left, top, right, bottom)`` around nearly all of the parts, with a margin."""
    low = np.quantile([points.min(axis=0) for points in outlines], 0.01, axis=0)
    high = np.quantile([points.max(axis=0) for points in outlines], 0.99, axis=0)
    margin = MARGIN * (high - low) + 1
    (left, top), (right, bottom) = low - margin, high + margin
    return float(left), float(top), float(right), float(bottom)


def _area(frame: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = frame
    return (right - left) * (bottom - top)


def _inverse(affine: tuple[float, ...]) -> tuple[float, ...]:
    a, b, c, d, e, f = affine
    matrix = np.linalg.inv(np.array([[a, b, c], [d, e, f], [0, 0, 1]]))
    return tuple(float(value) for value in matrix[:2].ravel())


def _scaled(affine: tuple[float, ...], x: float, y: float) -> tuple[float, ...]:
    a, b, c, d, e, f = affine
    return (x * a, x * b, x * c, y * d, y * e, y * f)
