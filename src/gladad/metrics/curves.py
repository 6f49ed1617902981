"""The curve behind every pixel metric: false and true positives while the threshold falls, and the areas read off it.

Only the corners are kept, two for each distinct score of an anomalous item: the counts just above that score, and with it. In between
true positives do not change and the curve is a straight line, so nothing is lost, and normal items need to be counted only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Corners of a piece of the curve: arrays ``[2 K]`` that never fall.

    Attributes:
        fp: False positives.
        tp: True positives.
        overlap: Sum of the weights of the true positives.
    """

    fp: Floats
    tp: Floats
    overlap: Floats


def corners(normal: NDArray[np.generic], anomalous: NDArray[np.generic], weights: Floats, before: tuple[float, float, float]) -> Curve:
    """Count positives while the threshold falls through the scores given.

    Args:
        normal: ``[N]`` scores of normal items, in any order.
        anomalous: ``[P]`` scores of anomalous items, in falling order.
        weights: ``[P]`` their weights in `Curve.overlap`.
        before: ``(fp, tp, overlap)`` of all higher scores.
    """
    if not len(anomalous):
        return Curve(np.empty(0), np.empty(0), np.empty(0))
    last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))  # where each run of equal scores ends
    rising = np.sort(normal)
    fp_above, fp_with = (len(rising) - rising.searchsorted(anomalous[last], side=side) for side in ("right", "left"))
    tp, overlap = (last + 1).astype(np.float64), np.cumsum(weights)[last]

    def pairs(above: NDArray[np.generic], including: NDArray[np.generic], offset: float) -> Floats:
        return np.stack([above, including], axis=1).ravel().astype(np.float64) + offset

    def shifted(values: Floats) -> Floats:
        return np.concatenate([[0.0], values[:-1]])

    return Curve(pairs(fp_above, fp_with, before[0]), pairs(shifted(tp), tp, before[1]), pairs(shifted(overlap), overlap, before[2]))


def area_until(x: Floats, y: Floats, limit: float) -> float:
    """Integral of the line through the points from the first x to ``limit``, interpolated there; x never falls."""
    stop = int(np.searchsorted(x, limit, side="right"))  # points up to the limit, the limit included
    if 0 < stop < len(x):
        share = (limit - x[stop - 1]) / (x[stop] - x[stop - 1])
        x, y = np.append(x[:stop], limit), np.append(y[:stop], y[stop - 1] + share * (y[stop] - y[stop - 1]))
    else:
        x, y = x[:stop], y[:stop]
    return float(np.trapezoid(y, x))


def precision_sum(curve: Curve, tp_before: float) -> float:
    """Sum of precision times newly found positives over the corners: average precision before its division by all positives."""
    tp, fp = curve.tp[1::2], curve.fp[1::2]
    return float(np.sum(np.diff(tp, prepend=tp_before) * tp / (tp + fp)))


def best_f1(fp: Floats, tp: Floats, positives: float) -> float:
    """The largest F1 of the points."""
    return float(np.max(2 * tp / (tp + fp + positives)))


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
