"""The curve behind every pixel metric: false and true positives while the threshold falls, and the areas read off it.

Only the corners are kept, two for each distinct score of an anomalous item: the counts just above that score, and with it. In between
true positives do not change and the curve is a straight line, so nothing is lost, and normal items need to be counted only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def corners(normal: NDArray[np.generic], anomalous: NDArray[np.generic], weights: Floats) -> Floats:
    """Count positives while the threshold falls through the scores given.

    Args:
        normal: ``[N]`` scores of normal items, in any order.
        anomalous: ``[P]`` scores of anomalous items, in falling order; at least one.
        weights: ``[P]`` their weights.

    Returns:
        ``[3, 2 K]`` false positives, true positives and the weights of these, none of which ever falls.
    """
    last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))  # where each run of equal scores ends
    rising = np.sort(normal)
    found = np.stack([last + 1, np.cumsum(weights)[last]])
    fp = [len(rising) - rising.searchsorted(anomalous[last], side=side) for side in ("right", "left")]
    above, including = np.vstack([fp[0], np.pad(found, ((0, 0), (1, 0)))[:, :-1]]), np.vstack([fp[1], found])
    return np.stack([above, including], axis=2).reshape(3, -1)


def area_until(x: Floats, y: Floats, limit: float) -> float:
    """Integral of the line through the points from the first x to ``limit``, interpolated there; x never falls."""
    stop = int(np.searchsorted(x, limit, side="right"))  # points up to the limit, the limit included
    if 0 < stop < len(x):
        share = (limit - x[stop - 1]) / (x[stop] - x[stop - 1])
        x, y = np.append(x[:stop], limit), np.append(y[:stop], y[stop - 1] + share * (y[stop] - y[stop - 1]))
    else:
        x, y = x[:stop], y[:stop]
    return float(np.trapezoid(y, x))


def curve_points(x: Floats, y: Floats, count: int = 200) -> dict[str, list[float]]:
    """At most ``count`` of the points of a line as ``{"x": [...], "y": [...]}``, evenly spread along it, the ends included.

    No point left out is further than ``length / (count - 1)`` from one kept, where length sums ``|dx| + |dy|`` along the line.
    """
    if len(x) > count:
        length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        places = np.searchsorted(length, np.linspace(0, length[-1], count))
        places[0], places[-1] = 0, len(x) - 1
        x, y = x[np.unique(places)], y[np.unique(places)]
    return {"x": [round(float(value), 6) for value in x], "y": [round(float(value), 6) for value in y]}
