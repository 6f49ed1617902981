"""What the result of a benchmark's cell depends on besides its settings: the code and what is in the images, told apart by SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gladad
from gladad.core.errors import DataError
from gladad.core.images import list_images
from gladad.core.records import Sample
from gladad.data.samples import file_digest, fingerprint

SOURCE = Path(gladad.__file__).parent
PACKAGES = ("core", "algorithm", "data", "features", "decision", "metrics", "training", "models", "detector", "evaluation")
DECIDING = (*PACKAGES, "benchmark/cell.py")  # whose code decides a result


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON-ready value's SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def file_name(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.+-]+|^\.+", "-", text)


def source_fingerprint(source: Path) -> str:
    """SHA-256 (hexadecimal) of the code below a package's folder that decides results, and of the presets it brings."""
    files = [file for part in DECIDING for file in [source / part, *(source / part).rglob("*")]]
    return fingerprint([file for file in files if file.suffix in {".py", ".toml"}])


def content(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file; empty if it cannot be read."""
    try:
        return file_digest(path)
    except DataError:
        return ""


def images_digest(paths: Iterable[Path], root: Path) -> str:
    """Digest of names and contents of images, wherever the data set lies."""
    return digest(sorted(_known(path, root) for path in paths))


def samples_digest(samples: Iterable[Sample], root: Path) -> str:
    """Digest of everything that a result takes from labelled images."""
    rows = []
    for sample in samples:
        mask = sample.mask_path
        masks = [] if mask is None else [content(path) for path in (list_images(mask) if mask.is_dir() else [mask])]
        rows.append((*_known(sample.image_path, root), sample.gt_label, sample.split, sample.defect_type, masks))
    return digest(sorted(rows))


def _known(path: Path, root: Path) -> tuple[str, str]:
    return Path(os.path.relpath(path, root)).as_posix(), content(path)
