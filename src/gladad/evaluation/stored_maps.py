"""Anomaly maps on disk, one file for each image, so that a report can be scored again without the model."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import DataError

FOLDER = "maps"


class KeptMap(NamedTuple):
    """What is kept of one image."""

    anomaly_map: NDArray[np.float32]  # [H, W] at the size of evaluation
    mask: NDArray[np.bool_] | None  # [H, W], the ground truth at that size; None if there is none
    pictures: Sequence[tuple[str, bytes]] = ()  # (title, JPEG bytes) of the page


def map_file(folder: Path, number: int) -> Path:
    """The file of the image of this number, its row in the report."""
    return folder / f"{number:06}.npz"


def save_map(folder: Path, number: int, kept: KeptMap) -> None:
    """Write one image's file. The map is stored as it is, the mask as bits, the pictures as they were encoded."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = np.array([title for title, _ in kept.pictures], np.str_)
    mask = {} if kept.mask is None else {"mask": np.packbits(kept.mask)}
    pictures = {f"picture_{index}": np.frombuffer(data, np.uint8) for index, (_, data) in enumerate(kept.pictures)}
    np.savez(map_file(folder, number), allow_pickle=False, anomaly_map=kept.anomaly_map, titles=titles, **mask, **pictures)


def load_map(folder: Path, number: int) -> KeptMap:
    """Read what `save_map` wrote.

    Raises:
        DataError: The file is missing or damaged.
    """
    path = map_file(folder, number)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # NumPy would leave a damaged file open
            anomaly_map = arrays["anomaly_map"]
            if not np.isfinite(anomaly_map).all():
                raise ValueError("a value is not finite")
            mask = None
            if "mask" in arrays:
                mask = np.unpackbits(arrays["mask"], count=anomaly_map.size).reshape(anomaly_map.shape).astype(bool)
            titles = arrays["titles"].tolist()
            return KeptMap(anomaly_map, mask, [(title, arrays[f"picture_{index}"].tobytes()) for index, title in enumerate(titles)])
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; evaluate again with --keep-maps") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged ({error}); evaluate again with --keep-maps") from error
