"""Measuring a detector on labelled images, and the files of a report: JSON, CSV, Markdown and a page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import DataError, NotFiniteError
from gladad.core.images import load_image, load_mask, resize_map
from gladad.core.processes import Processes
from gladad.core.records import Prediction, Progress, Report, Sample, no_progress
from gladad.core.storage import printable, write_json, write_text
from gladad.decision.conformal import Calibration
from gladad.evaluation import stored_maps as kept_maps
from gladad.evaluation.stored_maps import KeptMap
from gladad.metrics.image import auroc, decisions, image_curves, image_metrics, wilson_interval
from gladad.metrics.pixel import MAX_FPR, PixelMetrics
from gladad.report.files import MODEL_COLUMNS, OLD_NAMES, TABLE_FILE, picture_names, to_csv, with_old_names
from gladad.report.gallery import FOLDER, GalleryItem, Picture, full_pictures, item_bytes, outcome_of, small_pictures
from gladad.report.page import write_page
from gladad.report.text import markdown

EVALUATION_SIZE = (256, 256)
"""``(H, W)`` at which maps and masks are compared, whatever the size of the images."""

SIZE_TEXT = "{1}x{0}".format(*EVALUATION_SIZE)
REPORT_FILE, MARKDOWN_FILE, PAGE_FILE = "report.json", "report.md", "index.html"
SCHEMA, SCHEMA_VERSION = "gladad-report", 2
COLUMNS = (
    *("image_path", "category", "defect_type", "split", "gt_label", "pred_score", "p_value", "pred_label", "outcome", "step", "regions"),
    *("aupimo", "raw_score", "seconds", *MODEL_COLUMNS, *OLD_NAMES),
)


class Inspector(Protocol):
    """What evaluation needs of a detector; `gladad.Glad` is one."""

    @property
    def calibration_(self) -> Calibration:
        """Its thresholds."""

    @property
    def workers(self) -> int:
        """Images to inspect at the same time."""

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Prediction:
        """Inspect one image ``[H, W, 3]`` uint8."""

    def describe(self) -> dict[str, Any]:
        """With ``caveat``: what is to be told of its thresholds, or None."""


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
    """Inspect labelled images and measure how well scores, maps and decisions agree with the labels; `measure` says what a report has.

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

    Raises:
        DataError: None of the images can be read.
        NotFiniteError: The score or the map of an image is NaN or infinite.
    """
    processes = Processes() if processes is None else processes
    alone, total, rows = processes.count == 1, len(samples), list[dict[str, Any]]()
    named = list(zip(samples, picture_names([sample.image_path for sample in samples]), strict=True))
    # Maps are kept for good, or until the main process has read what the others found.
    kept_in = nullcontext(maps) if alone or maps else processes.one(partial(tempfile.TemporaryDirectory, prefix="gladad-"))
    with PixelMetrics() as pixels, kept_in as place:
        folder = None if place is None else Path(place)
        look = partial(_look, detector, named, pictures, 0 if collect is None else item_bytes(total), folder)
        wanted = pixels if any(sample.gt_label and sample.mask_path for sample in samples) else None
        with closing(processes.share(look, total, detector.workers)) as looks:
            for number, (row, kept) in looks:
                if processes.main:
                    progress("inspecting", min(number + processes.count, total), total)
                rows.append(row)
                if alone and kept is not None:
                    take(row, kept, wanted, collect)
        rows = processes.merge(rows)
        if not alone and processes.main and folder is not None:
            # In the order of the images, as one process takes them: what is summed in that order is the same to the last bit.
            for number, row in enumerate(rows):
                if "error" not in row:
                    take(row, kept_maps.load_map(folder, number), wanted, collect)
                if maps is None:  # its values are in another temporary file by now
                    kept_maps.map_file(folder, number).unlink(missing_ok=True)
                progress("reading maps", number + 1, total)
        report = processes.on_main(lambda: measure(rows, pixels, detector.calibration_, detector.workers))
    report = with_caveat(report, detector.describe()["caveat"])
    report.details.update({kept_maps.FOLDER: maps is not None, FOLDER: pictures is not None})
    return report


def with_caveat(report: Report, caveat: str | None) -> Report:
    """The report with what is to be told of the thresholds, if anything, among its notes."""
    notes = [*report.details["notes"], *([caveat] if caveat else [])]
    return replace(report, details=report.details | {"notes": notes, "caveat": caveat})


def _look(
    detector: Inspector, named: Sequence[tuple[Sample, Path]], pictures: Path | None, limit: int, folder: Path | None, number: int
) -> tuple[dict[str, Any], KeptMap | None]:
    """The record of one image and what is kept of it, in the folder too if there is one; None of an image that cannot be read."""
    sample, name = named[number]
    path = printable(sample.image_path)
    truth = {"gt_label": sample.gt_label, "defect_type": sample.defect_type, "category": sample.category, "split": sample.split}
    try:
        pixels = load_image(sample.image_path)
        prediction = detector.inspect(pixels, reconstruct=bool(limit) or pictures is not None)
    except NotFiniteError as error:
        raise NotFiniteError(f"{path}: {error}") from error
    except DataError as error:
        return {"image_path": path, "error": printable(str(error)), **truth}, None
    whole, mask = _masks_of(sample, (pixels.shape[0], pixels.shape[1]))
    visible = mask is not None and bool(mask.any())
    record = prediction.to_record() | {
        "image_path": path,
        "raw_score": prediction.pred_score * detector.calibration_.threshold.value,
        "outcome": outcome_of(sample.gt_label, prediction.pred_label),
        "mask": visible,
        "mask_vanished": mask is not None and not visible,
    }
    if pictures is not None:
        record["pictures"] = full_pictures(prediction, pixels, whole, pictures, name)
    small = small_pictures(prediction, pixels, whole, limit) if limit else []
    resized = resize_map(prediction.anomaly_map, EVALUATION_SIZE)
    kept = KeptMap(resized, mask if visible else None, small)
    if folder is not None:
        kept_maps.save_map(folder, number, kept)
    return record | truth, kept


def _masks_of(sample: Sample, size: tuple[int, int]) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """The mask of an anomalous image at ``(H, W)``, if it can be read, and at `EVALUATION_SIZE`, if it has a defect, which may vanish."""
    if not sample.gt_label or sample.mask_path is None:
        return None, None
    try:
        whole, mask = load_mask(sample.mask_path, size), load_mask(sample.mask_path, EVALUATION_SIZE)
        defective = mask.any() or whole.any() or load_mask(sample.mask_path).any()
    except DataError:
        return None, None
    return whole, mask if defective else None


def take(row: dict[str, Any], kept: KeptMap, pixels: PixelMetrics | None, collect: Callable[[GalleryItem], None] | None) -> None:
    """Add an image to the pixel metrics, unless it is anomalous and nobody knows where, and to the page, if it has pictures."""
    if pixels is not None and (not row["gt_label"] or kept.mask is not None):
        pixels.add(kept.anomaly_map, np.zeros(kept.anomaly_map.shape, bool) if kept.mask is None else kept.mask)
    if collect is not None and kept.pictures:
        links = row.get("pictures", {})
        shown = tuple(Picture(title, data, links.get(title, "")) for title, data in kept.pictures)
        fields = {name: row[name] for name in ("pred_score", "p_value", "pred_label", "step", "gt_label", "defect_type")}
        collect(GalleryItem(f"{row['defect_type']}/{Path(row['image_path']).name}", pictures=shown, **fields))


def measure(
    rows: Sequence[dict[str, Any]], pixels: PixelMetrics, calibration: Calibration, workers: int, max_fpr: float = MAX_FPR
) -> Report:
    """Measure everything from the records of the images and their pixels, which `take` added in the same order.

    Args:
        rows: One record per image: fields of `Prediction.to_record` with ``raw_score``, ``outcome``, ``mask`` (whether there is one),
            ``mask_vanished`` and the truth; or ``error`` for an image that could not be read. Each image's ``aupimo`` is added.
        pixels: The maps and masks.
        calibration: Of the decisions.
        workers: Images inspected at a time.
        max_fpr: Upper end of the integral of ``pixel_aupro``, in (0, 1].

    Returns:
        Metrics of `image_metrics` and `PixelMetrics`; ``threshold`` (raw score), ``recall`` and ``false_reject_rate`` of the decisions;
        ``seconds_per_image`` (median). ``details`` has 95 % Wilson intervals, the `decisions` ``per_type`` (for kinds of defect also
        ``image_auroc`` against all normal images and mean ``aupimo`` where defined), and ``curves``: ``roc``, ``pr`` of images and ``pro``
        of pixels, each ``{"x": [...], "y": [...]}`` and absent where not defined.

    Raises:
        DataError: There is no image.
    """
    seen = [row for row in rows if "error" not in row]
    if not seen:
        raise DataError(f"none of the {len(rows)} images could be read" if rows else "there are no images to evaluate")
    truths, rejected = (np.array([row[name] for row in seen], bool) for name in ("gt_label", "pred_label"))
    scores = np.array([row["pred_score"] for row in seen])
    metrics, curves = dict[str, float](), dict[str, Any]()
    if truths.any() and not truths.all():
        metrics, curves = image_metrics(scores, truths), image_curves(scores, truths)
    if pixels.has_both_classes:
        found, curves["pro"], aupimo = pixels.compute(max_fpr)
        metrics |= found
        if aupimo:
            for row, value in zip((row for row in seen if row["mask"]), aupimo, strict=True):
                row["aupimo"] = value
    classes = {"recall": truths, "false_reject_rate": ~truths}
    rates = {name: (int(rejected[members].sum()), int(members.sum())) for name, members in classes.items() if members.any()}
    metrics |= {name: hits / trials for name, (hits, trials) in rates.items()}
    metrics |= {"threshold": calibration.threshold.value, "seconds_per_image": float(np.median([row["seconds"] for row in seen]))}
    counts = _counts(rows, seen)
    details = {
        "intervals_95": {name: wilson_interval(*pair) for name, pair in rates.items()},
        "per_type": _per_type(seen, truths, rejected, scores),
        "curves": curves,
        "notes": _notes(counts, pixels.has_both_classes),
        "units": _units(max_fpr, workers),
        "false_reject_rate_requested": calibration.threshold.false_reject_rate,
        "guarantee": calibration.threshold.statement,
        "calibration": calibration.to_json(),
        "max_fpr": max_fpr,
        "workers": workers,
    }
    return Report(metrics=metrics, counts=counts, rows=list(rows), details=details)


def _counts(rows: Sequence[dict[str, Any]], seen: Sequence[dict[str, Any]]) -> dict[str, int]:
    anomalous, masks, vanished = (sum(bool(row[name]) for row in seen) for name in ("gt_label", "mask", "mask_vanished"))
    return {
        "normal": len(seen) - anomalous,
        "anomalous": anomalous,
        "masks": masks,
        "masks_vanished": vanished,
        "anomalous_without_mask": anomalous - masks - vanished,
        "skipped": len(rows) - len(seen),
    }


def _notes(counts: dict[str, int], pixel_metrics: bool) -> list[str]:
    """What is left out of the metrics, and why."""
    notes = []
    if not counts["normal"] or not counts["anomalous"]:
        notes.append(f"image metrics need both classes; all images are {'anomalous' if counts['anomalous'] else 'normal'}")
    if not pixel_metrics:
        notes.append("pixel metrics need masks with defects in them; there are none")
    if counts["masks_vanished"]:
        notes.append(f"{counts['masks_vanished']} defects are smaller than a pixel at {SIZE_TEXT} and take no part in the pixel metrics")
    if counts["anomalous_without_mask"] and counts["masks"]:
        notes.append(f"{counts['anomalous_without_mask']} anomalous images have no readable mask and take no part in the pixel metrics")
    if counts["skipped"]:
        notes.append(f"{counts['skipped']} images could not be read and were left out")
    return notes


def _units(max_fpr: float, workers: int) -> dict[str, str]:
    return {
        "pred_score": "multiples of the decision threshold: above 1 is rejected",
        "threshold": "raw score of the model that is called 1",
        "pixel_*": f"compared at {SIZE_TEXT} pixels; maps bilinear, masks nearest neighbour and > 0.5",
        "pixel_aupro": f"up to a false-positive rate of {max_fpr:g}",
        "seconds_per_image": f"median, without reading the file, {workers} images at a time",
    }


def _per_type(
    rows: Sequence[dict[str, Any]], truths: NDArray[np.bool_], rejected: NDArray[np.bool_], scores: NDArray[np.float64]
) -> list[dict[str, Any]]:
    kinds = np.array([row["defect_type"] for row in rows])
    found = decisions(truths, rejected, kinds.tolist())
    for entry in (entry for entry in found if entry["anomalous"]):
        members = truths & (kinds == entry["defect_type"])
        if not truths.all():
            entry["image_auroc"] = auroc(scores[members | ~truths], truths[members | ~truths])
        values = [row["aupimo"] for row, member in zip(rows, members, strict=True) if member and "aupimo" in row]
        if values:
            entry["aupimo"] = float(np.mean(values))
    return found


def write_report(report: Report, items: Sequence[GalleryItem], folder: str | Path, title: str = "Evaluation") -> Path:
    """Write ``report.json``, ``predictions.csv``, ``report.md`` and ``index.html`` into a folder, each whole or not at all.

    Args:
        report: What `evaluate` returned.
        items: The images of the page.
        folder: Made if it is not there.
        title: Heading of the page.

    Returns:
        The path of the page.

    Raises:
        WriteError: A file cannot be written.
    """
    folder = Path(folder)
    rows = [with_old_names(row) for row in report.rows]
    stored = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "title": title, **asdict(report), "rows": rows}
    write_json(folder / REPORT_FILE, stored)
    write_text(folder / TABLE_FILE, to_csv(rows, COLUMNS))
    write_text(folder / MARKDOWN_FILE, markdown(report, title))
    write_page(folder / PAGE_FILE, report, items, title)
    return folder / PAGE_FILE


def leftovers(folder: Path, report: Report) -> list[Path]:
    """Folders of pictures and maps of the report that lies in a folder, where the next one has none: they would not fit it."""
    try:
        earlier = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["details"]
        return [folder / name for name in (FOLDER, kept_maps.FOLDER) if earlier[name] and not report.details[name]]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or not one of ours
        return []
