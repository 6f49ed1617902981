"""Small pictures of good parts that a version has learnt from, and which of them looks most like another part."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.images import list_images, load_image, resize_pixels
from gladad.core.storage import load_arrays, read_json, save_arrays
from gladad.data.samples import evenly, file_digest
from gladad.detector.files import ALIGNMENT_FILE, SEEN_FILE, load_alignment
from gladad.detector.view import View
from gladad.report.pictures import thumbnail
from gladad.service.onlooker import UNIMPORTANT, log

if TYPE_CHECKING:
    from gladad.data.alignment import Alignment

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]
FILE = "good_parts.safetensors"
MOST = 48  # pictures of a version, which bounds its file at about two megabytes
SIDE = 384  # pixels of the longer side
QUALITY = 88
COARSE = 64  # pixels of a side at which parts are compared
LARGEST = 1024  # pixels of the longer side of a part that is compared
FEWEST = 20  # coarse places around a box; with fewer the whole parts are compared
ALIKE = 0.8  # share of the places, the most alike ones, that are compared: a defect is none of them


class GoodParts(NamedTuple):
    """Of a version."""

    jpegs: list[bytes]
    coarse: NDArray[np.float32]  # [N, 64, 64, 3]
    alignment: Alignment | None


def keep(model: Path, request: dict[str, Any]) -> None:
    """Put pictures of the good parts of a job beside the model that it made, at most `MOST`, evenly chosen.

    They are of those that the model was trained on; where a job had none of these, those of the model before, or of the held-out ones.
    Where they cannot be read or written, that is logged, and the model has none.
    """
    try:
        _keep(model, request)
    except UNIMPORTANT as error:
        with suppress(OSError):
            (model / FILE).unlink(missing_ok=True)
        log.warning("no good part will be shown beside a defect: %s", error)


def _keep(model: Path, request: dict[str, Any]) -> None:
    seen = read_json(model / SEEN_FILE)
    folders = [request["images"], *([request["judged"]] if "judged" in request else [])]
    images = {file_digest(path): path for folder in folders for path in list_images(Path(folder))}
    trained, held_out = ([images[digest] for digest in seen.get(name, ()) if digest in images] for name in ("trained", "held_out"))
    if not trained and "model" in request and has(Path(request["model"])):
        shutil.copyfile(Path(request["model"]) / FILE, model / FILE)
    elif trained or held_out:
        _write(model, sorted(trained or held_out))


def nearest(folder: Path, image: Pixels, box: Box | None = None) -> Pixels | None:
    """The kept good part that looks most like a part in most of its places, as it would lie in that picture.

    Args:
        folder: Of a version.
        image: ``[H, W, 3]`` uint8.
        box: ``(left, top, right, bottom)`` in pixels: only what is around it is compared, not what is in it.

    Returns:
        ``[h, w, 3]`` uint8, which is to be stretched to the size of the image; None where no good part is kept.
    """
    if not has(folder):
        return None
    known = _read(folder)
    small = thumbnail(image, LARGEST)
    view = View(small, known.alignment)
    coarse = resize_pixels(view.pixels, (COARSE, COARSE)).astype(np.float32)
    apart = np.square(known.coarse - coarse).sum(-1)
    around = None if box is None else _around(view, (small.shape[0], small.shape[1]), np.array(box) * len(small) / len(image))
    apart = apart.reshape(len(apart), -1) if around is None or around.sum() < FEWEST else apart[:, around]
    apart.partition(round(ALIKE * apart.shape[1]), axis=1)
    found = _decoded(known.jpegs[int(apart[:, : round(ALIKE * apart.shape[1])].mean(1).argmin())])
    if known.alignment is None:
        return found
    whole = view.whole_picture(resize_pixels(found, (view.pixels.shape[0], view.pixels.shape[1])))
    return None if whole is None else thumbnail(whole, 2 * SIDE)


def _around(view: View, size: tuple[int, int], box: NDArray[np.float64]) -> Mask:
    """Which of the coarse places ``[64, 64]`` lie around a box in the image, within half its side, or a tenth of the image's."""
    left, top, right, bottom = box
    margin = max((right - left) / 2, (bottom - top) / 2, 0.1 * max(size))
    rows, columns = (np.arange(length) + 0.5 for length in size)
    outer, inner = (
        ((rows > top - more) & (rows < bottom + more))[:, None] & ((columns > left - more) & (columns < right + more))
        for more in (margin, 0)
    )
    places = np.repeat(np.arange(COARSE, dtype=np.float32)[:, None] + 0.5, COARSE, axis=1)
    y, x = view.whole_map(places), view.whole_map(places.T.copy())  # 0 where the model does not look
    ring = outer & ~inner & (y > 0)
    around = np.zeros((COARSE, COARSE), bool)
    around[y[ring].astype(int), x[ring].astype(int)] = True
    return around


def has(folder: Path) -> bool:
    """Whether pictures of good parts are kept with a version."""
    return (folder / FILE).is_file()


def _write(model: Path, paths: Sequence[Path]) -> None:
    alignment, arrays = _alignment(model), {}
    for number, place in enumerate(evenly(len(paths), MOST).tolist()):
        buffer = io.BytesIO()
        Image.fromarray(thumbnail(View(load_image(paths[place]), alignment).pixels, SIDE)).save(buffer, "JPEG", quality=QUALITY)
        arrays[f"{number:02}"] = np.frombuffer(buffer.getvalue(), np.uint8)
    save_arrays(model / FILE, arrays)


@lru_cache(maxsize=4)
def _read(folder: Path) -> GoodParts:
    jpegs = [array.tobytes() for _, array in sorted(load_arrays(folder / FILE).items())]
    coarse = np.stack([resize_pixels(_decoded(jpeg), (COARSE, COARSE)) for jpeg in jpegs]).astype(np.float32)
    return GoodParts(jpegs, coarse, _alignment(folder))


def _decoded(jpeg: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def _alignment(folder: Path) -> Alignment | None:
    return load_alignment(folder) if (folder / ALIGNMENT_FILE).is_file() else None
