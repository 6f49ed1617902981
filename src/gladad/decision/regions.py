"""Connected areas of a predicted mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gladad.core.records import Region

MAX_REGIONS = 100


def find_regions(mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32]) -> tuple[Region, ...]:
    """8-connected areas of a mask ``[H, W]``, largest peak first, at most 100."""
    if not mask.any():
        return ()
    from scipy import ndimage  # late: a part without regions needs none of it

    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    index = np.arange(1, count + 1)
    peaks = ndimage.maximum(anomaly_map, labels, index)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-np.asarray(peaks), kind="stable")[:MAX_REGIONS]
    edges = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in ndimage.find_objects(labels)]
    return tuple(Region(box=edges[i], area=int(areas[i]), peak=float(peaks[i])) for i in order)


def outlines(mask: NDArray[np.bool_], regions: Sequence[Region]) -> list[list[tuple[int, int]]]:
    """The outer contour of each region of a mask ``[H, W]`` as corners ``(x, y)``, simplified to within a pixel.

    They lie on the edges of pixels, as those of the boxes do: 0 is left of the first pixel, ``W`` right of the last.

    The box of a region may hold others: its own area is told by its size.
    """
    if not regions:
        return []
    from skimage import measure  # late: a part without regions needs none of it

    contours = []
    for region in regions:
        left, top, right, bottom = region.box
        labels = measure.label(np.pad(mask[top:bottom, left:right], 1), connectivity=2)
        own = labels == np.abs(np.bincount(labels.ravel())[1:] - region.area).argmin() + 1
        found = max(measure.find_contours(own.astype(np.float32), 0.5), key=len)
        corners = measure.approximate_polygon(found, tolerance=1.0)[:-1]
        contours.append([(round(float(x) - 0.5) + left, round(float(y) - 0.5) + top) for y, x in corners])
    return contours
