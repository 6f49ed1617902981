"""The images of a report: small pictures inside the page, full-size ones in files beside it."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.records import Prediction
from gladad.data.samples import evenly
from gladad.report.pictures import Mask, Pixels, overlay, thumbnail

FOLDER = "pictures"
OUTCOMES = ("false accept", "false reject", "found", "passed")  # from what needs a look to what does not
WRONG = OUTCOMES[:2]
MAX_PICTURES = 1000  # images on a page; more would not open on a phone
PICTURE_BYTES = 9_500_000  # all pictures of a page: base64 makes 4 bytes of 3, and the page is to stay below 15 MB
MAX_ITEM_BYTES = 64_000
SIDES = (256, 224, 192, 176, 160, 144, 128, 112, 96, 80, 64)
QUALITY, LOWEST_QUALITY, FULL_QUALITY = 80, 50, 92


class Picture(NamedTuple):
    """One picture of an image."""

    title: str  # "input", "reconstruction", "map" or "ground truth"
    jpeg: bytes  # the small one, encoded
    link: str = ""  # where the full-size one is, relative to the page and ready for a link; empty if there is none

    @property
    def size(self) -> tuple[int, int]:
        """``(W, H)`` of the small one."""
        with Image.open(io.BytesIO(self.jpeg)) as image:
            return image.size

    @property
    def source(self) -> str:
        """The small one as a ``data:`` address."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


@dataclass(frozen=True)
class GalleryItem:
    """One image of the page, ready to be written: the pictures are already small and encoded."""

    name: str  # what to call it, such as its path in the data set
    pred_score: float  # above 1 is rejected
    p_value: float  # as in `Prediction`, like the score
    pred_label: bool  # rejected
    step: int  # the image's diffusion timestep
    pictures: tuple[Picture, ...]  # in the order of display
    gt_label: int  # 0 normal, 1 anomalous
    defect_type: str  # its kind

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        return outcome_of(self.gt_label, self.pred_label)

    @property
    def wrong(self) -> bool:
        """Whether the decision contradicts the truth."""
        return self.outcome in WRONG


def outcome_of(gt_label: int, pred_label: bool) -> str:
    """A decision compared with the truth: one of `OUTCOMES`."""
    if gt_label:
        return "found" if pred_label else "false accept"
    return "false reject" if pred_label else "passed"


def item_bytes(count: int) -> int:
    """Bytes that the pictures of one image may take on a page of so many images."""
    return min(MAX_ITEM_BYTES, PICTURE_BYTES // max(1, min(count, MAX_PICTURES)))


def small_pictures(prediction: Prediction, pixels: Pixels, gt_mask: Mask | None, limit: int) -> list[tuple[str, bytes]]:
    """The pictures of one image as ``(title, JPEG bytes)`` in the order of display, as large as the limit allows.

    Args:
        prediction: What inspection said.
        pixels: ``[H, W, 3]`` uint8, the inspected image.
        gt_mask: ``[H, W]`` bool; None if there is no picture of it.
        limit: Bytes of all of them together; exceeded only where 64 pixels at a low quality are too many.
    """
    found: list[tuple[str, bytes]] = []
    for side in SIDES:
        small = thumbnail(pixels, side)
        reconstruction = None if prediction.reconstruction is None else thumbnail(prediction.reconstruction, side)
        anomaly_map, pred_mask = _averaged(prediction.anomaly_map, small), _averaged(prediction.pred_mask, small) > 0
        truth = None if gt_mask is None else _averaged(gt_mask, small) > 0
        quality = QUALITY if side > SIDES[-1] else LOWEST_QUALITY
        found = [(title, _jpeg(picture, quality)) for title, picture in views(small, reconstruction, anomaly_map, pred_mask, truth)]
        if sum(len(data) for _, data in found) <= limit:
            break
    return found


def full_pictures(prediction: Prediction, pixels: Pixels, gt_mask: Mask | None, folder: Path, name: Path) -> dict[str, str]:
    """Write the pictures of one image at its own size, in a folder for each title; the links from the page, by title.

    The first arguments are those of `small_pictures`. The page lies beside ``folder``, ``name`` is the relative name of the image in it.
    """
    links = {}
    for title, picture in views(pixels, prediction.reconstruction, prediction.anomaly_map, prediction.pred_mask, gt_mask):
        path = folder / title.replace(" ", "_") / name.with_suffix(".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg(picture, FULL_QUALITY))
        links[title] = quote(os.fsencode(path.relative_to(folder.parent).as_posix()))
    return links


def views(
    pixels: Pixels, reconstruction: Pixels | None, anomaly_map: NDArray[np.float32], pred_mask: Mask, gt_mask: Mask | None
) -> Iterator[tuple[str, Pixels]]:
    """The pictures of one image with their titles: the map and both masks are drawn on the input. All of one size."""
    yield "input", pixels
    if reconstruction is not None:
        yield "reconstruction", reconstruction
    yield "map", overlay(pixels, anomaly_map, pred_mask)
    if gt_mask is not None:
        yield "ground truth", overlay(pixels, np.zeros_like(anomaly_map), gt_mask)


def chosen(items: Iterable[GalleryItem]) -> list[GalleryItem]:
    """At most `MAX_PICTURES` items in order of display: the wrong decisions, then an even choice over the scores of the others.

    False accepts come from the lowest score, false rejects from the highest, then the others from the threshold outwards.
    """

    def key(item: GalleryItem) -> tuple[int, float, str]:
        distance = abs(math.log(item.pred_score)) if item.pred_score > 0 else math.inf
        return (OUTCOMES.index(item.outcome), -distance, item.name) if item.wrong else (len(WRONG), distance, item.name)

    ordered = sorted(items, key=key)
    wrong = [item for item in ordered if item.wrong][:MAX_PICTURES]
    rest = sorted((item for item in ordered if not item.wrong), key=lambda item: item.pred_score)
    places = evenly(len(rest), MAX_PICTURES - len(wrong))
    return [*wrong, *sorted((rest[place] for place in places), key=key)]


def _averaged(values: NDArray[np.generic], like: Pixels) -> NDArray[np.float32]:
    """A map at the smaller size of a picture, each value the mean of its area, so that nothing small is passed over."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((like.shape[1], like.shape[0]), Image.Resampling.BOX))


def _jpeg(pixels: Pixels, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
