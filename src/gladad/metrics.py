"""How well scores and maps separate normal from anomalous: AUROC, average precision, best F1 and AUPRO, exact.

Every metric is read off one curve: the counts of true and false positives while the threshold falls. Only its corners are kept, two
for each distinct score of an anomalous item. In between true positives do not change, the curve is a straight line, and nothing is
lost; so the many normal pixels need to be sorted by value only, and memory stays close to that of the maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Curve:
    """Corners of the curve: arrays ``[2 K + 2]`` that never fall, from "nothing is flagged" to "everything is"."""

    fp: Floats  # false positives
    tp: Floats  # true positives
    overlap: Floats  # sum of the weights of the true positives


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve; ties count half.

    Args:
        scores: ``[N]`` finite, higher is more anomalous.
        labels: ``[N]`` 0 normal, 1 anomalous.

    Raises:
        ValueError: Sizes differ, a score is not finite, a label is neither 0 nor 1, or one class is absent.
    """
    return _auroc(_curve(*_checked(scores, labels)))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall curve as a sum of steps, without interpolation; arguments and errors as in `auroc`."""
    return _average_precision(_curve(*_checked(scores, labels)))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """The largest F1 over all thresholds; arguments and errors as in `auroc`."""
    return _f1_max(_curve(*_checked(scores, labels)))


def aupro(maps: ArrayLike, masks: ArrayLike, max_fpr: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    Every 8-connected region of the masks counts the same, whatever its area. The curve is interpolated at the limit.

    Args:
        maps: ``[N, H, W]`` finite, higher is more anomalous.
        masks: ``[N, H, W]`` 0 or False normal, 1 or True anomalous; images without a region count as normal pixels.
        max_fpr: Upper end of the integral, in (0, 1].

    Raises:
        ValueError: Shapes differ, a value is not finite, the masks have no region or no normal pixel, or max_fpr is out of range.
    """
    return _aupro(_pixel_curve(maps, masks), max_fpr)


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """``image_auroc``, ``image_ap`` and ``image_f1max``; arguments and errors as in `auroc`."""
    curve = _curve(*_checked(scores, labels))
    return {"image_auroc": _auroc(curve), "image_ap": _average_precision(curve), "image_f1max": _f1_max(curve)}


def pixel_metrics(maps: ArrayLike, masks: ArrayLike, max_fpr: float = 0.3) -> dict[str, float]:
    """``pixel_auroc``, ``pixel_ap``, ``pixel_f1max`` and ``pixel_aupro`` from one sort; arguments and errors as in `aupro`."""
    curve = _pixel_curve(maps, masks)
    return {
        "pixel_auroc": _auroc(curve),
        "pixel_ap": _average_precision(curve),
        "pixel_f1max": _f1_max(curve),
        "pixel_aupro": _aupro(curve, max_fpr),
    }


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, at 95 % unless ``z`` says otherwise.

    Raises:
        ValueError: There are no trials, or successes are not between 0 and trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and trials, and trials be positive, not {successes} of {trials}")
    share, spread = successes / trials, z * z / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    # At 0 and at all successes the bound is exact; rounding must not move it.
    low = 0.0 if successes == 0 else (centre - half) / (1 + spread)
    high = 1.0 if successes == trials else (centre + half) / (1 + spread)
    return low, high


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Scores and labels of the same shape, as arrays, with both classes present."""
    values, classes = np.asarray(scores), np.asarray(labels)
    if values.shape != classes.shape:
        raise ValueError(f"scores and labels differ in shape: {list(values.shape)} and {list(classes.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    if classes.dtype != np.bool_ and not ((classes == 0) | (classes == 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous)")
    positive = classes.astype(bool)
    if positive.all() or not positive.any():
        raise ValueError("not defined for one class only: both normal and anomalous items are needed")
    return values, positive


def _curve(scores: NDArray[np.generic], positive: NDArray[np.bool_], weights: Floats | None = None) -> _Curve:
    """Sort once and count; ``weights`` belong to the positive items, in their order in memory."""
    normal, anomalous = np.sort(scores[~positive]), scores[positive]
    order = np.argsort(anomalous)[::-1]
    ranked = anomalous[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # where each run of equal scores ends
    fp_above = len(normal) - np.searchsorted(normal, ranked[last], side="right")  # normal items strictly above the score
    fp = len(normal) - np.searchsorted(normal, ranked[last], side="left")  # and with the ties
    tp = (last + 1).astype(np.float64)
    overlap = tp if weights is None else np.cumsum(weights[order])[last]

    def corners(before: Floats, after: Floats, end: float) -> Floats:
        return np.concatenate([[0.0], np.stack([before, after], axis=1).ravel(), [end]])

    def shifted(values: Floats) -> Floats:
        return np.concatenate([[0.0], values[:-1]])

    return _Curve(
        fp=corners(fp_above.astype(np.float64), fp.astype(np.float64), len(normal)),
        tp=corners(shifted(tp), tp, tp[-1]),
        overlap=corners(shifted(overlap), overlap, overlap[-1]),
    )


def _pixel_curve(maps: ArrayLike, masks: ArrayLike) -> _Curve:
    """The curve of all pixels, each anomalous one weighted by 1 / (area of its region x number of regions)."""
    values, positive = _checked(maps, masks)
    if values.ndim != 3:
        raise ValueError(f"maps must be [N, H, W], not {list(values.shape)}")
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True  # 8-connected within an image, unconnected across images
    regions, count = ndimage.label(positive, structure)
    ids = regions[positive]
    return _curve(values, positive, 1 / (np.bincount(ids)[ids] * count))


def _auroc(curve: _Curve) -> float:
    return float(np.trapezoid(curve.tp, curve.fp) / (curve.tp[-1] * curve.fp[-1]))


def _average_precision(curve: _Curve) -> float:
    tp, fp = curve.tp[2:-1:2], curve.fp[2:-1:2]
    return float(np.sum(np.diff(tp, prepend=0.0) * tp / (tp + fp)) / tp[-1])


def _f1_max(curve: _Curve) -> float:
    return float(np.max(2 * curve.tp / (curve.tp + curve.fp + curve.tp[-1])))


def _aupro(curve: _Curve, max_fpr: float) -> float:
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], not {max_fpr}")
    fpr, overlap = curve.fp / curve.fp[-1], curve.overlap
    stop = int(np.searchsorted(fpr, max_fpr, side="right"))  # points up to the limit, the limit included
    if stop < len(fpr):
        share = (max_fpr - fpr[stop - 1]) / (fpr[stop] - fpr[stop - 1])
        fpr = np.append(fpr[:stop], max_fpr)
        overlap = np.append(overlap[:stop], overlap[stop - 1] + share * (overlap[stop] - overlap[stop - 1]))
    return float(np.trapezoid(overlap, fpr) / max_fpr)
