"""Reading and writing images: every common format, depth and mode, to one representation.

The representation is ``uint8 [H, W, 3]`` RGB on disk borders and ``float32 [3, H, W]`` RGB in [0, 1] everywhere else.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gladad.core.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
"""File name endings (lower case) that count as images."""

LOSSY = frozenset({".jpg", ".jpeg", ".webp"})

MIN_SIDE = 8
"""Smallest accepted height and width in pixels: below this there is nothing to compare."""

MAX_PIXELS = 200_000_000
"""Largest accepted image; a guard against decompression bombs."""


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
    """Read an image file as upright RGB.

    8- and 16-bit, grey, RGB, RGBA (composited on black), palette and CMYK are understood, and the EXIF orientation is applied.
    16-bit images are scaled by their full range, so the same grey is the same value in every file.

    Returns:
        ``[H, W, 3]`` uint8.

    Raises:
        DataError: The file is missing, not an image, damaged, or smaller than 8x8 pixels.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about metadata that is damaged; damaged pixels are errors
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"{path}: {image.width}x{image.height} pixels is more than is accepted ({MAX_PIXELS}); crop or shrink it"
                    )
                image.load()
                pixels = to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder, not an image") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image, or a format that is not supported (PNG, JPEG, BMP, TIFF, WebP are)") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: too many pixels; crop or shrink it") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read, the file is damaged or truncated ({error})") from error
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise DataError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels is too small; at least {MIN_SIDE}x{MIN_SIDE} is needed")
    return pixels


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a PIL image of any mode to ``[H, W, 3]`` uint8 RGB."""
    if image.mode in {"I;16", "I;16L", "I;16B", "I;16N"}:
        grey = np.asarray(image).astype(np.float32) * (255.0 / 65535.0)
    elif image.mode == "I":  # 32-bit container: PNG readers put 16-bit grey here
        values = np.asarray(image).astype(np.float64)
        grey = (values * (255.0 / 65535.0) if values.max(initial=0) > 255 else values).astype(np.float32)
    elif image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        grey = values * 255.0 if values.max(initial=0.0) <= 1.0 else values
    else:
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"}:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.array(image.convert("RGB"), dtype=np.uint8)
    grey8 = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return np.repeat(grey8[..., None], 3, axis=2)


def load_mask(path: str | Path, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """Read a ground-truth mask: anything above half of full scale is defect.

    A lossless file in which nothing is that bright holds the numbers of kinds of defect, and all but 0 is defect.

    Args:
        path: Mask file, or a folder of masks of one image, which are united.
        size: ``(H, W)`` to resize to, by nearest neighbour; None keeps the file's.

    Returns:
        ``[H, W]`` bool.
    """
    if Path(path).is_dir():
        parts = [load_mask(part, size) for part in list_images(Path(path))]
        if not parts or any(part.shape != parts[0].shape for part in parts):
            raise DataError(f"{path}: holds no masks, or masks of several sizes")
        union: NDArray[np.bool_] = np.any(parts, axis=0)
        return union
    grey = load_image(path).max(axis=2)
    if grey.max() <= 127 and Path(path).suffix.lower() not in LOSSY:
        grey = np.where(grey > 0, 255, 0).astype(np.uint8)
    if size is not None and grey.shape != size:
        grey = np.asarray(Image.fromarray(grey).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return np.asarray(grey > 127)


def as_pixels(image: str | Path | Image.Image | NDArray[np.generic] | Tensor) -> NDArray[np.uint8]:
    """Any image a caller may hold, as ``[H, W, 3]`` uint8.

    Args:
        image: A path; a PIL image; an array ``[H, W]`` or ``[H, W, 3|4]`` (uint8, uint16, or float in [0, 1]); a tensor
            ``[3, H, W]`` or ``[1, H, W]`` in [0, 1].

    Raises:
        DataError: The shape or dtype is none of these.
    """
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        pixels = to_rgb(ImageOps.exif_transpose(image))
    else:
        if isinstance(image, Tensor) and image.ndim != 3:
            raise DataError(f"an image tensor must be [3, H, W] or [1, H, W], not {list(image.shape)}")
        array = image.detach().cpu().float().permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)
        pixels = _array_to_pixels(array)
    if min(pixels.shape[:2]) < MIN_SIDE:
        raise DataError(f"image of {pixels.shape[1]}x{pixels.shape[0]} pixels is too small; at least {MIN_SIDE}x{MIN_SIDE} is needed")
    return pixels


def _array_to_pixels(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in {1, 3, 4}:
        raise DataError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}")
    if not array.size:
        raise DataError(f"an image array must not be empty, as {list(array.shape)} is")
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535.0
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise DataError("a floating-point image must be finite and lie in [0, 1]")
        array = np.rint(array.astype(np.float32) * 255.0).clip(0, 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"an image array must be uint8, uint16 or float, not {array.dtype}")
    if array.shape[2] == 4:
        return to_rgb(Image.fromarray(np.ascontiguousarray(array), "RGBA"))
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))).astype(np.uint8)


def resize_pixels(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize to ``(H, W)``, antialiased bilinear (Pillow's), keeping uint8."""
    if pixels.shape[:2] == size:
        return pixels
    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """``uint8 [H, W, 3]`` -> ``float32 [3, H, W]`` in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255.0


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """``float [3, H, W]`` in [0, 1] -> ``uint8 [H, W, 3]``; values outside are clipped."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of a map ``[B, 1, h, w]`` to ``(H, W)``."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)
