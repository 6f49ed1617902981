"""How well scores, maps and decisions agree with the truth. Exact; definitions and sources are in ``docs/metrics.md``.

Scores are measured by scikit-learn, pixels by `gladad.metrics.pixel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from gladad.metrics.curves import curve_points
from gladad.metrics.pixel import MAX_FPR, PIMO_BOUNDS, PixelMetrics, checked

TOLERATED = 0.02  # share of wrong decisions at which PG2 and PB2 are read
Z_95 = 1.959964  # quantile of the normal distribution that leaves 2.5 % above it


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve; ties count half.

    Args:
        scores: ``[N]`` finite, higher is more anomalous.
        labels: ``[N]`` 0 normal, 1 anomalous.

    Raises:
        ValueError: Sizes differ, a score is not finite, a label is neither 0 nor 1, or one class is absent.
    """
    values, positive = _classes(scores, labels)
    return float(roc_auc_score(positive, values))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall curve as a sum of steps, without interpolation; arguments and errors as in `auroc`."""
    values, positive = _classes(scores, labels)
    return float(average_precision_score(positive, values))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """The largest F1 over all thresholds; arguments and errors as in `auroc`."""
    precision, recall = _precision_recall(scores, labels)
    return float(np.max(2 * precision * recall / (precision + recall)))


def pg2(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of good parts passed while at most 2 % of bad ones are missed; arguments and errors as in `auroc`.

    The threshold is the highest that does: parts score up to it pass. With fewer than 50 bad parts none may be missed.
    """
    values, positive = _classes(scores, labels)
    first_found = np.sort(values[positive])[math.floor(TOLERATED * positive.sum() + 1e-9)]
    return float(np.mean(values[~positive] < first_found))


def pb2(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of bad parts found while at most 2 % of good ones are rejected; arguments and errors as in `auroc`.

    The threshold is the lowest that does: parts that score above it are rejected. With fewer than 50 good parts none may be rejected.
    """
    values, positive = _classes(scores, labels)
    last_passed = np.sort(values[~positive])[::-1][math.floor(TOLERATED * (~positive).sum() + 1e-9)]
    return float(np.mean(values[positive] > last_passed))


def aupro(maps: ArrayLike, masks: ArrayLike, max_fpr: float = MAX_FPR) -> float:
    """Area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    Every 8-connected region of the masks counts the same, whatever its area. The curve is interpolated at the limit
    (Bergmann et al., IJCV 2021, section 5.1).

    Args:
        maps: ``[N, H, W]`` finite, higher is more anomalous.
        masks: ``[N, H, W]`` 0 or False normal, 1 or True anomalous; images without a region count as normal pixels.
        max_fpr: Upper end of the integral, in (0, 1].

    Raises:
        ValueError: Shapes differ, a value is not finite, the masks have no region or no normal pixel, or max_fpr is out of range.
    """
    with _collected(maps, masks) as collected:
        return collected.compute(max_fpr).metrics["pixel_aupro"]


def aupimo(maps: ArrayLike, masks: ArrayLike, fpr_bounds: tuple[float, float] = PIMO_BOUNDS) -> float:
    """Mean over the anomalous images of the area under the per-image overlap curve (Bertoldo et al., BMVC 2024).

    For each image with an anomalous pixel, the share of these at or above a threshold, against the mean over the *normal images* of the
    share of their pixels at or above it, averaged over the logarithm of the latter between the bounds, which rise in (0, 1]. Below the
    first false positive the curve is what is found without any. Maps and masks are as in `aupro`.

    Raises:
        ValueError: Shapes differ, a value is not finite, there is no normal or no anomalous image, or the bounds are out of order.
    """
    with _collected(maps, masks) as collected:
        each = collected.aupimo(fpr_bounds)
    if not each:
        raise ValueError("AUPIMO needs at least one normal and one anomalous image")
    return float(np.mean(each))


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """``image_auroc``, ``image_ap``, ``image_f1max``, ``image_pg2`` and ``image_pb2``; arguments and errors as in `auroc`."""
    functions = {"image_auroc": auroc, "image_ap": average_precision, "image_f1max": f1_max, "image_pg2": pg2, "image_pb2": pb2}
    return {name: function(scores, labels) for name, function in functions.items()}


def image_curves(scores: ArrayLike, labels: ArrayLike) -> dict[str, dict[str, list[float]]]:
    """``roc`` and ``pr`` as ``{"x": [...], "y": [...]}`` of at most 200 points; arguments and errors as in `auroc`."""
    precision, recall = _precision_recall(scores, labels)
    values, positive = _classes(scores, labels)
    return {"roc": curve_points(*roc_curve(positive, values)[:2]), "pr": curve_points(recall, precision)}


def decisions(labels: ArrayLike, rejected: ArrayLike, defect_types: Sequence[str]) -> list[dict[str, Any]]:
    """How many images of each kind were rejected, normal kinds first.

    Args:
        labels: ``[N]`` 0 normal, 1 anomalous.
        rejected: ``[N]`` the decisions.
        defect_types: ``[N]`` the kind of each image.

    Returns:
        For each kind ``defect_type``, ``anomalous``, ``count`` of images, ``rejected`` of them, ``rate`` (their share: recall of a defect
        type, false-reject rate of a normal one), and ``low`` and ``high``, the ends of its 95 % Wilson interval.
    """
    kinds: dict[tuple[bool, str], list[bool]] = {}
    for label, decision, kind in zip(np.asarray(labels), np.asarray(rejected), defect_types, strict=True):
        kinds.setdefault((bool(label), kind), []).append(bool(decision))
    rows = []
    for (anomalous, kind), found in sorted(kinds.items()):
        hits, count = sum(found), len(found)
        low, high = wilson_interval(hits, count)
        row = {"defect_type": kind, "anomalous": anomalous, "count": count, "rejected": hits, "rate": hits / count}
        rows.append(row | {"low": low, "high": high})
    return rows


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    Raises:
        ValueError: There are no trials, or successes are not between 0 and trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and trials, and trials be positive, not {successes} of {trials}")
    share, spread = successes / trials, Z_95**2 / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    # At 0 and at all successes the bound is exact; rounding must not move it.
    low = 0.0 if successes == 0 else (centre - half) / (1 + spread)
    high = 1.0 if successes == trials else (centre + half) / (1 + spread)
    return low, high


def _classes(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, positive = checked(scores, labels)
    if positive.all() or not positive.any():
        raise ValueError("not defined for one class only: both normal and anomalous items are needed")
    return values.astype(np.float64), positive


def _precision_recall(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall while the threshold falls, from where the first anomalous item is found."""
    values, positive = _classes(scores, labels)
    precision, recall, _ = precision_recall_curve(positive, values)
    return precision[recall > 0][::-1], recall[recall > 0][::-1]


def _collected(maps: ArrayLike, masks: ArrayLike) -> PixelMetrics:
    values, positive = checked(maps, masks)
    if values.ndim != 3:
        raise ValueError(f"maps must be [N, H, W], not {list(values.shape)}")
    collected = PixelMetrics()
    for one, mask in zip(values, positive, strict=True):
        collected.add(one, mask)
    return collected
