"""Pixel metrics of any number of images: exact with bounded memory, or binned with a known error.

The exact way never holds all pixels. The values of each image are sorted and put into a temporary file; at the end the range of values
is cut into slices of a few million pixels, the curve is built slice by slice from the top, and every metric is a sum over the slices.
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

from gladad.metrics.curves import Curve, Floats, area_until, best_f1, corners, precision_sum, thinned

MAX_FPR = 0.3
MAX_FPR_STRICT = 0.05
PIMO_BOUNDS = (1e-5, 1e-4)
SLICE = 4_000_000  # pixels worked on at a time
IN_MEMORY = 64 * 2**20  # bytes of pixel values above which they go to disk
SAMPLES = 256  # values of each image that say where to cut
EIGHT_CONNECTED = np.ones((3, 3), bool)

NAMES = ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "pixel_aupro_05", "pixel_aupimo")


@dataclass(frozen=True)
class PixelResult:
    """What `PixelMetrics.compute` found.

    Attributes:
        metrics: Of ``pixel_auroc``, ``pixel_ap``, ``pixel_f1max``, ``pixel_aupro`` (to a false-positive rate of 0.3),
            ``pixel_aupro_05`` (0.05) and ``pixel_aupimo`` those that are defined.
        errors: The largest amount by which each can be off; zeros for the exact way.
        curves: ``roc``, ``pr`` and ``pro``, each ``{"x": [...], "y": [...]}`` of at most 200 points.
        aupimo: One value for each anomalous image, in the order of adding; empty where not defined.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    curves: dict[str, dict[str, list[float]]]
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

    @property
    def size(self) -> int:
        return self.normal * self.dtype.itemsize + self.anomalous * (self.dtype.itemsize + 4)


class PixelMetrics:
    """Collects anomaly maps with their masks and computes all pixel metrics of them.

    The exact way keeps the values in a temporary file (4 bytes per pixel, in memory up to 64 MiB) and needs memory that does not grow
    with the number of images but for a few kilobytes each. The result does not depend on the order of images, bit for bit. The binned
    way needs no file: it counts pixels in bins of the value, and says how far off each metric can be (`PixelResult.errors`).
    Objects can be pickled and merged, so that several processes can share the work.

    Args:
        bins: None is exact. Otherwise the number of bins, a power of two from 2**10 to 2**24: the values are rounded to float32, and
            two values fall into one bin when the leading log2(bins) bits of sign, exponent and mantissa agree (2**20: they differ by
            less than 0.05 %). AUPIMO is not available.

    Raises:
        ValueError: bins is not such a number.
    """

    def __init__(self, bins: int | None = None):
        if bins is not None and not (2**10 <= bins <= 2**24 and bins & (bins - 1) == 0):
            raise ValueError(f"bins must be a power of two from {2**10} to {2**24}, not {bins}")
        self.bins = bins
        self.images = 0
        self._runs: list[_Run] = []
        self._samples: list[tuple[Floats, float]] = []
        self._file = self._open()
        self._counts = None if bins is None else np.zeros((2, bins), np.int64)
        self._weights = None if bins is None else np.zeros(bins)

    def __enter__(self) -> PixelMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary file; otherwise it goes with this object."""
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
        single = values.dtype in (np.float32, np.float16, np.uint8, np.int8, np.int16, np.uint16, np.bool_)
        values = values.astype(np.float32 if single else np.float64)
        areas = region_areas(positive)
        self.images += 1
        if self.bins is None:
            self._spool(values[~positive], values[positive], areas)
        else:
            self._count(values[~positive], values[positive], areas)

    @property
    def has_both_classes(self) -> bool:
        """Whether there are normal and anomalous pixels by now, so that metrics are defined."""
        return all(self._totals)

    @property
    def _totals(self) -> tuple[int, int]:
        if self._counts is not None:
            return int(self._counts[0].sum()), int(self._counts[1].sum())
        return sum(run.normal for run in self._runs), sum(run.anomalous for run in self._runs)

    def merge(self, other: PixelMetrics) -> None:
        """Take everything that another one has collected, such as of another process; it stays as it is.

        Raises:
            ValueError: One of them is exact and the other binned, or the bins differ.
        """
        if self.bins != other.bins:
            raise ValueError(f"cannot merge metrics of {other.bins} bins into those of {self.bins} (None is exact)")
        self.images += other.images
        self._samples += other._samples
        for mine, theirs in ((self._counts, other._counts), (self._weights, other._weights)):
            if mine is not None and theirs is not None:
                mine += theirs
        end = self._file.seek(0, io.SEEK_END)
        for run in other._runs:
            other._file.seek(run.offset)
            self._file.write(other._file.read(run.size))
            self._runs.append(_Run(end, run.normal, run.anomalous, run.dtype))
            end += run.size

    def __getstate__(self) -> dict[str, Any]:
        self._file.seek(0)
        return self.__dict__ | {"_file": self._file.read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._file = self._open()
        self._file.write(state["_file"])

    def _open(self) -> IO[bytes]:
        file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, file.close)
        return file

    def compute(self, max_fpr: float = MAX_FPR) -> PixelResult:
        """All metrics of what was added so far; more may be added afterwards.

        Args:
            max_fpr: Upper end of the integral of ``pixel_aupro``, in (0, 1].

        Raises:
            ValueError: There is no anomalous or no normal pixel, or max_fpr is out of range.
        """
        if not 0 < max_fpr <= 1:
            raise ValueError(f"max_fpr must lie in (0, 1], not {max_fpr}")
        if self._counts is not None and self._weights is not None:
            return self._binned(self._counts, self._weights, max_fpr)
        negatives, positives = self._totals
        _require_both(negatives, positives)
        sums = _Sums(negatives, positives, (max_fpr, MAX_FPR_STRICT))
        for piece in self._pieces():
            sums.take(piece)
        metrics, curves = sums.result()
        each = self._aupimo(PIMO_BOUNDS)
        if each:
            metrics["pixel_aupimo"] = float(np.mean(each))
        return PixelResult(metrics, dict.fromkeys(metrics, 0.0), curves, each)

    def aupimo(self, fpr_bounds: tuple[float, float] = PIMO_BOUNDS) -> tuple[float, ...]:
        """AUPIMO of each anomalous image, in the order of adding; see `gladad.metrics.image.aupimo`.

        Raises:
            ValueError: There is no normal or no anomalous image, the bounds are out of order, or this is the binned way.
        """
        if self.bins is not None:
            raise ValueError("AUPIMO needs single pixels; use the exact way (bins=None)")
        low, high = fpr_bounds
        if not 0 < low < high <= 1:
            raise ValueError(f"fpr_bounds must rise within (0, 1], not {fpr_bounds}")
        normal = sum(not run.anomalous for run in self._runs)
        if not normal or normal == len(self._runs):
            raise ValueError("AUPIMO needs at least one normal and one anomalous image")
        return self._aupimo(fpr_bounds)

    # -- exact --------------------------------------------------------------------------------------------------

    def _spool(self, normal: NDArray[np.generic], anomalous: NDArray[np.generic], areas: NDArray[np.int32]) -> None:
        normal.sort()
        order = np.lexsort((areas, anomalous))
        offset = self._file.seek(0, io.SEEK_END)
        for array in (normal, anomalous[order], areas[order]):
            self._file.write(array.tobytes())
        self._runs.append(_Run(offset, len(normal), len(anomalous), normal.dtype))
        for array in (normal, anomalous[order]):
            picked = array[np.linspace(0, len(array) - 1, min(SAMPLES, len(array))).astype(int)].astype(np.float64)
            self._samples.append((picked, len(array)))

    def _read(self, place: int, dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        self._file.seek(place + start * dtype.itemsize)
        return np.frombuffer(self._file.read((stop - start) * dtype.itemsize), dtype)

    def _cuts(self) -> Floats:
        """Rising values that cut all pixels into parts of about `SLICE`."""
        values = np.concatenate([values for values, _ in self._samples])
        weights = np.concatenate([np.full(len(values), size / max(len(values), 1)) for values, size in self._samples])
        order = np.lexsort((weights, values))
        reached = np.floor(np.cumsum(weights[order]) / SLICE)
        return np.unique(values[order][np.flatnonzero(np.diff(reached, prepend=0.0) > 0)])

    def _pieces(self) -> Iterator[Curve]:
        """The corners from the highest value to the lowest, slice by slice; the fp of the last is that of its lowest anomalous value."""
        cuts = self._cuts()
        bounds = [self._bounds(run, cuts) for run in self._runs]
        before = (0.0, 0.0, 0.0)
        for part in range(2 * len(cuts), -1, -1):  # even parts lie between two cuts, odd ones are a cut itself
            at_cut = part % 2 == 1
            normal_parts: list[NDArray[Any]] = []
            anomalous_parts: list[NDArray[Any]] = []
            area_parts: list[NDArray[Any]] = []
            ties = 0
            for run, (normal_bounds, anomalous_bounds) in zip(self._runs, bounds, strict=True):
                places, (start, stop) = run.places, normal_bounds[part : part + 2]
                ties += int(stop - start)
                if not at_cut and stop > start:
                    normal_parts.append(self._read(places[0], run.dtype, start, stop))
                start, stop = anomalous_bounds[part : part + 2]
                if stop > start:
                    anomalous_parts.append(self._read(places[1], run.dtype, start, stop))
                    area_parts.append(self._read(places[2], np.dtype(np.int32), start, stop))
            found = np.concatenate(anomalous_parts) if anomalous_parts else np.empty(0)
            weights = np.empty(0)
            if len(found):
                areas = np.concatenate(area_parts)
                order = np.lexsort((areas, found))[::-1]
                found, weights = found[order], 1 / areas[order].astype(np.float64)
            if at_cut:  # all of one value: counting is enough, however many there are
                piece = _tied(ties, len(found), float(weights.sum()), before)
            else:
                normal = np.concatenate(normal_parts) if normal_parts else np.empty(0)
                piece = corners(normal, found, weights, before)
            before = (before[0] + ties, before[1] + len(found), float(piece.overlap[-1]) if len(found) else before[2])
            if len(found):
                yield piece

    def _bounds(self, run: _Run, cuts: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the parts begin in the sorted values of an image, normal and anomalous: ``[2 * len(cuts) + 2]`` each."""
        found = []
        for place, count in zip(run.places[:2], (run.normal, run.anomalous), strict=True):
            values = self._read(place, run.dtype, 0, count)
            inner = np.stack([values.searchsorted(cuts, "left"), values.searchsorted(cuts, "right")], axis=1).ravel()
            found.append(np.concatenate([[0], inner, [count]]))
        return found[0], found[1]

    # -- AUPIMO -------------------------------------------------------------------------------------------------

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
            if len(values) > SLICE:
                keep = values >= _floor_of(values, weights, limit)
                values, weights = values[keep], weights[keep]
        order = np.lexsort((weights, values))[::-1]
        values, rates = values[order], np.cumsum(weights[order])
        last = np.flatnonzero(np.append(values[1:] != values[:-1], True))
        stop = int(np.searchsorted(rates[last], limit)) + 1
        return values[last][:stop], rates[last][:stop]

    # -- binned -------------------------------------------------------------------------------------------------

    def _count(self, normal: NDArray[np.generic], anomalous: NDArray[np.generic], areas: NDArray[np.int32]) -> None:
        assert self.bins is not None and self._counts is not None and self._weights is not None
        shift = 32 - (self.bins.bit_length() - 1)
        keys = _keys(anomalous) >> shift
        self._counts[0] += np.bincount(_keys(normal) >> shift, minlength=self.bins)
        self._counts[1] += np.bincount(keys, minlength=self.bins)
        self._weights += np.bincount(keys, 1 / areas.astype(np.float64), minlength=self.bins)

    def _binned(self, counts: NDArray[np.int64], weights: Floats, max_fpr: float) -> PixelResult:
        negatives, positives = self._totals
        _require_both(negatives, positives)
        used = np.flatnonzero(counts.sum(axis=0))[::-1]
        fp, tp, overlap = (np.cumsum(values[used]).astype(np.float64) for values in (*counts, weights))

        def steps(values: Floats, first: bool) -> Floats:
            """Each bin as a rise of this count before (first) or after the others."""
            before = np.concatenate([[0.0], values[:-1]])
            return np.stack([values, values] if first else [before, values], axis=1).ravel()

        results = []
        tied = Curve(steps(fp, False), steps(tp, False), steps(overlap, False))
        best = Curve(steps(fp, False), steps(tp, True), steps(overlap, True))  # the anomalous pixels of each bin are higher
        worst = Curve(steps(fp, True), steps(tp, False), steps(overlap, False))
        for curve in (tied, best, worst):
            sums = _Sums(negatives, positives, (max_fpr, MAX_FPR_STRICT))
            sums.take(curve)
            results.append(sums.result())
        (metrics, curves), (high, _), (low, _) = results
        # The same for precision at the anomalous pixels of a bin: at best no normal one of it is above them, at worst all are.
        tp_before, fp_before, found = np.concatenate([[0.0], tp[:-1]]), np.concatenate([[0.0], fp[:-1]]), np.diff(tp, prepend=0.0)
        first = tp_before + (found > 0)
        high["pixel_ap"] = float(np.sum(found * tp / np.maximum(tp + fp_before, 1)) / positives)
        low["pixel_ap"] = float(np.sum(found * first / np.maximum(first + fp, 1)) / positives)
        errors = {name: max(high[name] - value, value - low[name], 0.0) + 1e-12 for name, value in metrics.items()}
        return PixelResult(metrics, errors, curves)


class _Sums:
    """Metrics as sums over the pieces of a curve."""

    def __init__(self, negatives: int, positives: int, limits: tuple[float, float]):
        self.negatives, self.positives, self.limits = float(negatives), float(positives), limits
        self.end = (0.0, 0.0, 0.0)
        self.roc = self.precision = self.f1 = 0.0
        self.pro = [0.0, 0.0]
        self.points: list[Floats] = [np.zeros((3, 1))]

    def take(self, piece: Curve) -> None:
        fp, tp, overlap = (
            np.concatenate([[end], values]) for end, values in zip(self.end, (piece.fp, piece.tp, piece.overlap), strict=True)
        )
        self.roc += float(np.trapezoid(tp, fp))
        self.precision += precision_sum(piece, self.end[1])
        self.f1 = max(self.f1, best_f1(piece.fp, piece.tp, self.positives))
        for index, limit in enumerate(self.limits):
            if fp[0] < limit * self.negatives:
                self.pro[index] += area_until(fp, overlap, limit * self.negatives)
        self.points.append(_sketch(np.stack([fp, tp, overlap]), (self.negatives, self.positives)))
        self.end = (float(fp[-1]), float(tp[-1]), float(overlap[-1]))

    def result(self) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
        fp, tp, overlap = self.end
        regions = overlap  # every region has been found entirely by now
        rest = self.negatives - fp
        roc = self.roc + rest * tp
        pro = [area + max(0.0, limit * self.negatives - fp) * overlap for area, limit in zip(self.pro, self.limits, strict=True)]
        metrics = {
            "pixel_auroc": roc / (self.negatives * self.positives),
            "pixel_ap": self.precision / self.positives,
            "pixel_f1max": max(self.f1, best_f1(np.array(self.negatives), np.array(tp), self.positives)),
            "pixel_aupro": pro[0] / (self.limits[0] * self.negatives * regions),
            "pixel_aupro_05": pro[1] / (self.limits[1] * self.negatives * regions),
        }
        points = np.concatenate([*self.points, [[self.negatives], [tp], [overlap]]], axis=1)
        return metrics, _curves(
            points / np.array([[self.negatives], [self.positives], [regions]]), self.positives / self.negatives, self.limits[0]
        )


def _curves(rates: Floats, ratio: float, max_fpr: float) -> dict[str, dict[str, list[float]]]:
    """ROC, precision-recall and PRO of rates ``[3, K]`` (fpr, tpr, pro), where ratio is positives / negatives."""
    fpr, tpr, pro = rates
    shown = int(np.searchsorted(fpr, max_fpr, side="right"))
    x, y = np.append(fpr[:shown], max_fpr), np.append(pro[:shown], np.interp(max_fpr, fpr, pro))
    some = tpr > 0
    precision = tpr[some] * ratio / (tpr[some] * ratio + fpr[some])
    pairs = {"roc": (fpr, tpr), "pr": (tpr[some], precision), "pro": (x, y)}
    return {name: curve_points(*pair) for name, pair in pairs.items()}


def curve_points(x: Floats, y: Floats) -> dict[str, list[float]]:
    """A line of at most 200 points, ready for JSON."""
    x, y = thinned(x, y)
    return {"x": [round(float(value), 6) for value in x], "y": [round(float(value), 6) for value in y]}


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


def region_areas(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Area of the 8-connected region of each anomalous pixel of a mask ``[H, W]``, in the order of ``mask[mask]``."""
    if not mask.any():
        return np.empty(0, np.int32)
    labels, _ = ndimage.label(mask, EIGHT_CONNECTED)
    ids = labels[mask]
    areas: NDArray[np.int32] = np.bincount(ids)[ids].astype(np.int32)
    return areas


def _require_both(negatives: int, positives: int) -> None:
    if not negatives or not positives:
        raise ValueError("not defined for one class only: both normal and anomalous items are needed")


def _tied(negatives: int, positives: int, overlap: float, before: tuple[float, float, float]) -> Curve:
    """The two corners of a single value."""
    ends = [np.array([start, start + more]) for start, more in zip(before, (negatives, positives, overlap), strict=True)]
    return Curve(*ends)


def _sketch(points: Floats, scale: tuple[float, float], count: int = 1000) -> Floats:
    """Enough of the points ``[3, K]`` of a piece to draw it."""
    if points.shape[1] <= count:
        return points
    length = np.cumsum(np.abs(np.diff(points[0])) / scale[0] + np.abs(np.diff(points[1])) / scale[1])
    places = np.unique(np.searchsorted(length, np.linspace(0, length[-1], count)) + 1)
    return points[:, np.minimum(places, points.shape[1] - 1)]


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


def _keys(values: NDArray[np.generic]) -> NDArray[np.uint32]:
    """Unsigned integers in the order of the values as float32."""
    bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)
    keys: NDArray[np.uint32] = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return keys
