"""Pixel metrics of any number of images, exact, in bounded memory.

All pixels are never held. The values of each image are sorted and put into a temporary file; at the end the range of values is cut into
slices of a few million pixels, the curve is built slice by slice from the top, and every metric is a sum over the slices.
"""

from __future__ import annotations

import io
import math
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from gladad.metrics.curves import Floats, area_until, corners, curve_points

MAX_FPR = 0.3
MAX_FPR_STRICT = 0.05
PIMO_BOUNDS = (1e-5, 1e-4)
SLICE = 4_000_000
SAMPLES = 256  # values of each image that say where to cut
EIGHT_CONNECTED = np.ones((3, 3), bool)
NORMAL, ANOMALOUS, AREAS = range(3)  # what is kept of an image: its sorted values, and the areas of the regions of the anomalous ones

NAMES = ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "pixel_aupro_05", "pixel_aupimo")


class PixelResult(NamedTuple):
    """What `PixelMetrics.compute` found."""

    metrics: dict[str, float]  # those of `NAMES` that are defined; pixel_aupro is up to max_fpr, pixel_aupro_05 to 0.05
    pro: dict[str, list[float]]  # the curve of pixel_aupro as {"x": [...], "y": [...]} of at most 200 points
    aupimo: tuple[float, ...]  # one value for each anomalous image, in the order of adding; empty where not defined


class _Stored(NamedTuple):
    """Where an array lies in the file."""

    place: int
    length: int
    dtype: np.dtype[Any]


class PixelMetrics:
    """Collects anomaly maps with their masks and computes all pixel metrics of them.

    The values are kept in a temporary file (4 bytes per pixel, in memory while there are few), and the memory needed does not grow with the
    number of images but for a few kilobytes each. The result does not depend on the order of images, bit for bit.

    Args:
        slice_size: Pixels worked on at a time; the file goes to disk beyond 16 bytes for each of them.
    """

    def __init__(self, slice_size: int = SLICE):
        self.slice_size = slice_size
        self._runs: list[list[_Stored]] = []
        self._samples: list[tuple[Floats, float]] = []
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=16 * slice_size)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __enter__(self) -> PixelMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the temporary file; without a ``with`` block it goes with this object."""
        self._file.close()

    def add(self, anomaly_map: ArrayLike, mask: ArrayLike) -> None:
        """Take one image.

        Args:
            anomaly_map: ``[H, W]`` finite, higher is more anomalous; any real type, kept as float32 where that loses nothing.
            mask: ``[H, W]`` 0 or False normal, 1 or True anomalous.

        Raises:
            ValueError: Shapes differ, a value is not finite, or a mask has other values.
        """
        values, positive = checked(anomaly_map, mask)
        if values.ndim != 2:
            raise ValueError(f"a map must be [H, W], not {list(values.shape)}")
        values = values.astype(np.result_type(values.dtype, np.float32))
        normal, anomalous, areas = np.sort(values[~positive]), values[positive], _region_areas(positive)
        order = np.lexsort((areas, anomalous))
        arrays, run = (normal, anomalous[order], areas[order]), list[_Stored]()
        self._file.seek(0, io.SEEK_END)
        for array in arrays:
            run.append(_Stored(self._file.tell(), len(array), array.dtype))
            self._file.write(array.tobytes())
        self._runs.append(run)
        for array in arrays[:AREAS]:
            picked = array[np.linspace(0, len(array) - 1, min(SAMPLES, len(array))).astype(int)].astype(np.float64)
            self._samples.append((picked, len(array)))

    @property
    def has_both_classes(self) -> bool:
        """Whether there are normal and anomalous pixels by now, so that metrics are defined."""
        return all(self._total(which) for which in (NORMAL, ANOMALOUS))

    def _total(self, which: int) -> int:
        return sum(run[which].length for run in self._runs)

    def compute(self, max_fpr: float = MAX_FPR) -> PixelResult:
        """All metrics of what was added so far; more may be added afterwards.

        Args:
            max_fpr: Upper end of the integral of ``pixel_aupro``, in (0, 1].

        Raises:
            ValueError: There is no anomalous or no normal pixel, or max_fpr is out of range.
        """
        if not 0 < max_fpr <= 1:
            raise ValueError(f"max_fpr must lie in (0, 1], not {max_fpr}")
        if not self.has_both_classes:
            raise ValueError("not defined for one class only: both normal and anomalous items are needed")
        sums = _Sums(self._total(NORMAL), self._total(ANOMALOUS), (max_fpr, MAX_FPR_STRICT))
        for piece in self._pieces():
            sums.take(piece)
        metrics, each = sums.metrics(), self.aupimo()
        if each:
            metrics["pixel_aupimo"] = float(np.mean(each))
        return PixelResult(metrics, sums.curve(), each)

    def aupimo(self, fpr_bounds: tuple[float, float] = PIMO_BOUNDS) -> tuple[float, ...]:
        """AUPIMO (`gladad.metrics.image.aupimo`) of each anomalous image, in the order of adding; none without a normal image.

        Raises:
            ValueError: The bounds are out of order.
        """
        low, high = fpr_bounds
        if not 0 < low < high <= 1:
            raise ValueError(f"fpr_bounds must rise within (0, 1], not {fpr_bounds}")
        anomalous = [run[ANOMALOUS] for run in self._runs if run[ANOMALOUS].length]
        normal = [run[NORMAL] for run in self._runs if not run[ANOMALOUS].length]
        if not normal or not anomalous:
            return ()
        values, rates = self._shared_rates(normal, high)
        each = []
        for stored in anomalous:
            found = self._read(stored)
            above, within = (1 - found.searchsorted(values, side) / len(found) for side in ("right", "left"))
            each.append(_pimo_area(rates, above, within, fpr_bounds))
        return tuple(each)

    def _read(self, stored: _Stored, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        stop, size = stored.length if stop is None else stop, stored.dtype.itemsize
        self._file.seek(stored.place + start * size)
        return np.frombuffer(self._file.read((stop - start) * size), stored.dtype)

    def _cuts(self) -> Floats:
        """Rising values that cut all pixels into parts of about `self.slice_size`."""
        values = np.concatenate([values for values, _ in self._samples])
        weights = np.concatenate([np.full(len(values), size / max(len(values), 1)) for values, size in self._samples])
        order = np.lexsort((weights, values))
        reached = np.floor(np.cumsum(weights[order]) / self.slice_size)
        return np.unique(values[order][np.flatnonzero(np.diff(reached, prepend=0.0) > 0)])

    def _pieces(self) -> Iterator[Floats]:
        """The `corners` from the highest value to the lowest, slice by slice; the fp of the last is that of its lowest anomalous value."""
        cuts, before = self._cuts(), np.zeros((3, 1))
        normal_bounds, bounds = ([self._bounds(run[which], cuts) for run in self._runs] for which in (NORMAL, ANOMALOUS))
        for part in range(2 * len(cuts), -1, -1):  # even parts lie between two cuts, odd ones are a cut itself
            found, sizes = self._part(ANOMALOUS, part, bounds), self._part(AREAS, part, bounds)
            order = np.lexsort((sizes, found))[::-1]
            weights = 1 / sizes[order].astype(np.float64)
            count = sum(ends[part + 1] - ends[part] for ends in normal_bounds)
            end = before + np.array([[count], [len(found)], [0.0]])
            if len(found):
                if part % 2:  # all of one value: counting is enough, however many there are
                    piece = before + np.array([[0, count], [0, len(found)], [0, float(weights.sum())]])
                else:
                    piece = before + corners(self._part(NORMAL, part, normal_bounds), found[order], weights)
                end[2] = piece[2, -1]
                yield piece
            before = end

    def _bounds(self, stored: _Stored, cuts: Floats) -> NDArray[np.int64]:
        """Where the parts begin in the sorted values of an image: ``2 * len(cuts) + 2`` places."""
        values = self._read(stored)
        inner = np.stack([values.searchsorted(cuts, "left"), values.searchsorted(cuts, "right")], axis=1)
        return np.concatenate([[0], inner.ravel(), [len(values)]])

    def _part(self, which: int, part: int, bounds: list[NDArray[np.int64]]) -> NDArray[Any]:
        """The values of one part of all images."""
        return np.concatenate([self._read(run[which], *ends[part : part + 2]) for run, ends in zip(self._runs, bounds, strict=True)])

    def _shared_rates(self, normal: Sequence[_Stored], limit: float) -> tuple[Floats, Floats]:
        """The highest distinct values of normal images, falling, and the mean false-positive rate at each, until it passes the limit."""
        values, weights = np.empty(0), np.empty(0)
        for stored in normal:
            # What one image alone can add before the mean passes the limit; what others add only lowers that.
            most = min(stored.length, math.floor(limit * len(normal) * stored.length) + 1)
            top = self._read(stored, stored.length - most)
            top = top[top >= _floor_of(values, weights, limit)]
            values = np.concatenate([values, top])
            weights = np.concatenate([weights, np.full(len(top), 1 / (stored.length * len(normal)))])
            if len(values) > self.slice_size:
                keep = values >= _floor_of(values, weights, limit)
                values, weights = values[keep], weights[keep]
        order = np.lexsort((weights, values))[::-1]
        values, rates = values[order], np.cumsum(weights[order])
        last = np.flatnonzero(np.append(values[1:] != values[:-1], True))
        stop = int(np.searchsorted(rates[last], limit)) + 1
        return values[last][:stop], rates[last][:stop]


class _Sums:
    """Metrics as sums over the pieces of a curve."""

    def __init__(self, negatives: int, positives: int, limits: tuple[float, float]):
        self.negatives, self.positives, self.limits = float(negatives), float(positives), limits
        self.end = np.zeros((3, 1))
        self.roc = self.precision = self.f1 = 0.0
        self.pro = [0.0, 0.0]
        self.points: list[Floats] = [np.zeros((2, 1))]

    def take(self, piece: Floats) -> None:
        fp, tp, overlap = np.concatenate([self.end, piece], axis=1)
        self.roc += float(np.trapezoid(tp, fp))
        with_score = tp[2::2]  # without the corners just above a score, at which nothing new is found
        self.precision += float(np.sum(np.diff(tp[::2]) * with_score / (with_score + fp[2::2])))
        self.f1 = max(self.f1, float(np.max(2 * tp / (tp + fp + self.positives))))
        for index, limit in enumerate(self.limits):
            if fp[0] < limit * self.negatives:
                self.pro[index] += area_until(fp, overlap, limit * self.negatives)
        kept = _spread(fp / self.negatives, tp / self.positives)
        self.points.append(np.stack([fp[kept], overlap[kept]]))
        self.end = piece[:, -1:]

    def metrics(self) -> dict[str, float]:
        """All but AUPIMO, after the last piece: what is left of the curve has found everything and only adds false positives."""
        fp, tp, regions = self.end.ravel().tolist()
        pro = [area + max(0.0, limit * self.negatives - fp) * regions for area, limit in zip(self.pro, self.limits, strict=True)]
        return {
            "pixel_auroc": (self.roc + (self.negatives - fp) * tp) / (self.negatives * self.positives),
            "pixel_ap": self.precision / self.positives,
            "pixel_f1max": max(self.f1, 2 * tp / (tp + self.negatives + self.positives)),
            "pixel_aupro": pro[0] / (self.limits[0] * self.negatives * regions),
            "pixel_aupro_05": pro[1] / (self.limits[1] * self.negatives * regions),
        }

    def curve(self) -> dict[str, list[float]]:
        """The PRO curve up to the first limit."""
        limit, regions = self.limits[0], float(self.end[2, 0])
        points = np.concatenate([*self.points, [[self.negatives], [regions]]], axis=1)
        fpr, pro = points / np.array([[self.negatives], [regions]])
        shown = int(np.searchsorted(fpr, limit, side="right"))
        return curve_points(np.append(fpr[:shown], limit), np.append(pro[:shown], np.interp(limit, fpr, pro)))


def checked(values: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Scores and labels of the same shape as arrays, the labels as bool.

    Raises:
        ValueError: Shapes differ, a score is not finite, or a label is neither 0 nor 1.
    """
    scores, classes = np.asarray(values), np.asarray(labels)
    if scores.shape != classes.shape:
        raise ValueError(f"scores and labels differ in shape: {list(scores.shape)} and {list(classes.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if classes.dtype != np.bool_ and not ((classes == 0) | (classes == 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (anomalous)")
    return scores, classes.astype(bool)


def _region_areas(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Area of the 8-connected region of each anomalous pixel of a mask ``[H, W]``, in the order of ``mask[mask]``."""
    if not mask.any():
        return np.empty(0, np.int32)
    ids = ndimage.label(mask, EIGHT_CONNECTED)[0][mask]
    return np.asarray(np.bincount(ids)[ids], np.int32)


def _spread(x: Floats, y: Floats, count: int = 1000) -> NDArray[np.int64]:
    """The numbers of enough points of a piece to draw it."""
    if len(x) <= count:
        return np.arange(len(x))
    length = np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))
    return np.minimum(np.unique(np.searchsorted(length, np.linspace(0, length[-1], count)) + 1), len(x) - 1)


def _floor_of(values: Floats, weights: Floats, limit: float) -> float:
    """The value at which the weights of all values from the top sum to more than the limit; minus infinity if they do not."""
    order = np.argsort(values)[::-1]
    stop = int(np.searchsorted(np.cumsum(weights[order]), limit * (1 + 1e-9), side="right"))
    return -math.inf if stop >= len(values) else float(values[order][stop])


def _pimo_area(rates: Floats, above: Floats, within: Floats, bounds: tuple[float, float]) -> float:
    """Mean of the true-positive rate over the logarithm of the shared false-positive rate between the bounds."""
    x = np.repeat(np.log(rates), 2)[:-1]
    # From (rate of one value, what is found just above the next) to (rate of the next, what is found with it).
    y = np.empty(2 * len(rates))
    y[0::2], y[1::2] = within, np.append(above[1:], within[-1])
    y = y[:-1]
    low, high = math.log(bounds[0]), math.log(bounds[1])
    if x[0] > low:  # below the first false positive: what is found without any
        x, y = np.concatenate([[low, x[0]], x]), np.concatenate([[above[0], above[0]], y])
    return (area_until(x, y, high) - area_until(x, y, low)) / (high - low)
