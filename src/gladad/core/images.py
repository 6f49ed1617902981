"""Reading and writing images: every common format, depth and mode, to one representation.

The representation is ``uint8 [H, W, 3]`` RGB; `gladad.core.tensors` makes tensors of it. Files may be read on
several threads, so nothing here touches the warnings filters, which belong to the process: damaged EXIF data is passed over silently.
"""

from __future__ import annotations

import io
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.Image import Transpose as T
from PIL.JpegImagePlugin import JpegImageFile

from gladad.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})  # file name endings (lower case) that count as images
LOSSY = frozenset({"JPEG", "MPO", "WEBP"})  # formats, as Pillow names them, that may change levels a little
MIN_SIDE = 8  # smallest accepted height and width in pixels: below this there is nothing to compare
MAX_PIXELS = 200_000_000  # largest accepted image; a guard against decompression bombs

if Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3:  # Pillow's own; one that a program has chosen stays, and holds here too
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# What Pillow raises on a damaged file; warnings, where a program wants them to be raised.
DAMAGE = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, UserWarning, struct.error)
# EXIF orientation -> what undoes it.
UPRIGHT = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}
SLACK = 1e-3  # how far a floating-point level may lie outside of [0, 1]; it is clipped


def is_image(path: Path) -> bool:
    """Whether a path looks like an image file: a known suffix, in any case, and not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted by path; links are followed but not back up, hidden folders are passed over."""
    found: list[Path] = []
    seen = set(folder.resolve().parents)
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [p for p in map(here.joinpath, files) if is_image(p) and p.is_file()]
    return sorted(found)


def load_image(path: str | Path) -> NDArray[np.uint8]:
    """Read an image file as upright RGB ``[H, W, 3]`` uint8.

    8- and 16-bit, grey, RGB, RGBA (composited on black), palette and CMYK are understood, and the EXIF orientation is applied. What a
    level means depends on the kind of file alone, never on what else is in the image: 16-bit grey is in [0, 65535], and so are 32-bit
    integers, in which other programs keep 16-bit levels; floating-point grey is in [0, 1].

    Raises:
        DataError: The file is missing, not an image, damaged, smaller than 8x8 pixels or larger than `MAX_PIXELS`, or out of range.
    """
    with _named(path), Path(path).open("rb") as file:
        return _to_rgb(_open(file))


def load_mask(path: str | Path, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """Read a ground-truth mask ``[H, W]``: anything above half of full scale is defect.

    A lossless file in which nothing is that bright holds the numbers of kinds of defect, and all but 0 is defect. Masks are read at their
    own depth, with the ranges of `load_image`.

    Args:
        path: Mask file, or a folder of masks of one image, which are united.
        size: ``(H, W)`` to resize to, by nearest neighbour; None keeps the file's.

    Raises:
        DataError: As for `load_image`, or a folder holds no masks, or masks of several sizes.
    """
    if Path(path).is_dir():
        parts = [load_mask(part, size) for part in list_images(Path(path))]
        if not parts or any(part.shape != parts[0].shape for part in parts):
            raise DataError(f"{path}: holds no masks, or masks of several sizes")
        return np.asarray(np.any(parts, axis=0))
    with _named(path), Path(path).open("rb") as file:
        image = _open(file)
        levels, full = _levels(image)
    grey = levels if levels.ndim == 2 else levels.max(axis=2)
    mask: NDArray[np.bool_] = grey > full / 2
    if not mask.any() and image.format not in LOSSY:
        mask = grey > 0
    if size is not None and mask.shape != size:
        mask = np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return mask


def as_pixels(image: str | Path | bytes | bytearray | memoryview | Image.Image | NDArray[np.generic] | Tensor) -> NDArray[np.uint8]:
    """Any image a caller may hold, as ``[H, W, 3]`` uint8.

    Args:
        image: A path; the bytes of an image file (PNG, JPEG, ...), read as `load_image` reads the file; a PIL image; an array ``[H, W]``
            or ``[H, W, 3|4]`` (uint8, uint16, or float in [0, 1]); a tensor ``[3, H, W]`` or ``[1, H, W]`` (the same types).

    Raises:
        DataError: The shape or dtype is none of these, or as for `load_image`.
    """
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, bytes | bytearray | memoryview | Image.Image):
        with _named("image"):
            return _to_rgb(_upright(image) if isinstance(image, Image.Image) else _open(io.BytesIO(image)))
    if not _is_tensor(image):
        return _array_to_pixels(np.asarray(image))
    if image.ndim != 3:
        raise DataError(f"an image tensor must be [3, H, W] or [1, H, W], not {list(image.shape)}")
    image = image.detach().cpu().permute(1, 2, 0)
    return _array_to_pixels((image.float() if image.is_floating_point() else image).numpy())


def _is_tensor(image: object) -> TypeGuard[Tensor]:
    """Without importing torch, which inspection by exported models does without."""
    return "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor)


@contextmanager
def _named(name: object) -> Iterator[None]:
    """Make what goes wrong with a file a `DataError` that begins with its name."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: is a folder, not an image") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image, or a format that is not supported (PNG, JPEG, BMP, TIFF, WebP are)") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: more than the {Image.MAX_IMAGE_PIXELS} pixels that are accepted; crop or shrink it") from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{name}: cannot be read ({error.strerror})") from error
        raise DataError(f"{name}: cannot be read, the file is damaged or truncated ({error})") from error


class _Jpeg(JpegImageFile):
    """JPEG without Pillow's look into the EXIF data for the resolution, which warns of damage there."""

    def getexif(self) -> Image.Exif:
        return Image.Exif() if "exif" in self.info else super().getexif()


def _open(file: BinaryIO) -> Image.Image:
    """A decoded, upright image."""
    jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    with _Jpeg(file) if jpeg else Image.open(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width}x{image.height} pixels is more than is accepted ({MAX_PIXELS}); crop or shrink it")
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Decode an image and apply its EXIF orientation. Pillow's own parser warns of damage elsewhere in the metadata."""
    image.load()
    data, orientation = image.info.get("exif"), 1
    if isinstance(data, bytes):
        data = data.removeprefix(b"Exif\0\0")
        order = "<" if data.startswith(b"II") else ">"
        with suppress(struct.error):
            (start,) = struct.unpack_from(order + "4xI", data)
            (count,) = struct.unpack_from(order + "H", data, start)
            entries = (struct.unpack_from(order + "H6xH", data, start + 2 + 12 * entry) for entry in range(count))
            orientation = next((value for tag, value in entries if tag == Base.Orientation), 1)
    else:
        orientation = image.getexif().get(Base.Orientation, 1)
    if orientation not in UPRIGHT:
        return image
    turned = image.transpose(UPRIGHT[orientation])
    turned.format = image.format
    return turned


def _levels(image: Image.Image) -> tuple[NDArray[Any], float]:
    """The levels of an image at its own depth, ``[H, W]`` or ``[H, W, 3]``, and full scale; the least is 0."""
    _check_size(image.height, image.width)
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(image)
        full, slack = (1.0, SLACK) if image.mode == "F" else (65535.0, 0.0)
        low, high = levels.min(), levels.max()
        if not (-slack <= low and high <= full + slack):  # nor if they are not a number
            kind = "floating-point" if image.mode == "F" else "integer"
            raise DataError(f"{kind} levels must lie in [0, {full:.0f}], not in [{low:g}, {high:g}]; rescale them, or save 8 or 16 bits")
        return levels, full
    if image.mode in {"1", "L"}:
        return np.asarray(image.convert("L")), 255.0
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"}:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB")), 255.0


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    levels, full = _levels(image)
    if levels.dtype != np.uint8:
        levels = np.rint(levels.astype(np.float32) * (255.0 / full)).clip(0, 255).astype(np.uint8)
    return np.array(levels) if levels.ndim == 3 else np.repeat(levels[..., None], 3, axis=2)


def _array_to_pixels(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in {1, 3, 4}:
        raise DataError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}")
    _check_size(*array.shape[:2])
    if array.dtype.newbyteorder("=") == np.uint16:
        array = array.astype(np.float32) / 65535.0
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= -SLACK and array.max() <= 1 + SLACK):  # nor if they are not a number
            raise DataError("a floating-point image must be finite and lie in [0, 1]")
        array = np.rint(array.astype(np.float32) * 255.0).clip(0, 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"an image array must be uint8, uint16 or float, not {array.dtype}")
    if array.shape[2] == 4:
        return _to_rgb(Image.fromarray(np.ascontiguousarray(array), "RGBA"))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))).astype(np.uint8)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise DataError(f"{width}x{height} pixels is too small; at least {MIN_SIDE}x{MIN_SIDE} is needed")


def resize_pixels(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize to ``(H, W)``, antialiased bilinear (Pillow's), keeping uint8."""
    if pixels.shape[:2] == size:
        return pixels
    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_map(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear resize of a map ``[h, w]`` to ``(H, W)``, without antialiasing: peaks keep their height where they are sampled."""
    for axis, length in enumerate(size):
        if maps.shape[axis] != length:
            place = ((np.arange(length) + 0.5) * (maps.shape[axis] / length) - 0.5).clip(0, maps.shape[axis] - 1)
            before = place.astype(np.intp)
            share = np.expand_dims((place - before).astype(np.float32), 1 - axis)
            after = np.minimum(before + 1, maps.shape[axis] - 1)
            maps = maps.take(before, axis) * (1 - share) + maps.take(after, axis) * share
    return maps
