"""Judging a detector on labelled images, and the files of a report: JSON, CSV, Markdown and a page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gladad.core.errors import DataError
from gladad.core.images import load_image, load_mask, resize_map
from gladad.core.processes import Processes
from gladad.core.records import Prediction, Progress, Report, Sample, no_progress
from gladad.core.storage import printable, write_json, write_text
from gladad.decision.conformal import Calibration
from gladad.evaluation import stored_maps as kept_maps
from gladad.evaluation.stored_maps import KeptMap
from gladad.metrics.image import PixelMetrics, auroc, decisions, image_curves, image_metrics, wilson_interval
from gladad.metrics.pixel import MAX_FPR
from gladad.report.files import TABLE_FILE, picture_names, to_csv
from gladad.report.gallery import FOLDER, GalleryItem, Picture, full_pictures, item_bytes, outcome, small_pictures
from gladad.report.page import write_page
from gladad.report.text import markdown

EVALUATION_SIZE = (256, 256)
"""``(H, W)`` at which maps and masks are compared, whatever the size of the images."""

REPORT_FILE, MARKDOWN_FILE, PAGE_FILE = "report.json", "report.md", "index.html"
SCHEMA, SCHEMA_VERSION = "gladad-report", 1
COLUMNS = (
    *("image", "category", "defect_type", "split", "gt_label", "score", "p_value", "label", "outcome", "step", "regions", "aupimo"),
    *("raw_score", "seconds"),
)


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


def evaluate(
    detector: Inspector,
    samples: Sequence[Sample],
    *,
    collect: Callable[[GalleryItem], None] | None = None,
    progress: Progress = no_progress,
    pictures: Path | None = None,
    maps: Path | None = None,
    processes: Processes | None = None,
) -> Report:
    """Inspect labelled images and measure how well scores, maps and decisions agree with the labels.

    Pixel metrics compare map and mask at 256x256: maps resized bilinearly, masks by nearest neighbour. Anomalous images without a
    mask take no part in them. What is not defined for the images given (an AUROC of one class) is left out, and the reason noted.

    Args:
        detector: A fitted detector.
        samples: Images with their labels.
        collect: Called with every image as an item of the page, such as a list's ``append``. Without it and without ``pictures`` no
            reconstructions are made.
        progress: Told of every image.
        pictures: Folder for full-size pictures, which the page links to when it lies beside the folder.
        maps: Folder for the maps, so that the report can be scored again (`gladad.evaluation.rescoring`).
        processes: Those that share the images (`gladad.core.processes.started`); None is this one alone. Each of them calls this with the
            same arguments. The report does not depend on their number but for times, and all get it; ``collect`` and ``progress`` are
            called in the main one only. Maps go through temporary files, 0.3 MB per image.

    Returns:
        What `judge` makes of the images.

    Raises:
        DataError: None of the images can be read.
    """
    processes = Processes() if processes is None else processes
    alone, total = processes.count == 1, len(samples)
    threshold = detector.calibration_.threshold.value
    names = picture_names([sample.image_path for sample in samples])
    limit = item_bytes(total)
    with_pixels = any(sample.gt_label and sample.mask_path for sample in samples)

    def look(number: int, folder: Path | None) -> tuple[dict[str, Any], KeptMap | None]:
        sample = samples[number]
        try:
            pixels = load_image(sample.image_path)
            prediction = detector.inspect(pixels, reconstruct=collect is not None or pictures is not None)
        except DataError as error:
            return {"image": printable(sample.image_path), "error": printable(str(error)), **_truth(sample)}, None
        gt_mask = _mask_of(sample, (pixels.shape[0], pixels.shape[1]))
        mask = None if gt_mask is None else _mask_of(sample, EVALUATION_SIZE)
        if mask is not None and not mask.any():  # too small to be seen at this size: it would count as a normal image
            mask = None
        record = prediction.to_record() | {
            "image": printable(sample.image_path),
            "raw_score": prediction.pred_score * threshold,
            "outcome": outcome(sample.gt_label, prediction.pred_label),
            "mask": mask is not None,
        }
        if pictures is not None:
            record["pictures"] = full_pictures(prediction, pixels, gt_mask, pictures, names[number])
        small = small_pictures(prediction, pixels, gt_mask, limit) if collect is not None else []
        kept = KeptMap(_at_evaluation_size(prediction.anomaly_map), mask, small)
        if folder is not None:
            kept_maps.save_map(folder, number, kept)
        return record | _truth(sample), kept

    with PixelMetrics() as pixels_seen, _folder_of_maps(maps, processes) as folder:

        def take(row: dict[str, Any], kept: KeptMap | None) -> None:
            if kept is None:
                return
            if with_pixels:
                add_pixels(pixels_seen, row, kept.anomaly_map, kept.mask)
            if collect is not None and kept.pictures:
                collect(gallery_item(row, kept.pictures))

        rows: list[dict[str, Any]] = []
        for number, (row, kept) in processes.share(partial(look, folder=folder), total, detector.workers):
            if processes.main:
                progress("inspecting", min(number + processes.count, total), total)
            rows.append(row)
            if alone:
                take(row, kept)
        rows = processes.merge(rows)
        if not alone and processes.main and folder is not None:
            # In the order of the images, as one process takes them: what is summed in that order is the same to the last bit.
            for number, row in enumerate(rows):
                take(row, None if "error" in row else kept_maps.load_map(folder, number))
                if maps is None:  # its values are in another temporary file by now
                    kept_maps.map_file(folder, number).unlink(missing_ok=True)
                progress("reading maps", number + 1, total)
        report = processes.on_main(lambda: judge(rows, pixels_seen, detector.calibration_, detector.workers))
    report.details.update({kept_maps.FOLDER: maps is not None, FOLDER: pictures is not None})
    return report


@contextmanager
def _folder_of_maps(maps: Path | None, processes: Processes) -> Iterator[Path | None]:
    """Where maps are kept: for good, or until the main process has read what the others found; None if there is no need to."""
    if maps is not None or processes.count == 1:
        yield maps
        return
    with processes.one(partial(tempfile.TemporaryDirectory, prefix="gladad-")) as folder:
        yield Path(folder)


def add_pixels(pixels: PixelMetrics, row: dict[str, Any], anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
    """Add an image to the pixel metrics, unless it is anomalous and nobody knows where."""
    if not row["gt_label"] or mask is not None:
        pixels.add(anomaly_map, np.zeros(anomaly_map.shape, bool) if mask is None else mask)


def judge(rows: Sequence[dict[str, Any]], pixels: PixelMetrics, calibration: Calibration, workers: int, max_fpr: float = MAX_FPR) -> Report:
    """Measure everything from the records of the images and their pixels, which `add_pixels` took in the same order.

    Args:
        rows: One record per image: fields of `Prediction.to_record` with ``raw_score``, ``outcome``, ``mask`` (whether there is one) and
            the truth; or ``error`` for an image that could not be read. Each image's ``aupimo`` is added.
        pixels: The maps and masks.
        calibration: Of the decisions.
        workers: Images inspected at a time.
        max_fpr: Upper end of the integral of ``pixel_aupro``, in (0, 1].

    Returns:
        Metrics of `image_metrics` and `pixel_metrics`; ``threshold`` (raw score), ``recall`` and
        ``false_reject_rate`` of the decisions; ``seconds_per_image`` (median). ``details`` has 95 % Wilson intervals, the decisions
        ``per_type`` (fields of `DecisionRow`, for kinds of defect ``image_auroc`` against all normal images and mean
        ``aupimo`` where defined), and ``curves``: ``roc``, ``pr`` of images and ``pro`` of pixels, each ``{"x": [...], "y": [...]}`` and
        absent where not defined.

    Raises:
        DataError: There is no image.
    """
    seen = [row for row in rows if "error" not in row]
    if not seen:
        raise DataError(f"none of the {len(rows)} images could be read" if rows else "there are no images to evaluate")
    truths = np.array([row["gt_label"] for row in seen], bool)
    rejected = np.array([row["label"] == "anomalous" for row in seen], bool)
    scores = np.array([row["score"] for row in seen])
    counts = {
        "normal": int((~truths).sum()),
        "anomalous": int(truths.sum()),
        "masks": sum(row["mask"] for row in seen),
        "anomalous_without_mask": sum(bool(row["gt_label"]) and not row["mask"] for row in seen),
        "skipped": len(rows) - len(seen),
    }
    metrics: dict[str, float] = {}
    curves: dict[str, Any] = {}
    notes: list[str] = []
    if truths.any() and not truths.all():
        metrics |= image_metrics(scores, truths)
        curves |= image_curves(scores, truths)
    else:
        notes.append(f"image metrics need both classes; all images are {'anomalous' if truths.any() else 'normal'}")
    if pixels.has_both_classes:
        result = pixels.compute(max_fpr)
        metrics |= result.metrics
        curves["pro"] = result.curves["pro"]
        if result.aupimo:
            for row, value in zip((row for row in seen if row["mask"]), result.aupimo, strict=True):
                row["aupimo"] = value
    else:
        notes.append("pixel metrics need masks with defects in them; there are none")
    if counts["anomalous_without_mask"] and counts["masks"]:
        notes.append(f"{counts['anomalous_without_mask']} anomalous images have no readable mask and take no part in the pixel metrics")
    if counts["skipped"]:
        notes.append(f"{counts['skipped']} images could not be read and were left out")

    threshold = calibration.threshold
    intervals: dict[str, tuple[float, float]] = {}
    for name, members in (("recall", truths), ("false_reject_rate", ~truths)):
        if members.any():
            hits, trials = int(rejected[members].sum()), int(members.sum())
            metrics[name] = hits / trials
            intervals[name] = wilson_interval(hits, trials)
    metrics |= {"threshold": threshold.value, "seconds_per_image": float(np.median([row["seconds"] for row in seen]))}
    height, width = EVALUATION_SIZE
    details = {
        "intervals_95": intervals,
        "per_type": _per_type(seen, truths, rejected, scores),
        "curves": curves,
        "notes": notes,
        "units": {
            "score": "multiples of the decision threshold: above 1 is rejected",
            "threshold": "raw score of the model that is called 1",
            "pixel_*": f"compared at {width}x{height} pixels; maps bilinear, masks nearest neighbour and > 0.5",
            "pixel_aupro": f"up to a false-positive rate of {max_fpr:g}",
            "seconds_per_image": f"median, without reading the file, {workers} images at a time",
        },
        "false_reject_rate_requested": threshold.false_reject_rate,
        "guarantee": threshold.statement,
        "calibration": calibration.to_json(),
        "max_fpr": max_fpr,
        "workers": workers,
    }
    return Report(metrics=metrics, counts=counts, rows=list(rows), details=details)


def _per_type(
    rows: Sequence[dict[str, Any]], truths: NDArray[np.bool_], rejected: NDArray[np.bool_], scores: NDArray[np.float64]
) -> list[dict[str, Any]]:
    kinds = np.array([row["defect_type"] for row in rows])
    found = []
    for decision in decisions(truths, rejected, kinds.tolist()):
        entry = asdict(decision)
        members = truths & (kinds == decision.defect_type)
        if decision.anomalous and not truths.all():
            entry["image_auroc"] = auroc(scores[members | ~truths], truths[members | ~truths])
        values = [row["aupimo"] for row, member in zip(rows, members, strict=True) if member and "aupimo" in row]
        if decision.anomalous and values:
            entry["aupimo"] = float(np.mean(values))
        found.append(entry)
    return found


def gallery_item(row: dict[str, Any], pictures: Sequence[tuple[str, bytes]]) -> GalleryItem:
    """The item of the page from the record of an image and its small pictures, ``(title, JPEG bytes)``."""
    links = row.get("pictures", {})
    return GalleryItem(
        name=f"{row['defect_type']}/{Path(row['image']).name}",
        pred_score=row["score"],
        p_value=row["p_value"],
        pred_label=row["label"] == "anomalous",
        step=row["step"],
        pictures=tuple(Picture(title, data, links.get(title, "")) for title, data in pictures),
        gt_label=row["gt_label"],
        defect_type=row["defect_type"],
    )


def _truth(sample: Sample) -> dict[str, Any]:
    return {"gt_label": sample.gt_label, "defect_type": sample.defect_type, "category": sample.category, "split": sample.split}


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
    """Write ``report.json``, ``predictions.csv``, ``report.md`` and ``index.html`` into a folder, each whole or not at all.

    Args:
        report: What `evaluate` returned.
        items: The images of the page.
        folder: Made if it is not there.
        title: Heading of the page.

    Returns:
        The page.

    Raises:
        WriteError: A file cannot be written.
    """
    folder = Path(folder)
    write_json(folder / REPORT_FILE, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "title": title, **asdict(report)})
    write_text(folder / TABLE_FILE, to_csv(report.rows, COLUMNS))
    write_text(folder / MARKDOWN_FILE, markdown(report, title))
    page = folder / PAGE_FILE
    write_page(page, report, items, title)
    return page


def leftovers(folder: Path, report: Report) -> list[Path]:
    """Folders of pictures and maps of the report that lies in a folder, where the next one has none: they would not fit it."""
    try:
        earlier = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["details"]
        return [folder / name for name in (FOLDER, kept_maps.FOLDER) if earlier[name] and not report.details[name]]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or not one of ours
        return []
