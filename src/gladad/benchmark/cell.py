"""What one cell of a benchmark does: fit (or load), calibrate, evaluate, and write one file."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gladad import __version__
from gladad.benchmark.identity import file_name
from gladad.benchmark.plan import CONTAMINATION, CORRUPTION, MODELS, Cell, split_of
from gladad.core.errors import ConfigError, DataError
from gladad.core.images import as_pixels
from gladad.core.records import Prediction, Sample
from gladad.core.settings import to_json
from gladad.core.storage import MODEL_FILE, read_json, write_json
from gladad.data.corruptions import corrupt
from gladad.data.layouts import read_dataset
from gladad.detector.glad import Glad
from gladad.evaluation.run import Inspector, evaluate

FIT_FILE = "fit.json"
MAX_MIXED = 0.5  # share of the defective images that is mixed into training at most, so that enough are left to be found


def run_cell(cell: Cell, folder: Path) -> None:
    """Run one cell and write its file.

    Raises:
        GladError: Something is wrong with its data or settings.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    train, test = split_of(read_dataset(cell.root, cell.layout), cell.category)
    notes: list[str] = []
    if cell.kind == CONTAMINATION:
        results, notes = _contaminated(cell, folder, train, test)
    else:
        detector, facts = _fitted(cell, folder, train)
        if cell.kind == CORRUPTION:
            results = [_judged(Corrupted(detector, cell.corruption, severity), test, severity=severity) for severity in cell.severities]
        else:
            results = [_judged(detector, test, pixels=True)]
        results = [result | facts for result in results]
    record: dict[str, Any] = {"cell": cell.names, "kind": cell.kind, "corruption": cell.corruption, "base": cell.base}
    record |= {"settings": to_json(cell.settings), "results": results, "notes": notes, "version": __version__}
    write_json(cell.file(folder), record | {"peak_memory_gib": _peak_memory(), "threads": torch.get_num_threads()})


def _fitted(cell: Cell, folder: Path, train: Sequence[Path], extra: Sequence[Path] = ()) -> tuple[Glad, dict[str, Any]]:
    """The detector of a cell: from the models kept, by adjusting one of them, or trained; and facts about its training."""
    images, name = [*train, *extra], file_name(cell.category)
    # The training that others share; and one of its own, for models that cannot be adjusted.
    keys = [cell.model_key(extra, whole=whole) for whole in (False, True)]
    places = [folder / MODELS / (f"together_{key}/{name}" if cell.together else f"{name}_{key}") for key in keys]
    kept = [place for place in places if (place / FIT_FILE).is_file() and (place / MODEL_FILE).is_file()]
    for place in kept:
        detector = Glad.from_pretrained(place)
        try:
            if detector.settings != cell.settings:
                detector.adjust(images, cell.settings)
        except ConfigError:
            continue
        return detector, read_json(place / FIT_FILE) | {"fitted": False}
    place = places[places[0] in kept]
    started = time.monotonic()
    if cell.together:
        dataset = read_dataset(cell.root, cell.layout)
        detectors = Glad.fit_together({name: split_of(dataset, name)[0] for name in cell.together}, cell.base, cell.settings)
    else:
        detectors = {cell.category: Glad.from_base(cell.base, settings=cell.settings).fit(images)}
    facts = {"fit_seconds": (time.monotonic() - started) / len(detectors), "fit_threads": torch.get_num_threads()}
    for category, detector in detectors.items():
        own = place.with_name(file_name(category)) if cell.together else place
        detector.save_pretrained(own)
        write_json(own / FIT_FILE, facts)  # last: what is there with it is whole
    return detectors[cell.category], facts | {"fitted": True}


def _judged(detector: Inspector, samples: Sequence[Sample], *, pixels: bool = False, **facts: Any) -> dict[str, Any]:
    """Metrics of one detector on some samples."""
    if not pixels:  # the masks of a moved image would have to move with it
        samples = [replace(sample, mask_path=None) for sample in samples]
    report = evaluate(detector, samples)
    return facts | {"metrics": report.metrics, "counts": report.counts, "per_type": report.details["per_type"]}


class Corrupted:
    """A detector that is shown every image through one corruption, whose random draws depend on the image alone; the threshold stays."""

    def __init__(self, detector: Glad, corruption: str, severity: int):
        self._detector, self._corruption, self._severity = detector, corruption, severity
        self.calibration_, self.workers = detector.calibration_, detector.workers

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Prediction:
        """Inspect the corrupted image."""
        pixels = as_pixels(image)
        seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:4], "big")
        return self._detector.inspect(corrupt(pixels, self._corruption, self._severity, seed), reconstruct=reconstruct)

    def describe(self) -> dict[str, Any]:
        """That of the detector."""
        return self._detector.describe()


def _contaminated(cell: Cell, folder: Path, train: Sequence[Path], test: Sequence[Sample]) -> tuple[list[dict[str, Any]], list[str]]:
    """Fits with some defective images among the good ones, all judged on the same remaining test images; and what was left out."""
    bad = [sample for sample in test if sample.gt_label]
    order = np.random.default_rng(cell.settings.seed).permutation(len(bad)).tolist()
    counts = {share: round(share / (1 - share) * len(train)) for share in cell.shares}
    possible = {share: count for share, count in counts.items() if count <= MAX_MIXED * len(bad)}
    notes = [
        f"{cell.category}: {share:.0%} contamination left out; it takes {count} defective images, over half of the {len(bad)} there are"
        for share, count in counts.items()
        if share not in possible
    ]
    if not possible:
        raise DataError("; ".join(notes))
    mixed = {bad[place].image_path for place in order[: max(possible.values())]}
    rest = [sample for sample in test if sample.image_path not in mixed]
    results = []
    for share, count in possible.items():
        detector, facts = _fitted(cell, folder, train, [bad[place].image_path for place in order[:count]])
        results.append(_judged(detector, rest, pixels=True, share=share, defective=count) | facts)
    return results, notes


def _peak_memory() -> float | None:
    """Largest resident memory of this process so far, in GiB; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))):
        return int(found[1]) / 2**20  # unlike the resource module's number, not inherited from the process that started this one
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
