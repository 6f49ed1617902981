"""Predictions as files: JSON lines, CSV, overlays and masks, all in one folder and whole or not there."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.records import Prediction
from gladad.core.storage import WriteError, printable, write_text
from gladad.report.pictures import overlay

OLD_NAMES = ("image", "score", "label")
"""What ``image_path``, ``pred_score`` and ``pred_label`` were called: written beside them in this release, gone in the next."""

MODEL_COLUMNS = ("model_id", "model_version", "calibration_id")
COLUMNS = ("image_path", "pred_score", "p_value", "pred_label", "step", "regions", "seconds", *MODEL_COLUMNS, *OLD_NAMES)
TABLE_FILE, RECORDS_FILE = "predictions.csv", "predictions.jsonl"


def with_old_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is written, with the `OLD_NAMES` beside the new ones."""
    old = {"image": row["image_path"]}
    if "error" not in row:
        old |= {"score": row["pred_score"], "label": "anomalous" if row["pred_label"] else "normal"}
    return {**row, **old}


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """A table of records, one line each; regions are counted, and an ``error`` column is added where a record has one."""
    rows = list(rows)
    columns = (*columns, "error") if any("error" in row for row in rows) else columns
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "regions": len(row["regions"])} if "regions" in row else row)
    return text.getvalue()


def check_output(folder: Path) -> None:
    """Refuse early what `output_folder` would refuse at the end of a long run.

    Raises:
        WriteError: The folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise WriteError(f"{folder}: is a file; give a folder for the results")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(_temporary(folder))
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written to ({error.strerror or error})") from error


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose content is moved into ``folder`` when the block succeeds, and which vanishes when it does not.

    Files of the same name are replaced. Folders are too, but only those of an earlier run, which has left its `TABLE_FILE`.

    Raises:
        WriteError: A folder of someone else is in the way, or the disk refuses.
    """
    check_output(folder)
    folder = folder.absolute()
    temporary = _temporary(folder)
    try:
        yield temporary
        ours = (folder / TABLE_FILE).is_file()
        created = sorted(temporary.iterdir())
        for path in created:
            if (folder / path.name).is_dir() and not ours:
                raise WriteError(f"{folder / path.name}: exists and is not from an earlier run; choose another folder")
        folder.mkdir(exist_ok=True)
        for path in created:
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(folder: Path) -> Path:
    """A new folder beside one, or in it if it is there, which may be a file system of its own."""
    return Path(tempfile.mkdtemp(prefix=".gladad-", suffix=".partial", dir=folder if folder.is_dir() else folder.absolute().parent))


def picture_names(images: Sequence[Path]) -> list[Path]:
    """A relative ``.png`` name for each image: its path below the folder they have in common, never the same one twice.

    Two images that differ in their suffix only keep it in the name.
    """
    if not images:
        return []
    absolute = [Path(os.path.normpath(image.absolute())) for image in images]
    root = os.path.commonpath([path.parent for path in absolute])
    relative = [path.relative_to(root) for path in absolute]
    # Compared without case: there are file systems that do not tell.
    stems = Counter(str(path.with_suffix("")).casefold() for path in relative)
    names: dict[str, Path] = {}
    for path in relative:
        base = path.stem if stems[str(path.with_suffix("")).casefold()] == 1 else path.name
        candidates = (path.with_name(f"{base}{end}.png") for end in chain([""], (f"-{number}" for number in count(2))))
        name = next(name for name in candidates if str(name).casefold() not in names)
        names[str(name).casefold()] = name
    return list(names.values())


class PredictionWriter:
    """Writes predictions into an empty folder as they come, with overlays and masks if wanted; the table follows in `close`."""

    def __init__(self, folder: Path, *, pictures: bool = True):
        self.folder, self.pictures = folder, pictures
        self.rows: list[dict[str, Any]] = []

    def draw(self, prediction: Prediction, pixels: NDArray[np.uint8], name: Path) -> None:
        """Write the pictures of one prediction about ``[H, W, 3]`` uint8 under a relative name, if any are wanted.

        Different images may be drawn at the same time.
        """
        if self.pictures:
            self._save("overlays" / name, overlay(pixels, prediction.anomaly_map, prediction.pred_mask, prediction.regions))
            self._save("masks" / name, prediction.pred_mask.astype(np.uint8) * np.uint8(255))

    def add(self, prediction: Prediction, image: Path, name: Path) -> None:
        """Record one prediction about a file, and the relative name of its pictures; records are in the order of these calls."""
        record = prediction.to_record() | {"image_path": printable(image)}
        if self.pictures:
            record |= {"overlay": printable("overlays" / name), "mask": printable("masks" / name)}
        self.rows.append(record)

    def fail(self, image: Path, error: Exception) -> None:
        """Record an image that cannot be inspected."""
        self.rows.append({"image_path": printable(image), "error": printable(str(error))})

    def close(self) -> None:
        """Write the records and the table."""
        rows = [with_old_names(row) for row in self.rows]
        write_text(self.folder / RECORDS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(self.folder / TABLE_FILE, to_csv(rows))

    def _save(self, name: Path, pixels: NDArray[np.uint8]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)  # the default takes longer than the inspection
