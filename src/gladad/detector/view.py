"""An image as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.images import load_image, resize_map, resize_pixels
from gladad.core.records import Progress
from gladad.data.samples import expand_paths

if TYPE_CHECKING:
    from gladad.data.alignment import Alignment

Pixels = NDArray[np.uint8]


class View:
    """An image aligned, where that is wanted, and the way back.

    Attributes:
        pixels: ``[h, w, 3]`` uint8 for the model.
    """

    def __init__(self, image: Pixels, alignment: Alignment | None):
        self._image, self._alignment = image, alignment
        self.pixels = image
        if alignment is not None:
            self._pose = alignment.locate(image)
            self.pixels = alignment.apply(image, self._pose)

    def whole_map(self, found: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's map as one ``[H, W]`` of the image; 0 where the model has not looked."""
        size = (self.pixels.shape[0], self.pixels.shape[1])
        shown = resize_map(found, size)
        if self._alignment is None:
            return shown
        size = (self._image.shape[0], self._image.shape[1])
        return self._alignment.restore(shown, self._pose, size, np.zeros(size, np.float32))

    def whole_picture(self, picture: Pixels | None) -> Pixels | None:
        """The model's picture put back into the image ``[H, W, 3]``."""
        if picture is None or self._alignment is None:
            return picture
        return self._alignment.restore(picture, self._pose, (self._image.shape[0], self._image.shape[1]), self._image)


def read_pixels(paths: Sequence[Path], size: tuple[int, int], progress: Progress, alignment: Alignment | None = None) -> list[Pixels]:
    """Images as the model sees them, ``[H, W, 3]`` at one size."""
    pixels = []
    for path in paths:
        pixels.append(resize_pixels(View(load_image(path), alignment).pixels, size))
        progress("reading images", len(pixels), len(paths))
    return pixels


def each(images: Any) -> Iterator[Any]:
    """The images of a path, folder, batch, or sequence of any of these, one by one."""
    if isinstance(images, str | Path):
        yield from expand_paths([Path(images)])
    elif isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for image in images:
            yield from each(image)
    else:
        yield images
