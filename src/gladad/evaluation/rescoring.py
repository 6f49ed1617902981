"""Scoring a report again from its own folder: no model, no images. What was measured once can be judged by other limits."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.core.records import Progress, Report, no_progress
from gladad.decision.conformal import Calibration, Threshold, conformal_threshold
from gladad.evaluation import stored_maps as kept_maps
from gladad.evaluation.run import REPORT_FILE, SCHEMA, SCHEMA_VERSION, measure, take, with_caveat
from gladad.metrics.pixel import PixelMetrics
from gladad.report import gallery
from gladad.report.files import OLD_NAMES
from gladad.report.gallery import GalleryItem


def rescore(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    false_reject_rate: float | None = None,
    max_fpr: float | None = None,
    progress: Progress = no_progress,
) -> tuple[Report, list[GalleryItem], str]:
    """Measure everything again from the folder of a report that was made with its maps kept.

    With nothing changed the result is the same to the last digit. Another false-reject rate moves the threshold of the scores, and
    with it scores, decisions and rates; the outlines and regions stay those of the model's own rate.

    Args:
        folder: With ``report.json`` and ``maps/``.
        output: Where the new report will be written; the page there links to the pictures here. None is the folder itself.
        false_reject_rate: Another rate, in (0, 0.5]; the threshold follows from the stored held-out scores.
        max_fpr: Another upper end of the integral of AUPRO, in (0, 1].
        progress: Told of every image.

    Returns:
        The report, the items of its page, and its title.

    Raises:
        DataError: The folder holds no report, no maps, or damaged ones.
        ConfigError: A setting is out of range.
    """
    folder, output = Path(folder), Path(folder if output is None else output)
    stored = _read(folder)
    try:
        details = stored["details"]
        limit = details["max_fpr"] if max_fpr is None else max_fpr
        if not 0 < limit <= 1:
            raise ConfigError(f"max_fpr must lie in (0, 1], not {limit}")
        if not details[kept_maps.FOLDER]:
            raise DataError(f"{folder}: its maps were not kept; run 'gladad evaluate --keep-maps' first")
        calibration = before = Calibration.from_json(details["calibration"])
        if false_reject_rate is not None:
            threshold = conformal_threshold(before.scores, false_reject_rate, cross_fitted=before.cross_fitted, images=before.threshold.n)
            calibration = replace(before, threshold=replace(threshold, tolerated=before.threshold.tolerated))
        rows = [_decided(row, calibration.threshold, before.threshold) for row in stored["rows"]]
        _relink(rows, folder, output)
        items: list[GalleryItem] = []
        seen = [(number, row) for number, row in enumerate(rows) if "error" not in row]
        with PixelMetrics() as pixels:
            wanted = pixels if any(row["mask"] for _, row in seen) else None
            for done, (number, row) in enumerate(seen, start=1):
                take(row, kept_maps.load_map(folder / kept_maps.FOLDER, number), wanted, items.append)
                progress("reading maps", done, len(seen))
            report = with_caveat(measure(rows, pixels, calibration, details["workers"], limit), details.get("caveat"))
        here = output.resolve() == folder.resolve()
        folders = {kept_maps.FOLDER: here, gallery.FOLDER: here and details[gallery.FOLDER]}
        report = replace(report, details=details | report.details | folders)
        if calibration != before:
            rates = (calibration.threshold.false_reject_rate, before.threshold.false_reject_rate)
            note = f"decided again at {rates[0]:.2%} false rejects; outlines and regions are those of {rates[1]:.2%}"
            report.details["notes"].append(note)
        return report, items, str(stored["title"])
    except (KeyError, TypeError, ValueError, ModelFormatError) as error:
        raise DataError(f"{folder / REPORT_FILE}: key missing or wrong ({error}); evaluate again") from error


def _read(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not a finite number")

    path = folder / REPORT_FILE
    if not path.is_file():
        raise DataError(f"{folder}: holds no report ({REPORT_FILE}); give the folder that 'gladad evaluate' wrote")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); evaluate again") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        raise DataError(f"{path}: is not a report of this program; give the folder that 'gladad evaluate' wrote")
    if stored.get("schema_version") not in (1, SCHEMA_VERSION):
        raise DataError(f"{path}: has version {stored.get('schema_version')}, this program reads 1 and {SCHEMA_VERSION}; evaluate again")
    return stored


def _decided(row: dict[str, Any], threshold: Threshold, before: Threshold) -> dict[str, Any]:
    """The record of an image under another threshold, by the names of today; what follows from the pixels is left to `measure`."""
    if "image_path" not in row:  # version 1 has the old names only, version 2 both
        row = row | {"image_path": row["image"]}
        if "error" not in row:
            row |= {"pred_score": row["score"], "pred_label": int(row["label"] == "anomalous"), "mask_vanished": False}
    row = {key: value for key, value in row.items() if key not in (*OLD_NAMES, "aupimo")}
    if "error" in row or threshold == before:
        return row
    rejected = row["raw_score"] > threshold.value
    return row | {
        "pred_score": row["raw_score"] / threshold.value,
        "pred_label": int(rejected),
        "outcome": gallery.outcome_of(row["gt_label"], rejected),
    }


def _relink(rows: Sequence[dict[str, Any]], folder: Path, output: Path) -> None:
    """Make the links to pictures relative to another place; drop them where the pictures are gone."""
    there = (folder / gallery.FOLDER).is_dir()
    prefix = quote(os.fsencode(Path(os.path.relpath(folder.resolve(), output.resolve())).as_posix()))
    for row in rows:
        if not there:
            row.pop("pictures", None)
        elif prefix != "." and "pictures" in row:
            row["pictures"] = {title: f"{prefix}/{link}" for title, link in row["pictures"].items()}
