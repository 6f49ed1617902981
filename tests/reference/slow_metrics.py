"""Metrics by their definition: every threshold in turn, regions by flood fill. Slow, and written apart from the real ones."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def regions_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """The 8-connected regions of a mask ``[H, W]``, each as a set of pixels."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while todo:
        stack = [todo.pop()]
        region = set(stack)
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            region |= near
            stack.extend(near)
        regions.append(region)
    return regions


def slow_aupro(maps: np.ndarray, masks: np.ndarray, max_fpr: float) -> float:
    """Mean overlap of the regions against the false-positive rate, integrated to ``max_fpr`` and divided by it."""
    regions = [(index, region) for index, mask in enumerate(masks) for region in regions_of(mask)]
    normal = ~masks.astype(bool)
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        flagged = maps >= threshold
        fpr = float((flagged & normal).sum() / normal.sum())
        overlaps = [sum(bool(flagged[index][pixel]) for pixel in region) / len(region) for index, region in regions]
        points.append((fpr, sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 > max_fpr:
            y1 = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
            return (area + (max_fpr - x0) * (y0 + y1) / 2) / max_fpr
        area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


def slow_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs of an anomalous and a normal item that are in the right order; pairs of equal score count half."""
    pairs = [(bad, good) for bad in scores[labels == 1].tolist() for good in scores[labels == 0].tolist()]
    return sum((bad > good) + 0.5 * (bad == good) for bad, good in pairs) / len(pairs)


def slow_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Precision at every distinct score from the highest, times the share of anomalous items newly found there."""
    area = before = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        flagged = scores >= threshold
        found = float((flagged & (labels == 1)).sum())
        area += (found - before) / (labels == 1).sum() * found / flagged.sum()
        before = found
    return area


def slow_f1_max(scores: np.ndarray, labels: np.ndarray) -> float:
    """The largest F1 over all thresholds at scores."""
    best = 0.0
    for threshold in set(scores.tolist()):
        flagged = scores >= threshold
        hits = int((flagged & (labels == 1)).sum())
        best = max(best, 2 * hits / (int(flagged.sum()) + int((labels == 1).sum())))
    return best


def slow_aupimo(maps: np.ndarray, masks: np.ndarray, bounds: tuple[float, float]) -> list[float]:
    """For each anomalous image: true-positive rate over the log of the normal images' mean false-positive rate, integrated."""
    normal = [image for image, mask in zip(maps, masks, strict=True) if not mask.any()]
    results = []
    for image, mask in zip(maps, masks, strict=True):
        if not mask.any():
            continue
        points = []  # (rate, found), just above every value and with it
        for value in sorted(set(maps.ravel().tolist()), reverse=True):
            for flag in (np.greater, np.greater_equal):
                rate = sum(float(flag(one, value).mean()) for one in normal) / len(normal)
                points.append((rate, float(flag(image[mask], value).mean())))
        without = max((found for rate, found in points if rate == 0), default=0.0)
        line = [(np.log(rate), found) for rate, found in points if rate > 0]
        line = [(min(line[0][0], np.log(bounds[0])) - 1, without), (line[0][0], without), *line]
        area = 0.0
        low, high = np.log(bounds[0]), np.log(bounds[1])
        for (x0, y0), (x1, y1) in pairwise(line):
            left, right = max(x0, low), min(x1, high)
            if right > left:
                at = [y0 + (y1 - y0) * (x - x0) / (x1 - x0) for x in (left, right)]
                area += (right - left) * (at[0] + at[1]) / 2
        results.append(area / (high - low))
    return results


def slow_pg2(scores: np.ndarray, labels: np.ndarray) -> float:
    """Good parts passed at the best threshold that misses at most 2 % of the bad ones; parts score up to it pass."""
    best = 0.0
    for threshold in [*scores, *(scores - 1e-9)]:
        passed = scores <= threshold
        if passed[labels == 1].mean() <= 0.02:
            best = max(best, float(passed[labels == 0].mean()))
    return best


def slow_pb2(scores: np.ndarray, labels: np.ndarray) -> float:
    """Bad parts found at the best threshold that rejects at most 2 % of the good ones."""
    best = 0.0
    for threshold in [*scores, *(scores - 1e-9)]:
        rejected = scores > threshold
        if rejected[labels == 0].mean() <= 0.02:
            best = max(best, float(rejected[labels == 1].mean()))
    return best
