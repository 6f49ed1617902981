"""Tables of images: CSV or JSON lines, one image in each row, with the names and words that people and published data sets use.

The format is described in ``docs/datasets.md``. VisA's split tables are manifests too.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gladad.core.errors import DataError
from gladad.core.records import Sample
from gladad.data.samples import ANOMALOUS_NAMES, NORMAL_NAMES

SUFFIXES = frozenset({".csv", ".jsonl"})  # file name endings (lower case) of manifests
ALIASES = {"image_path": "image", "mask_path": "mask", "gt_label": "label", "object": "category"}  # other names of columns -> ours
REQUIRED = ("image", "label")
LABELS: dict[str, int | None] = {"": None} | dict.fromkeys({"0", "0.0", "false"} | NORMAL_NAMES, 0)
LABELS |= dict.fromkeys({"1", "1.0", "true"} | ANOMALOUS_NAMES, 1)
SPLITS = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}
SPLITS |= {name: name for name in ("train", "validation", "test")}
_NEEDED = f"needed are {' and '.join(REQUIRED)}, and understood are mask, category, split and defect_type"

Row = Mapping[str, Any]


def read_manifest(path: Path, folder: Path) -> tuple[list[Sample], int]:
    """Read a manifest; whether its files are there is not asked.

    Args:
        path: The file, ``.csv`` or ``.jsonl``.
        folder: What its paths are relative to.

    Returns:
        A sample for every row with a label, in the order of the rows, and the number of rows without one, which are left out.

    Raises:
        DataError: It cannot be read, has no rows, lacks a column, or a value is not understood (the line is named).
    """
    samples: list[Sample] = []
    unlabelled = 0
    for line, row in _rows(path):
        text = {name: "" if value is None else str(value).strip() for name, value in row.items()}
        image, mask, word = text["image"], text.get("mask"), text.get("label", "").lower()
        split = text.get("split", "test").lower()  # nothing is learnt from what does not say that it may be
        if not image:
            raise DataError(f"{path}, line {line}: no image; write its path")
        if word not in LABELS:
            say = "write 0 or normal, 1 or anomalous, and the kind in defect_type"
            raise DataError(f"{path}, line {line}: label {row['label']!r} is unknown; {say}")
        if split not in SPLITS:
            raise DataError(f"{path}, line {line}: split {row['split']!r} is unknown; write train, validation or test")
        if (label := LABELS[word]) is None:
            unlabelled += 1
            continue
        kind = (text.get("defect_type") or "bad") if label else "good"
        files = locate(folder, image), locate(folder, mask) if mask else None
        samples.append(Sample(*files, label, text.get("category") or path.stem, kind, SPLITS[split], line))
    if not samples:
        raise DataError(f"{path}: no rows{' with a label' if unlabelled else ''}; write one for each image")
    return samples, unlabelled


def is_visa_table(path: Path) -> bool:
    """Whether a file has the columns of VisA's split tables, ``object,split,label,image,mask``."""
    if path.suffix.lower() != ".csv":
        return False
    with path.open("rb") as file:
        header = file.readline(1000).decode("utf-8-sig", errors="replace")
    return {"object", "split", "label", "image"} <= {name.strip().lower() for name in header.split(",")}


def locate(folder: Path, name: str) -> Path:
    r"""The file that a manifest means, which is there as written, with ``\`` for ``/``, or with its accents composed in another way."""
    plain = name.replace("\\", "/")
    for text in dict.fromkeys((name, plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain))):
        if (folder / text).exists():
            return folder / text
    return folder / plain


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    return _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # spreadsheets write what their country does
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [_column(name) for name in next(reader, [])]
        if missing := [name for name in REQUIRED if name not in header]:
            raise DataError(f"{path}: no column {' or '.join(missing)} in its first line; {_NEEDED}")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if any(cell.strip() for cell in cells[len(header) :]):
                raise DataError(f"{path}, line {reader.line_num}: more values than columns; quote values that hold {delimiter!r}")
            yield reader.line_num, _row(path, reader.line_num, zip(header, cells, strict=False))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            values = json.loads(record)
        except ValueError as error:
            raise DataError(f"{path}, line {line}: not JSON ({error}); write one object in each line") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {line}: not a JSON object; {_NEEDED}")
        row = _row(path, line, ((_column(name), value) for name, value in values.items()))
        if missing := [name for name in REQUIRED if name not in row]:
            raise DataError(f"{path}, line {line}: no key {' or '.join(missing)}; {_NEEDED}")
        yield line, row


def _row(path: Path, line: int, values: Any) -> Row:
    row: dict[str, Any] = {}
    for name, value in values:
        if row.get(name) not in (None, "", value):
            raise DataError(f"{path}, line {line}: two different values for {name}; keep one of the columns")
        row[name] = value
    for name in ("image", "mask"):
        if not isinstance(row.get(name), str | None):
            raise DataError(f"{path}, line {line}: {name} must be a path, not {row[name]!r}")
    return row


def _column(name: str) -> str:
    name = name.strip().lower()
    return ALIASES.get(name, name)
