"""The curve behind every metric: false and true positives while the threshold falls, and the areas read off it.

Only the corners are kept, two for each distinct score of an anomalous item: the counts just above that score, and with it. In between
true positives do not change and the curve is a straight line, so nothing is lost, and normal items need to be counted only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BINS = 2**20
WORTH_BINNING = 100_000  # values below which sorting them all is as fast


@dataclass(frozen=True)
class Curve:
    """Corners of the curve, or of a piece of it: arrays ``[2 K]`` that never fall.

    Attributes:
        fp: False positives.
        tp: True positives.
        overlap: Sum of the weights of the true positives.
    """

    fp: Floats
    tp: Floats
    overlap: Floats

    def closed(self, negatives: float) -> Curve:
        """The whole curve of these corners, from "nothing is flagged" to "everything is": ``[2 K + 2]``."""

        def with_ends(values: Floats, end: float) -> Floats:
            return np.concatenate([[0.0], values, [end]])

        return Curve(with_ends(self.fp, negatives), with_ends(self.tp, self.tp[-1]), with_ends(self.overlap, self.overlap[-1]))


def corners(
    normal: NDArray[np.generic],
    anomalous: NDArray[np.generic],
    weights: Floats | None = None,
    before: tuple[float, float, float] = (0, 0, 0),
) -> Curve:
    """Count positives while the threshold falls through the scores given.

    Args:
        normal: ``[N]`` scores of normal items, in any order.
        anomalous: ``[P]`` scores of anomalous items, in falling order.
        weights: ``[P]`` their weights in `Curve.overlap`; None counts each as 1.
        before: ``(fp, tp, overlap)`` of all higher scores, where these are a slice of a larger set.
    """
    if not len(anomalous):
        return Curve(np.empty(0), np.empty(0), np.empty(0))
    last = np.flatnonzero(np.append(anomalous[1:] != anomalous[:-1], True))  # where each run of equal scores ends
    distinct = anomalous[last]
    fp_above, fp_with = counts_above(normal, distinct)
    tp = (last + 1).astype(np.float64)
    overlap = tp if weights is None else np.cumsum(weights)[last]

    def pairs(above: Floats, including: Floats, offset: float) -> Floats:
        return np.stack([above, including], axis=1).ravel() + offset

    def shifted(values: Floats) -> Floats:
        return np.concatenate([[0.0], values[:-1]])

    return Curve(
        fp=pairs(fp_above.astype(np.float64), fp_with.astype(np.float64), before[0]),
        tp=pairs(shifted(tp), tp, before[1]),
        overlap=pairs(shifted(overlap), overlap, before[2]),
    )


def counts_above(values: NDArray[np.generic], thresholds: NDArray[np.generic]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many values lie above each threshold, and how many at or above it: two arrays ``[K]`` for thresholds ``[K]`` in falling order.

    Most values are only counted in fine bins. Those that share a bin with a threshold are compared exactly.
    """
    kind = np.result_type(values.dtype, thresholds.dtype, np.float32)
    inside, limits = values.astype(kind, copy=False), thresholds.astype(kind, copy=False)
    low, high = limits[-1], limits[0]
    beyond = int(np.count_nonzero(inside > high))
    with np.errstate(over="ignore", divide="ignore"):
        scale = (BINS - 1) / (high - low)
    close, close_in_higher, in_higher = inside, np.zeros(len(limits), np.int64), np.zeros(len(limits), np.int64)
    if len(values) > WORTH_BINNING and np.isfinite(scale) and scale > 0:
        inside = inside[(inside >= low) & (inside <= high)]
        # Rounding keeps the order, so that a higher bin holds higher values only.
        bins, own = ((inside - low) * scale).astype(np.int32), ((limits - low) * scale).astype(np.int32)
        histogram = np.bincount(bins, minlength=BINS)
        shared = np.zeros(BINS, bool)
        shared[own] = True
        close = inside[shared[bins]]
        in_higher = (len(inside) - np.cumsum(histogram))[own] + beyond
        close_in_higher = (len(close) - np.cumsum(np.where(shared, histogram, 0)))[own]
    close = np.sort(close)
    above, at = (len(close) - np.searchsorted(close, limits, side=side) - close_in_higher + in_higher for side in ("right", "left"))
    return above, at


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


def thinned(x: Floats, y: Floats, count: int = 200) -> tuple[Floats, Floats]:
    """At most ``count`` of the points of a line, evenly spread along it, the ends included.

    No point left out is further than ``length / (count - 1)`` from one kept, where length sums ``|dx| + |dy|`` along the line.
    """
    if len(x) <= count:
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    places = np.searchsorted(length, np.linspace(0, length[-1], count))
    places[0], places[-1] = 0, len(x) - 1
    keep = np.unique(places)
    return x[keep], y[keep]
