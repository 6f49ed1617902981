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


def slow_f1_max(scores: np.ndarray, labels: np.ndarray) -> float:
    """The largest F1 over all thresholds at scores."""
    best = 0.0
    for threshold in set(scores.tolist()):
        flagged = scores >= threshold
        hits = int((flagged & (labels == 1)).sum())
        best = max(best, 2 * hits / (int(flagged.sum()) + int((labels == 1).sum())))
    return best
