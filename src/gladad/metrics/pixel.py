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
from dataclasses import dataclass
from typing import IO, Any

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

NAMES = ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "pixel_aupro_05", "pixel_aupimo")


@dataclass(frozen=True)
class PixelResult:
    """What `PixelMetrics.compute` found.

    Attributes:
        metrics: Of ``pixel_auroc``, ``pixel_ap``, ``pixel_f1max``, ``pixel_aupro`` (to a false-positive rate of 0.3),
            ``pixel_aupro_05`` (0.05) and ``pixel_aupimo`` those that are defined.
        pro: The curve of ``pixel_aupro`` as ``{"x": [...], "y": [...]}`` of at most 200 points.
        aupimo: One value for each anomalous image, in the order of adding; empty where not defined.
    """

    metrics: dict[str, float]
    pro: dict[str, list[float]]
    aupimo: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Run:
    """Where the values of one image lie in the file: normal pixels, anomalous ones, areas of the regions of these."""

    offset: int
    normal: int
    anomalous: int
    dtype: np.dtype[Any]

    @property
    def places(self) -> tuple[int, int, int]:
        """Byte offsets of the three arrays."""
        second = self.offset + self.normal * self.dtype.itemsize
        return self.offset, second, second + self.anomalous * self.dtype.itemsize


class PixelMetrics:
    """Collects anomaly maps with their masks and computes all pixel metrics of them.

    The values are kept in a temporary file (4 bytes per pixel, in memory while there are few), and the memory needed does not grow with the
    number of images but for a few kilobytes each. The result does not depend on the order of images, bit for bit.

    Args:
        slice_size: Pixels worked on at a time; the file goes to disk beyond 16 bytes for each of them.
    """

    def __init__(self, slice_size: int = SLICE):
        self.slice_size = slice_size
        self._runs: list[_Run] = []
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
        areas = _region_areas(positive)
        normal, anomalous = np.sort(values[~positive]), values[positive]
        order = np.lexsort((areas, anomalous))
        offset = self._file.seek(0, io.SEEK_END)
        for array in (normal, anomalous[order], areas[order]):
            self._file.write(array.tobytes())
        self._runs.append(_Run(offset, len(normal), len(anomalous), normal.dtype))
        for array in (normal, anomalous[order]):
            picked = array[np.linspace(0, len(array) - 1, min(SAMPLES, len(array))).astype(int)].astype(np.float64)
            self._samples.append((picked, len(array)))

    @property
    def has_both_classes(self) -> bool:
        """Whether there are normal and anomalous pixels by now, so that metrics are defined."""
        return any(run.normal for run in self._runs) and any(run.anomalous for run in self._runs)

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
        negatives, positives = sum(run.normal for run in self._runs), sum(run.anomalous for run in self._runs)
        sums = _Sums(negatives, positives, (max_fpr, MAX_FPR_STRICT))
        for piece in self._pieces():
            sums.take(piece)
        metrics, each = sums.metrics(), self._aupimo(PIMO_BOUNDS)
        if each:
            metrics["pixel_aupimo"] = float(np.mean(each))
        return PixelResult(metrics, sums.curve(), each)

    def aupimo(self, fpr_bounds: tuple[float, float] = PIMO_BOUNDS) -> tuple[float, ...]:
        """AUPIMO of each anomalous image, in the order of adding; see `gladad.metrics.image.aupimo`.

        Raises:
            ValueError: There is no normal or no anomalous image, or the bounds are out of order.
        """
        low, high = fpr_bounds
        if not 0 < low < high <= 1:
            raise ValueError(f"fpr_bounds must rise within (0, 1], not {fpr_bounds}")
        each = self._aupimo(fpr_bounds)
        if not each:
            raise ValueError("AUPIMO needs at least one normal and one anomalous image")
        return each

    def _read(self, place: int, dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        self._file.seek(place + start * dtype.itemsize)
        return np.frombuffer(self._file.read((stop - start) * dtype.itemsize), dtype)

    def _cuts(self) -> Floats:
        """Rising values that cut all pixels into parts of about `self.slice_size`."""
        values = np.concatenate([values for values, _ in self._samples])
        weights = np.concatenate([np.full(len(values), size / max(len(values), 1)) for values, size in self._samples])
        order = np.lexsort((weights, values))
        reached = np.floor(np.cumsum(weights[order]) / self.slice_size)
        return np.unique(values[order][np.flatnonzero(np.diff(reached, prepend=0.0) > 0)])

    def _pieces(self) -> Iterator[Floats]:
        """The `corners` from the highest value to the lowest, slice by slice; the fp of the last is that of its lowest anomalous value."""
        cuts = self._cuts()
        bounds = [self._bounds(run, cuts) for run in self._runs]
        before = np.zeros((3, 1))
        for part in range(2 * len(cuts), -1, -1):  # even parts lie between two cuts, odd ones are a cut itself
            at_cut = part % 2 == 1
            normal, anomalous, areas = [np.empty(0, np.float32)], [np.empty(0, np.float32)], [np.empty(0, np.int32)]
            count = 0
            for run, (normal_bounds, anomalous_bounds) in zip(self._runs, bounds, strict=True):
                start, stop = normal_bounds[part : part + 2]
                count += int(stop - start)
                if not at_cut and stop > start:
                    normal.append(self._read(run.places[0], run.dtype, start, stop))
                start, stop = anomalous_bounds[part : part + 2]
                if stop > start:
                    anomalous.append(self._read(run.places[1], run.dtype, start, stop))
                    areas.append(self._read(run.places[2], np.dtype(np.int32), start, stop))
            found, sizes = np.concatenate(anomalous), np.concatenate(areas)
            order = np.lexsort((sizes, found))[::-1]
            weights = 1 / sizes[order].astype(np.float64)
            end = before + np.array([[count], [len(found)], [0.0]])
            if len(found):
                if at_cut:  # all of one value: counting is enough, however many there are
                    piece = before + np.array([[0, count], [0, len(found)], [0, float(weights.sum())]])
                else:
                    piece = before + corners(np.concatenate(normal), found[order], weights)
                end[2] = piece[2, -1]
                yield piece
            before = end

    def _bounds(self, run: _Run, cuts: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the parts begin in the sorted values of an image, normal and anomalous: ``[2 * len(cuts) + 2]`` each."""
        found = []
        for place, count in zip(run.places[:2], (run.normal, run.anomalous), strict=True):
            values = self._read(place, run.dtype, 0, count)
            inner = np.stack([values.searchsorted(cuts, "left"), values.searchsorted(cuts, "right")], axis=1).ravel()
            found.append(np.concatenate([[0], inner, [count]]))
        return found[0], found[1]

    def _aupimo(self, bounds: tuple[float, float]) -> tuple[float, ...]:
        normal = [run for run in self._runs if not run.anomalous]
        if not normal or len(normal) == len(self._runs):
            return ()
        values, rates = self._shared_rates(normal, bounds[1])
        each = []
        for run in self._runs:
            if run.anomalous:
                found = self._read(run.places[1], run.dtype, 0, run.anomalous)
                above = 1 - found.searchsorted(values, "right") / run.anomalous
                within = 1 - found.searchsorted(values, "left") / run.anomalous
                each.append(_pimo_area(rates, above, within, bounds))
        return tuple(each)

    def _shared_rates(self, normal: Sequence[_Run], limit: float) -> tuple[Floats, Floats]:
        """The highest distinct values of normal images, falling, and the mean false-positive rate at each, until it passes the limit."""
        values, weights = np.empty(0), np.empty(0)
        for run in normal:
            # What one image alone can add before the mean passes the limit; what others add only lowers that.
            most = min(run.normal, math.floor(limit * len(normal) * run.normal) + 1)
            top = self._read(run.places[0], run.dtype, run.normal - most, run.normal)
            top = top[top >= _floor_of(values, weights, limit)]
            values = np.concatenate([values, top])
            weights = np.concatenate([weights, np.full(len(top), 1 / (run.normal * len(normal)))])
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
    labels, _ = ndimage.label(mask, EIGHT_CONNECTED)
    ids = labels[mask]
    areas: NDArray[np.int32] = np.bincount(ids)[ids].astype(np.int32)
    return areas


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
