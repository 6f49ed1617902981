"""How well scores, maps and decisions agree with the truth. Exact; definitions and sources are in ``docs/metrics.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gladad.metrics.curves import Curve, area_until, best_f1, corners, precision_sum
from gladad.metrics.pixel import MAX_FPR, NAMES, PIMO_BOUNDS, PixelMetrics, PixelResult, checked, curve_points, region_areas

__all__ = [
    "NAMES",
    "DecisionRow",
    "PixelMetrics",
    "PixelResult",
    "aupimo",
    "aupimo_per_image",
    "aupro",
    "auroc",
    "average_precision",
    "decisions",
    "f1_max",
    "image_curves",
    "image_metrics",
    "pb2",
    "pg2",
    "pixel_metrics",
    "wilson_interval",
]

TOLERATED = 0.02
"""Share of wrong decisions at which PG2 and PB2 are read."""


@dataclass(frozen=True)
class DecisionRow:
    """The decisions on the images of one kind.

    Attributes:
        defect_type: The kind.
        anomalous: Whether its images are to be rejected.
        count: Images.
        rejected: Images that were rejected.
        rate: Their share: recall of a defect type, false-reject rate of a normal one.
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
    """

    defect_type: str
    anomalous: bool
    count: int
    rejected: int
    rate: float
    low: float
    high: float


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve; ties count half.

    Args:
        scores: ``[N]`` finite, higher is more anomalous.
        labels: ``[N]`` 0 normal, 1 anomalous.

    Raises:
        ValueError: Sizes differ, a score is not finite, a label is neither 0 nor 1, or one class is absent.
    """
    curve = _curve(scores, labels)
    return float(np.trapezoid(curve.tp, curve.fp) / (curve.tp[-1] * curve.fp[-1]))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the precision-recall curve as a sum of steps, without interpolation; arguments and errors as in `auroc`."""
    curve = _curve(scores, labels)
    inner = Curve(curve.fp[1:-1], curve.tp[1:-1], curve.overlap[1:-1])
    return precision_sum(inner, 0.0) / float(curve.tp[-1])


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """The largest F1 over all thresholds; arguments and errors as in `auroc`."""
    curve = _curve(scores, labels)
    return best_f1(curve.fp, curve.tp, float(curve.tp[-1]))


def pg2(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of good parts passed while at most 2 % of bad ones are missed; arguments and errors as in `auroc`.

    The threshold is the highest that does: parts score up to it pass. With fewer than 50 bad parts none may be missed.
    """
    normal, anomalous = _split(scores, labels)
    first_found = np.sort(anomalous)[math.floor(TOLERATED * len(anomalous) + 1e-9)]
    return float(np.mean(normal < first_found))


def pb2(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of bad parts found while at most 2 % of good ones are rejected; arguments and errors as in `auroc`.

    The threshold is the lowest that does: parts that score above it are rejected. With fewer than 50 good parts none may be rejected.
    """
    normal, anomalous = _split(scores, labels)
    last_passed = np.sort(normal)[::-1][math.floor(TOLERATED * len(normal) + 1e-9)]
    return float(np.mean(anomalous > last_passed))


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
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], not {max_fpr}")
    values, positive = _images(maps, masks)
    anomalous = values[positive]
    normal_pixels = positive.size - len(anomalous)
    if not normal_pixels or not len(anomalous):
        raise ValueError("not defined for one class only: both normal and anomalous pixels are needed")
    weights = 1 / np.concatenate([region_areas(mask) for mask in positive]).astype(np.float64)
    order = np.argsort(anomalous, kind="stable")[::-1]
    highest = _highest_normal(values, positive, math.floor(max_fpr * normal_pixels) + 1, normal_pixels)
    curve = corners(highest, anomalous[order], weights[order]).closed(normal_pixels)
    return area_until(curve.fp / normal_pixels, curve.overlap, max_fpr) / (max_fpr * float(curve.overlap[-1]))


def aupimo(maps: ArrayLike, masks: ArrayLike, fpr_bounds: tuple[float, float] = PIMO_BOUNDS) -> float:
    """Mean over the anomalous images of the area under the per-image overlap curve (Bertoldo et al., BMVC 2024).

    For each anomalous image, the share of its anomalous pixels at or above a threshold, against the mean over the *normal images* of the
    share of their pixels at or above it, averaged over the logarithm of the latter between the bounds.

    Args:
        maps: ``[N, H, W]`` finite, higher is more anomalous.
        masks: ``[N, H, W]`` 0 or False normal, 1 or True anomalous; images with an anomalous pixel are the anomalous ones.
        fpr_bounds: Ends of the integral, rising, in (0, 1]. Below the first false positive the curve is what is found without any.

    Raises:
        ValueError: Shapes differ, a value is not finite, there is no normal or no anomalous image, or the bounds are out of order.
    """
    return float(np.mean(aupimo_per_image(maps, masks, fpr_bounds)))


def aupimo_per_image(maps: ArrayLike, masks: ArrayLike, fpr_bounds: tuple[float, float] = PIMO_BOUNDS) -> tuple[float, ...]:
    """AUPIMO of each anomalous image, in order; arguments and errors as in `aupimo`."""
    with _collected(maps, masks) as collected:
        return collected.aupimo(fpr_bounds)


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """``image_auroc``, ``image_ap``, ``image_f1max``, ``image_pg2`` and ``image_pb2``; arguments and errors as in `auroc`."""
    functions = {"auroc": auroc, "ap": average_precision, "f1max": f1_max, "pg2": pg2, "pb2": pb2}
    return {f"image_{name}": function(scores, labels) for name, function in functions.items()}


def image_curves(scores: ArrayLike, labels: ArrayLike) -> dict[str, dict[str, list[float]]]:
    """``roc`` and ``pr`` as ``{"x": [...], "y": [...]}`` of at most 200 points; arguments and errors as in `auroc`."""
    curve = _curve(scores, labels)
    found = curve.tp > 0
    precision = curve.tp[found] / (curve.tp[found] + curve.fp[found])
    return {
        "roc": curve_points(curve.fp / curve.fp[-1], curve.tp / curve.tp[-1]),
        "pr": curve_points(curve.tp[found] / curve.tp[-1], precision),
    }


def pixel_metrics(maps: ArrayLike, masks: ArrayLike, max_fpr: float = MAX_FPR) -> dict[str, float]:
    """All of `NAMES` that are defined, in one pass; arguments and errors as in `aupro`. Without a normal image there is no AUPIMO."""
    with _collected(maps, masks) as collected:
        return collected.compute(max_fpr).metrics


def decisions(labels: ArrayLike, rejected: ArrayLike, defect_types: Sequence[str]) -> list[DecisionRow]:
    """How many images of each kind were rejected, normal kinds first.

    Args:
        labels: ``[N]`` 0 normal, 1 anomalous.
        rejected: ``[N]`` the decisions.
        defect_types: ``[N]`` the kind of each image.
    """
    rows = []
    kinds = sorted({(bool(label), kind) for label, kind in zip(np.asarray(labels).tolist(), defect_types, strict=True)})
    for anomalous, kind in kinds:
        members = [
            bool(decision)
            for label, decision, other in zip(np.asarray(labels), np.asarray(rejected), defect_types, strict=True)
            if bool(label) == anomalous and other == kind
        ]
        low, high = wilson_interval(sum(members), len(members))
        rows.append(DecisionRow(kind, anomalous, len(members), sum(members), sum(members) / len(members), low, high))
    return rows


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


def _classes(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    values, positive = checked(scores, labels)
    if positive.all() or not positive.any():
        raise ValueError("not defined for one class only: both normal and anomalous items are needed")
    return values, positive


def _split(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    values, positive = _classes(scores, labels)
    return values[~positive], values[positive]


def _curve(scores: ArrayLike, labels: ArrayLike) -> Curve:
    normal, anomalous = _split(scores, labels)
    return corners(normal, np.sort(anomalous)[::-1]).closed(len(normal))


def _images(maps: ArrayLike, masks: ArrayLike) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    values, positive = checked(maps, masks)
    if values.ndim != 3:
        raise ValueError(f"maps must be [N, H, W], not {list(values.shape)}")
    return values, positive


def _highest_normal(values: NDArray[np.generic], positive: NDArray[np.bool_], count: int, total: int) -> NDArray[np.generic]:
    """At least the ``count`` highest of the ``total`` normal values and all equal to one of them; more where that is found out faster."""
    stride = max(1, values.size // 50_000)
    some = np.sort(values.ravel()[::stride][~positive.ravel()[::stride]])
    place = len(some) - math.ceil(len(some) * (count / total + 0.01))
    if place > 0:
        taken = values >= some[place]
        taken &= ~positive
        found = values[taken]
        if len(found) >= count:
            return np.asarray(found)
    everything: NDArray[np.generic] = values[~positive]
    return everything


def _collected(maps: ArrayLike, masks: ArrayLike) -> PixelMetrics:
    collected = PixelMetrics()
    for one, mask in zip(*_images(maps, masks), strict=True):
        collected.add(one, mask)
    return collected
