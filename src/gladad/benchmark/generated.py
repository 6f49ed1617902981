"""Products drawn by rule: parts that turn, that move, that vary in number, and fine binary patterns in many layouts.

Real collections hardly hold such products, and defaults chosen without them fail on them. Every picture follows from
(product, seed, index) alone. A defective picture is the good one of the same draw with one thing changed, so that its mask
is where the two renderings differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw
from scipy import ndimage

SIDE = 384
"""Width and height of a picture in pixels."""
_CANVAS = 2 * SIDE  # drawn twice as large and reduced, for smooth edges
_BLUR: NDArray[np.float64] = ndimage.gaussian_filter1d(np.eye(SIDE), SIDE / 8, axis=0)  # along a side; much faster than the filter itself
_VISIBLE = 12  # a pixel of the mask differs from the good rendering by more than this, of 255


@dataclass(frozen=True)
class Draws:
    """Independent random streams, so that a defect moves neither the part nor the grain."""

    layout: np.random.Generator
    grain: np.random.Generator
    flaw: np.random.Generator

    @classmethod
    def of(cls, *key: int) -> Draws:
        """The streams of a picture."""
        return cls(*(np.random.default_rng((*key, stream)) for stream in range(3)))

    def ground(self, level: float, grain: float) -> Image.Image:
        """Plain ground of a grey level with soft shading and grain."""
        soft = _BLUR @ self.grain.normal(size=(SIDE, SIDE)) @ _BLUR.T
        image: NDArray[np.float64] = level + 6 * soft / np.abs(soft).max() + self.grain.normal(0, grain, (SIDE, SIDE))
        return Image.fromarray(image.clip(0, 255).astype(np.uint8)).resize((_CANVAS, _CANVAS), Image.Resampling.BILINEAR)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _scratch(draw: ImageDraw.ImageDraw, draws: Draws, x: float, y: float, length: float, fill: int) -> None:
    angle = draws.flaw.uniform(0, math.pi)
    dx, dy = length / 2 * math.cos(angle), length / 2 * math.sin(angle)
    draw.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=5)


def bracket(draws: Draws, defect: str) -> Image.Image:
    """A drilled plate that lies at any angle."""
    part = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw = ImageDraw.Draw(part)
    middle, half = _CANVAS / 2, _CANVAS * 0.3
    draw.rounded_rectangle((middle - half, middle - half / 2, middle + half, middle + half / 2), 30, fill=170)
    draw.rounded_rectangle((middle - half, middle - half, middle - half / 3, middle + half / 2), 30, fill=170)
    holes = [(-0.75, -0.75), (-0.75, 0.0), (0.0, 0.0), (0.4, 0.0), (0.8, 0.25), (0.8, -0.25)]
    left_out = draws.flaw.integers(len(holes)) if defect == "hole" else -1
    for number, (x, y) in enumerate(holes):
        if number != left_out:
            _disc(draw, middle + x * half, middle + y * half, 16, 40)
    draw.line((middle - half / 4, middle + half / 3, middle + half * 0.9, middle + half / 3), fill=130, width=6)
    x, y = middle + draws.flaw.uniform(-0.2, 0.7) * half, middle + draws.flaw.uniform(-0.25, 0.25) * half
    if defect == "scratch":
        _scratch(draw, draws, x, y, 44, 215)
    if defect == "nick":
        _disc(draw, x, middle + half / 2, 14, 0)
    dx, dy = (int(step) for step in draws.layout.integers(-40, 41, 2))
    turned = part.rotate(draws.layout.uniform(0, 360), Image.Resampling.BICUBIC, translate=(dx, dy))
    return Image.composite(turned, draws.ground(70, 3), turned.point(lambda value: 255 * (value > 20)))


def tracks(draws: Draws, defect: str) -> Image.Image:
    """Conductor tracks in a layout of their own in every picture, almost black and white."""
    ground = draws.ground(40, 5)
    mask = Image.new("L", ground.size, 0)
    draw = ImageDraw.Draw(mask)
    step, runs = _CANVAS // 24, []
    for row in range(1, 24):
        column = int(draws.layout.integers(0, 4))
        while column < 23:
            end = min(23, column + int(draws.layout.integers(3, 12)))
            a, b = (column * step, row * step), (end * step, row * step)
            if draws.layout.random() < 0.75:
                draw.line((*a, *b), fill=255, width=9)
                if draws.layout.random() < 0.4:
                    draw.line((*b, b[0], b[1] + step), fill=255, width=9)
                for x, y in (a, b):
                    _disc(draw, x, y, 10, 255)
                runs.append((a, b))
            column = end + 1
    (left, y), (right, _) = runs[draws.flaw.integers(len(runs))]
    at = (left + right) / 2 + draws.flaw.uniform(-step / 3, step / 3)
    if defect == "open":
        draw.rectangle((at - 7, y - 8, at + 7, y + 8), fill=0)
    if defect == "short":
        draw.line((at, y, at, y + step), fill=255, width=8)
    if defect == "bite":
        _disc(draw, at, y + 4, 6, 0)
    return Image.composite(Image.new("L", ground.size, 205), ground, mask)


def tray(draws: Draws, defect: str) -> Image.Image:
    """Washers on a tray, in varying number, size and place."""
    picture = draws.ground(95, 3)
    draw = ImageDraw.Draw(picture)
    places = [(x, y) for x in range(4) for y in range(4)]
    draws.layout.shuffle(places)
    count = int(draws.layout.integers(5, 13))
    bad = draws.flaw.integers(count) if defect != "good" else -1
    for number, (column, row) in enumerate(places[:count]):
        x = (column + 0.5) * _CANVAS / 4 + draws.layout.uniform(-24, 24)
        y = (row + 0.5) * _CANVAS / 4 + draws.layout.uniform(-24, 24)
        radius = draws.layout.uniform(48, 64)
        _disc(draw, x, y, radius, 200)
        hole = 0.62 if number == bad and defect == "bore" else 0.45
        _disc(draw, x, y, radius * hole, 60)
        angle = draws.flaw.uniform(0, 2 * math.pi)
        at = x + 0.75 * radius * math.cos(angle), y + 0.75 * radius * math.sin(angle)
        if number == bad and defect == "crack":
            draw.line((x + 0.45 * radius * math.cos(angle), y + 0.45 * radius * math.sin(angle), *at), fill=120, width=5)
        if number == bad and defect == "stain":
            _disc(draw, *at, 11, 155)
    return picture


def label(draws: Draws, defect: str) -> Image.Image:
    """A printed label that is shifted by up to a tenth of the picture and lit unevenly."""
    part = Image.new("L", (_CANVAS, _CANVAS), 225)
    draw = ImageDraw.Draw(part)
    draw.rectangle((60, 60, _CANVAS - 60, _CANVAS - 60), outline=60, width=8)
    bars, glyphs = np.random.default_rng(0), np.random.default_rng(1)  # the print is the same on every label
    wrong = draws.flaw.integers(60) if defect == "print" else -1
    x = 110.0
    for number in range(60):
        width = float(bars.integers(3, 9))
        if number != wrong:
            draw.rectangle((x, 120, x + width, 330), fill=50)
        x += 9.2
    for line in range(6):
        for column in range(18):
            left, top = 110 + column * 30, 390 + line * 46
            for x0, y0, x1, y1 in glyphs.integers(0, 24, (3, 4)).tolist():
                draw.line((left + x0, top + y0, left + x1, top + y1), fill=50, width=4)
    if defect == "smear":
        _scratch(draw, draws, draws.flaw.uniform(150, 600), draws.flaw.uniform(150, 600), 60, 150)
    if defect == "spot":
        _disc(draw, draws.flaw.uniform(150, 600), draws.flaw.uniform(150, 600), 9, 110)
    dx, dy = (int(step) for step in draws.layout.integers(-_CANVAS // 12, _CANVAS // 12 + 1, 2))
    return ImageChops.multiply(ImageChops.offset(part, dx, dy), draws.ground(235, 3))


PRODUCTS: dict[str, tuple[Callable[[Draws, str], Image.Image], tuple[str, ...]]] = {
    "bracket": (bracket, ("hole", "nick", "scratch")),
    "label": (label, ("print", "smear", "spot")),
    "tracks": (tracks, ("bite", "open", "short")),
    "tray": (tray, ("bore", "crack", "stain")),
}
"""Each product's painter and its kinds of defects."""


def write(root: Path, product: str, *, train: int = 200, good: int = 40, defective: int = 30, seed: int = 0) -> Path:
    """Write one product in the MVTec layout below ``root`` and return its folder.

    ``train`` and ``good`` count good pictures for training and test, ``defective`` the pictures of each kind of defect.
    """
    paint, defects = PRODUCTS[product]
    key = sorted(PRODUCTS).index(product)
    groups = [("train", "good", train), ("test", "good", good), *(("test", defect, defective) for defect in defects)]
    for number, (split, kind, count) in enumerate(groups):
        folder = root / product / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture = _reduced(paint(Draws.of(seed, key, number, index), kind))
            picture.save(folder / f"{index:03}.png")
            if kind != "good":
                clean = _reduced(paint(Draws.of(seed, key, number, index), "good"))
                mask = ImageChops.difference(picture, clean).point(lambda value: 255 * (value > _VISIBLE))
                masks = root / product / "ground_truth" / kind
                masks.mkdir(parents=True, exist_ok=True)
                mask.save(masks / f"{index:03}_mask.png")
    return root / product


def _reduced(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
