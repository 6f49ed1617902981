"""Connected areas of a predicted mask."""

from __future__ import annotations

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
