"""Judging a detector on labelled images, and the report of it: JSON, CSV and one page of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gladad.calibration import Calibration
from gladad.errors import DataError
from gladad.gallery import GalleryItem, gallery_item, write_gallery
from gladad.images import load_image, load_mask, resize_map
from gladad.metrics import NAMES, PixelMetrics, decisions, image_curves, image_metrics, wilson_interval
from gladad.parallel import in_order
from gladad.results import COLUMNS, TABLE_FILE, readable, to_csv
from gladad.storage import write_json, write_text
from gladad.types import Prediction, Progress, Report, Sample, no_progress

EVALUATION_SIZE = (256, 256)
"""``(H, W)`` at which maps and masks are compared, whatever the size of the images."""

MAX_PICTURES = 400
"""Images on the page of a report; more would not open."""

TRUTH_COLUMNS = ("gt_label", "defect_type", "category")


class Inspector(Protocol):
    """What evaluation needs of a detector; `gladad.Glad` is one."""

    @property
    def calibration_(self) -> Calibration:
        """Its thresholds."""
        ...

    @property
    def workers(self) -> int:
        """Images to inspect at the same time."""
        ...

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Prediction:
        """Inspect one image ``[H, W, 3]`` uint8."""
        ...


@dataclass(frozen=True)
class _Looked:
    """What evaluation keeps of one image."""

    prediction: Prediction
    anomaly_map: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    item: GalleryItem | None


def evaluate(
    detector: Inspector,
    samples: Sequence[Sample],
    *,
    collect: Callable[[GalleryItem], None] | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Inspect labelled images and measure how well scores, maps and decisions agree with the labels.

    Pixel metrics compare map and mask at 256x256: maps resized bilinearly, masks by nearest neighbour. Anomalous images without a
    mask take no part in them. What is not defined for the images given (an AUROC of one class) is left out, and the reason noted.

    Args:
        detector: A fitted detector.
        samples: Images with their labels.
        collect: Called with every image as an item of the page, such as a list's ``append``. Without it no reconstructions are made.
        progress: Told of every image.

    Returns:
        Metrics of `gladad.metrics.image_metrics` and `gladad.metrics.pixel_metrics`; ``threshold`` (raw score), ``recall`` and
        ``false_reject_rate`` of the decisions; ``seconds_per_image`` (median). ``details`` has 95 % Wilson intervals, the decisions
        ``per_type`` (fields of `gladad.metrics.DecisionRow`), and ``curves``: ``roc``, ``pr`` of images and ``pro`` of pixels, each
        ``{"x": [...], "y": [...]}`` and absent where not defined.

    Raises:
        DataError: None of the images can be read.
    """
    with_pixels = any(sample.gt_label and sample.mask_path for sample in samples)
    rows: list[dict[str, Any]] = []
    scores: list[float] = []
    labels: list[int] = []
    rejected: list[bool] = []
    seconds: list[float] = []
    kinds: list[str] = []
    unmasked = skipped = 0

    def look(sample: Sample) -> _Looked | DataError:
        try:
            pixels = load_image(sample.image_path)
            prediction = replace(detector.inspect(pixels, reconstruct=collect is not None), image_path=sample.image_path)
        except DataError as error:
            return error
        outline = _mask_of(sample, (pixels.shape[0], pixels.shape[1]))
        item = None
        if collect is not None:
            name = f"{sample.defect_type}/{readable(sample.image_path.name)}"
            item = gallery_item(prediction, pixels, name, sample.gt_label, outline)
        return _Looked(
            prediction=replace(prediction, reconstruction=None),
            anomaly_map=_at_evaluation_size(prediction.anomaly_map),
            mask=None if outline is None else _mask_of(sample, EVALUATION_SIZE),
            item=item,
        )

    pixels_seen = PixelMetrics()
    looks = in_order(look, samples, detector.workers)
    for done, (sample, looked) in enumerate(zip(samples, looks, strict=True), start=1):
        progress("inspecting", done, len(samples))
        truth = {"gt_label": sample.gt_label, "defect_type": sample.defect_type, "category": sample.category}
        if isinstance(looked, DataError):
            skipped += 1
            rows.append({"image": readable(sample.image_path), "error": readable(str(looked)), **truth})
            continue
        prediction, mask = looked.prediction, looked.mask
        rows.append(prediction.to_record() | {"image": readable(sample.image_path)} | truth)
        scores.append(prediction.pred_score)
        labels.append(sample.gt_label)
        kinds.append(sample.defect_type)
        rejected.append(prediction.pred_label)
        seconds.append(prediction.seconds)
        if sample.gt_label and mask is None:
            unmasked += 1
        elif with_pixels:
            pixels_seen.add(looked.anomaly_map, np.zeros(EVALUATION_SIZE, bool) if mask is None else mask)
        if collect is not None and looked.item is not None:
            collect(looked.item)

    if not scores:
        raise DataError(f"none of the {len(samples)} images could be read" if samples else "there are no images to evaluate")
    truths, rejections = np.array(labels, bool), np.array(rejected, bool)
    counts = {
        "normal": int((~truths).sum()),
        "anomalous": int(truths.sum()),
        "masks": int(truths.sum()) - unmasked,
        "anomalous_without_mask": unmasked,
        "skipped": skipped,
    }
    metrics, curves, notes = _metrics(scores, truths, pixels_seen, counts)
    intervals: dict[str, tuple[float, float]] = {}
    for name, members in (("recall", truths), ("false_reject_rate", ~truths)):
        if members.any():
            hits, trials = int(rejections[members].sum()), int(members.sum())
            metrics[name] = hits / trials
            intervals[name] = wilson_interval(hits, trials)
    threshold = detector.calibration_.threshold
    metrics |= {"threshold": threshold.value, "seconds_per_image": float(np.median(seconds))}
    details = {
        "intervals_95": intervals,
        "per_type": [asdict(row) for row in decisions(truths, rejections, kinds)],
        "curves": curves,
        "notes": notes,
        "units": {
            "score": "multiples of the decision threshold: above 1 is rejected",
            "threshold": "raw score of the model that is called 1",
            "pixel_*": f"compared at {EVALUATION_SIZE[1]}x{EVALUATION_SIZE[0]} pixels; maps bilinear, masks nearest neighbour and > 0.5",
            "seconds_per_image": f"median, without reading the file, {detector.workers} images at a time",
        },
        "false_reject_rate_requested": threshold.false_reject_rate,
        "guarantee": threshold.statement,
    }
    return Report(metrics=metrics, counts=counts, rows=rows, details=details)


def _metrics(
    scores: list[float], truths: NDArray[np.bool_], pixels: PixelMetrics, counts: dict[str, int]
) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """Metrics that are defined, their curves, and notes on what is not."""
    metrics: dict[str, float] = {}
    curves: dict[str, Any] = {}
    notes: list[str] = []
    if truths.any() and not truths.all():
        metrics |= image_metrics(scores, truths)
        curves |= image_curves(scores, truths)
    else:
        notes.append(f"image metrics need both classes; all images are {'anomalous' if truths.any() else 'normal'}")
    with pixels:
        if pixels.has_both_classes:
            result = pixels.compute()
            metrics |= result.metrics
            curves["pro"] = result.curves["pro"]
        else:
            notes.append("pixel metrics need masks with defects in them; there are none")
    if counts["anomalous_without_mask"] and counts["masks"]:
        notes.append(f"{counts['anomalous_without_mask']} anomalous images have no readable mask and take no part in the pixel metrics")
    if counts["skipped"]:
        notes.append(f"{counts['skipped']} images could not be read and were left out")
    return metrics, curves, notes


def _at_evaluation_size(anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
    resized: NDArray[np.float32] = resize_map(torch.from_numpy(anomaly_map)[None, None], EVALUATION_SIZE)[0, 0].numpy()
    return resized


def _mask_of(sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """The mask of an anomalous image at ``(H, W)``; None if there is none, or none that can be read."""
    if not sample.gt_label or sample.mask_path is None:
        return None
    try:
        return load_mask(sample.mask_path, size)
    except DataError:
        return None


def write_report(report: Report, items: Sequence[GalleryItem], folder: str | Path, title: str = "Evaluation") -> Path:
    """Write ``report.json``, ``predictions.csv`` and ``index.html`` into a folder, each whole or not at all.

    Args:
        report: What `evaluate` returned.
        items: The images of the page; of more than 400 all wrong decisions are kept first.
        folder: Made if it is not there.
        title: Heading of the page.

    Returns:
        The page.

    Raises:
        WriteError: A file cannot be written.
    """
    folder = Path(folder)
    write_json(folder / "report.json", asdict(report))
    write_text(folder / TABLE_FILE, to_csv(report.rows, (*COLUMNS, *TRUTH_COLUMNS)))
    shown = _chosen(items)
    notes = [*report.details.get("notes", []), *([] if len(shown) == len(items) else [f"{len(shown)} of {len(items)} images are shown"])]
    tiles: list[tuple[str, object]] = [(key.replace("_", " "), cell(key, value)) for key, value in summary(report)]
    table = [["note"], *([note] for note in notes)] if notes else None
    page = folder / "index.html"
    write_gallery(page, title, tiles, shown, table)
    return page


def summary(report: Report) -> list[tuple[str, float]]:
    """The numbers that people look at first, those that are there, in order: ``(name, value)``."""
    order = ["image_auroc", "image_ap", "image_f1max", "image_pg2", "image_pb2", *NAMES, "recall", "false_reject_rate", "seconds_per_image"]
    return [(name, report.metrics[name]) for name in order if name in report.metrics]


def cell(name: str, value: float) -> str:
    """One of these numbers as people read it: per cent, or seconds."""
    return f"{value:.3f} s" if name == "seconds_per_image" else f"{value:.1%}"


def _chosen(items: Sequence[GalleryItem]) -> list[GalleryItem]:
    """At most `MAX_PICTURES` items: the wrong decisions, then an even choice over the scores of the others."""
    if len(items) <= MAX_PICTURES:
        return list(items)
    wrong = [item for item in items if item.outcome in {"missed", "false alarm"}][:MAX_PICTURES]
    rest = sorted((item for item in items if item.outcome not in {"missed", "false alarm"}), key=lambda item: item.pred_score)
    places = np.linspace(0, len(rest) - 1, min(MAX_PICTURES - len(wrong), len(rest))).round().astype(int)
    return [*wrong, *(rest[place] for place in places)]
