"""Large images in tiles, which a model takes for images of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.images import resize_pixels
from gladad.core.records import Inspection
from gladad.core.storage import content_digest
from gladad.models.family import Model, inspect_where

Pixels = NDArray[np.uint8]


def cut(pixels: NDArray[Any], count: int) -> list[NDArray[Any]]:
    """``count**2`` equal tiles of ``[H, W, ...]``, row by row; the sides are multiples of ``count``."""
    return [np.ascontiguousarray(tile) for row in np.split(pixels, count, axis=0) for tile in np.split(row, count, axis=1)]


def joined(tiles: Sequence[NDArray[Any]], count: int) -> NDArray[Any]:
    """Undo `cut`."""
    return np.concatenate([np.concatenate(tiles[start : start + count], axis=1) for start in range(0, len(tiles), count)], axis=0)


@dataclass(frozen=True)
class Tiled:
    """A model of the tiles of images, as a model of the images. The score is the highest of a tile.

    Attributes:
        model: Of tiles.
        count: Tiles per side.
    """

    model: Model
    count: int

    @property
    def kind(self) -> str:
        """That of the model."""
        return self.model.kind

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time."""
        return self.model.workers

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` of all tiles together."""
        height, width = self.model.image_size
        return self.count * height, self.count * width

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one image ``[H, W, 3]`` uint8 of any size, in the model's own units."""
        return self._joined([self.model.inspect(tile) for tile in cut(resize_pixels(pixels, self.image_size), self.count)])

    def inspect_where(self, pixels: Pixels, counted: NDArray[np.bool_]) -> Inspection:
        """The same where it counts, ``[H, W]`` over the image, see `gladad.models.family.inspect_where`."""
        size = (self.image_size[1], self.image_size[0])
        where = np.asarray(Image.fromarray(counted).resize(size, Image.Resampling.NEAREST))
        tiles = zip(cut(resize_pixels(pixels, self.image_size), self.count), cut(where, self.count), strict=True)
        return self._joined([inspect_where(self.model, tile, part) for tile, part in tiles])

    def _joined(self, found: list[Inspection]) -> Inspection:
        worst = max(found, key=lambda each: each.score)
        return Inspection(map=joined([each.map for each in found], self.count), score=worst.score, step=worst.step, latent=found)

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels | None:
        """The anomaly-free counterpart, for people; None if the model makes none."""
        tiles = cut(resize_pixels(pixels, self.image_size), self.count)
        made = [self.model.picture(found, tile, threshold) for found, tile in zip(inspection.latent, tiles, strict=True)]
        shown = [picture for picture in made if picture is not None]
        return resize_pixels(joined(shown, self.count), (pixels.shape[0], pixels.shape[1])) if len(shown) == len(made) else None

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the config of the model of tiles."""
        return self.model.save(folder)

    def describe(self) -> dict[str, Any]:
        """That of the model of tiles, and their number."""
        return self.model.describe() | {"tiles": self.count}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the model of tiles and their number."""
        return content_digest({"model": self.model.digest(), "tiles": self.count})


def tiled(model: Model, count: int) -> Model:
    """A model of tiles as one of images; itself where there is one tile."""
    return Tiled(model, count) if count > 1 else model
