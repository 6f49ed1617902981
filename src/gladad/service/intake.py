"""What is accepted as an image, decided before it is decoded."""

from __future__ import annotations

import io
import warnings
from pathlib import PurePosixPath, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from gladad.core.errors import DataError
from gladad.core.images import DAMAGE, MIN_SIDE

# Formats as Pillow names them: the ending of a kept file, and the media types that say so.
FORMATS = {
    "PNG": ("png", {"image/png"}),
    "JPEG": ("jpg", {"image/jpeg", "image/jpg"}),
    "MPO": ("jpg", {"image/jpeg", "image/jpg"}),  # opened as JPEG
    "BMP": ("bmp", {"image/bmp", "image/x-ms-bmp"}),
    "TIFF": ("tif", {"image/tiff"}),
    "WEBP": ("webp", {"image/webp"}),
}
# The last one is what curl says of any body.
ANY_TYPE = frozenset({"", "application/octet-stream", "image/*", "application/x-www-form-urlencoded"})
MAX_NAME = 255


class UnsupportedTypeError(DataError):
    """A body is not what its content type says."""


def check_image(content: bytes, media_type: str, max_pixels: int) -> str:
    """Look at the header of an image.

    Args:
        content: Of a file.
        media_type: What the sender says it is; empty or ``application/octet-stream`` says nothing.
        max_pixels: Most that are accepted.

    Returns:
        Ending of a file of its format.

    Raises:
        UnsupportedTypeError: It has another format than the sender says, or one that is not accepted.
        DataError: It is no image, too small, too large, or one of several frames.
    """
    media_type = media_type.partition(";")[0].strip().lower()
    if not content:
        raise DataError("the image is empty; send the bytes of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=[form for form in FORMATS if form != "MPO"]) as image:
                form, size, frames = str(image.format), image.size, getattr(image, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise UnsupportedTypeError("not an image, or a format that is not supported (PNG, JPEG, BMP, TIFF, WebP are)") from error
    except (Image.DecompressionBombError, *DAMAGE) as error:
        raise DataError(f"the image cannot be read, it is damaged or truncated ({error})") from error
    ending, names = FORMATS[form]
    if media_type not in ANY_TYPE and media_type not in names:
        raise UnsupportedTypeError(f"sent as {media_type}, but it is {form}; send it as {min(names)} or application/octet-stream")
    if size[0] * size[1] > max_pixels:
        raise DataError(f"{size[0]}x{size[1]} pixels is more than is accepted ({max_pixels}); crop or shrink it")
    if min(size) < MIN_SIDE:
        raise DataError(f"{size[0]}x{size[1]} pixels is less than is accepted ({MIN_SIDE}x{MIN_SIDE})")
    if frames > 1 and form != "MPO":  # the further frames of a camera's MPO are previews
        raise DataError(f"it has {frames} frames; send one image at a time")
    return ending


def check_filename(name: str) -> str:
    """The name that a sender gives an image, for the record only.

    Raises:
        DataError: It holds a path, or control characters.
    """
    if len(name) > MAX_NAME or not name.isprintable() or name in {".", ".."}:
        raise DataError(f"file name {name[:40]!r}: use at most {MAX_NAME} printable characters")
    if name and {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
        raise DataError(f"file name {name!r}: send the name alone, without folders")
    return name
