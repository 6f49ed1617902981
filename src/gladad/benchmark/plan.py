"""Many detectors on many data sets, side by side: what is to be run, and running it, one cell at a time, from where it stopped.

A *cell* is one configuration on one category with one seed. Each runs in a process of its own, so that its peak memory is its own and one
that dies takes nothing with it. A finished cell is one JSON file, written whole; it is not run again unless its settings or images change.
What a cell does is in `gladad.benchmark.cell`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gladad.benchmark.config import BenchmarkConfig, Configuration, ShiftEntry
from gladad.benchmark.workers import Workers
from gladad.core.errors import ConfigError, DataError
from gladad.core.images import list_images
from gladad.core.records import Sample
from gladad.core.settings import to_json
from gladad.core.storage import WriteError, read_json
from gladad.core.threads import interrupted_by_sigterm
from gladad.data.corruptions import SHIFTS
from gladad.data.layouts import Dataset, read_dataset
from gladad.models.registry import INSPECTION_SETTINGS, FitSettings, check_settings, settings_of

CELLS, MODELS = "cells", "models"
PLAIN, CORRUPTION, CONTAMINATION = "plain", "corruption", "contamination"

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to run.

    Attributes:
        dataset: Name of the data set.
        root: Where it lies.
        path: The same as the benchmark's file says it.
        layout: How it is read.
        category: The product.
        configuration: What runs on it.
        seed: Of everything random in it.
        kind: "plain", "corruption" or "contamination".
        corruption: Name of the corruption, for that kind.
        severities: Of the corruption.
        shares: Of defective images mixed into training, for "contamination".
        images: Digest of the images: names, sizes, labels, splits and masks.
        together: All categories of the data set that one model is for; empty where it is for one.
    """

    dataset: str
    root: str
    path: str
    layout: str
    category: str
    configuration: Configuration
    seed: int
    kind: str = PLAIN
    corruption: str = ""
    severities: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    images: str = ""
    together: tuple[str, ...] = ()

    @property
    def settings(self) -> FitSettings:
        """Settings of the fit."""
        return settings_of(self.configuration.settings_of(self.category, self.seed))

    @property
    def names(self) -> dict[str, Any]:
        """Its place in the tables."""
        return {"dataset": self.dataset, "category": self.category, "configuration": self.configuration.name, "seed": self.seed}

    @property
    def label(self) -> str:
        """What to call it in messages."""
        shift = {PLAIN: "", CORRUPTION: f" {self.corruption}", CONTAMINATION: " contamination"}[self.kind]
        return f"{self.dataset} {self.category}: {self.configuration.name}{shift}, seed {self.seed}"

    @property
    def key(self) -> str:
        """Name of its file: a digest of everything that its result depends on, which headings in tables do not belong to."""
        identity = [self.model_key(INSPECTION_SETTINGS), self.category, self.kind, self.corruption, self.severities, self.shares]
        return "_".join([file_name(self.category), self.corruption or self.kind, f"seed{self.seed}", digest(identity)])

    def model_key(self, inspection: Iterable[str] = (), extra: Sequence[str] = ()) -> str:
        """Digest of everything that a training depends on.

        Args:
            inspection: Settings of the inspection that count too.
            extra: Names of images that are learnt from besides the training images.
        """
        settings = {k: v for k, v in to_json(self.settings).items() if k not in INSPECTION_SETTINGS or k in set(inspection)}
        whole = self.together or self.category
        return digest([self.configuration.base, settings, self.path, self.layout, whole, self.images, list(extra)])

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / CELLS / f"{self.key}.json"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        finished: Records of the cells that are there now, in the order of the plan.
        failed: ``(cell, reason)`` of those that are not.
        notes: What was left out, and why.
    """

    finished: list[dict[str, Any]]
    failed: list[tuple[Cell, str]]
    notes: list[str]


# -- the plan ---------------------------------------------------------------------------------------------------


def plan(
    config: BenchmarkConfig,
    data: str | Path,
    *,
    shift: bool = False,
    configurations: Sequence[str] = (),
    categories: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> tuple[list[Cell], list[str]]:
    """The cells of a benchmark in the order in which they are run: seed by seed, so that an early table has all categories.

    Args:
        config: What to compare.
        data: Folder that the paths of the data sets are below.
        shift: Corruptions and contamination too.
        configurations: Only these; none means all.
        categories: Only these; none means all.
        seeds: Other seeds than the file's.

    Returns:
        The cells, and notes on what is left out because it is not there.

    Raises:
        DataError: None of the data sets is there, one has no split, or a name given does not exist.
        ConfigError: A setting or a shift is wrong; what it belongs to is named.
    """
    if unknown := sorted(set(configurations) - {c.name for c in config.configurations}):
        raise DataError(f"no configuration {unknown[0]!r} in this benchmark; it has {', '.join(c.name for c in config.configurations)}")
    chosen = [c for c in config.configurations if not configurations or c.name in configurations]
    places, notes = _places(config, Path(data))
    known = list(dict.fromkeys(place.category for place in places))
    if unknown := sorted(set(categories) - set(known)):
        raise DataError(f"no category {unknown[0]!r} in this benchmark's data sets; there are {', '.join(known)}")
    places = [place for place in places if not categories or place.category in categories]
    for configuration in chosen:
        _check(configuration, [place.category for place in places], config.source)
    if shift:
        _check_shift(config.shift, config.source)
    cells = [
        variant
        for seed in dict.fromkeys(seeds or config.seeds)
        for place in places
        for configuration in chosen
        for variant in _variants(place.cell(configuration, seed), config.shift if shift else ShiftEntry())
    ]
    if shift and config.shift.contamination and any(c.multi_class for c in chosen):
        notes.append("contamination is measured on models of one category only")
    return list({cell.key: cell for cell in cells}.values()), notes


@dataclass(frozen=True)
class _Place:
    """A category of a data set that is there."""

    category: str
    make: Callable[..., Cell]
    images: str
    together: tuple[str, ...]
    images_together: str

    def cell(self, configuration: Configuration, seed: int) -> Cell:
        if configuration.multi_class:
            return self.make(configuration=configuration, seed=seed, images=self.images_together, together=self.together)
        return self.make(configuration=configuration, seed=seed, images=self.images)


def _places(config: BenchmarkConfig, data: Path) -> tuple[list[_Place], list[str]]:
    places: list[_Place] = []
    notes: list[str] = []
    for entry in config.datasets:
        root = data / entry.path
        if not root.exists():
            notes.append(f"{entry.name}: left out, because {root} is not there")
            continue
        dataset = read_dataset(root, entry.layout)
        if missing := sorted(set(entry.categories) - set(dataset.categories)):
            notes.append(f"{entry.name}: left out {', '.join(missing)}, not in {root}")
        wanted = tuple(name for name in entry.categories or dataset.categories if name in dataset.categories)
        digests = {name: _digest_of_images(dataset, name) for name in wanted}
        make = partial(Cell, dataset=entry.name, root=str(root), path=entry.path, layout=dataset.layout)
        for name in wanted:
            split_of(dataset, name)
            places.append(_Place(name, partial(make, category=name), digests[name], wanted, digest(digests)))
    if not places:
        raise DataError(f"{data}: none of the benchmark's data sets is there ({'; '.join(notes)})")
    return places, notes


def split_of(dataset: Dataset, category: str) -> tuple[list[Path], list[Sample]]:
    """Training images and test samples of one category.

    Raises:
        DataError: It lacks one of them, or an image is in both.
    """
    own = replace(dataset, samples=tuple(sample for sample in dataset.samples if sample.category == category), lines=())
    train, test = own.training_images(), own.test_samples()
    if both := {path.resolve() for path in train} & {sample.image_path.resolve() for sample in test}:
        raise DataError(
            f"{min(both)}: is both for training and for testing ({category}), so its results would mean nothing; "
            "a benchmark needs a split: train/ and test/ folders, or a manifest"
        )
    return train, test


def _variants(cell: Cell, shift: ShiftEntry) -> Iterator[Cell]:
    """The cell and its shifts."""
    yield cell
    if not shift.configurations or cell.configuration.name in shift.configurations:
        for name in shift.corruptions:
            yield replace(cell, kind=CORRUPTION, corruption=name, severities=shift.severities)
        if shift.contamination and not cell.together:
            yield replace(cell, kind=CONTAMINATION, shares=shift.contamination)


def _check(configuration: Configuration, categories: Sequence[str], source: str) -> None:
    """Refuse now what every cell would refuse later."""
    try:
        for category in categories:
            settings = settings_of(configuration.settings_of(category, 0))
            check_settings(configuration.base, settings, together=configuration.multi_class)
    except ConfigError as error:
        raise ConfigError(f"{source}: configuration {configuration.name!r}: {error}") from error


def _check_shift(shift: ShiftEntry, source: str) -> None:
    if not shift.corruptions and not shift.contamination:
        raise ConfigError(f"{source}: has no [shift] with corruptions or contamination; leave --shift out")
    if unknown := sorted(set(shift.corruptions) - set(SHIFTS)):
        raise ConfigError(f"{source}: unknown corruption {unknown[0]!r}; known are {', '.join(sorted(SHIFTS))}")


# -- running ----------------------------------------------------------------------------------------------------


def runnable(cells: Iterable[Cell]) -> tuple[list[Cell], list[str]]:
    """Those cells whose packages are installed, and notes on the others."""
    cells = list(cells)
    absent = {} if find_spec("anomalib") else {c.configuration.name for c in cells if c.configuration.base.startswith("anomalib-")}
    notes = [f"{name}: not run, because anomalib is not installed; run: pip install 'gladad[anomalib]'" for name in sorted(absent)]
    return [cell for cell in cells if cell.configuration.name not in absent], notes


def run(cells: Sequence[Cell], folder: str | Path, *, jobs: int = 1, tell: Tell = lambda line: None) -> list[tuple[Cell, str]]:
    """Run the cells that are not finished yet.

    Ctrl-C and SIGTERM stop what runs; what is finished stays.

    Args:
        cells: Of `plan`.
        folder: Where cells and models are kept.
        jobs: Cells that run at the same time; they share PyTorch's threads evenly. Times then are those of a part of the machine.
        tell: Called with a line on every cell.

    Returns:
        ``(cell, reason)`` of those that failed; they are tried again the next time.

    Raises:
        WriteError: Another benchmark is writing into the folder.
    """
    import torch

    from gladad.benchmark.cell import run_cell

    folder = Path(folder)
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    failed: list[tuple[Cell, str]] = []
    count = itertools.count(1)
    workers = Workers()

    def work(group: Sequence[Cell]) -> None:
        for cell in group:
            started = time.monotonic()
            problem = workers.run(run_cell, cell, folder, threads=threads)
            if workers.stopped:
                return
            if problem:
                failed.append((cell, problem))
            gist = f"FAILED: {problem}" if problem else _gist(read_json(cell.file(folder)))
            tell(f"[{next(count)}/{len(waiting)}] {cell.label}: {gist}, {time.monotonic() - started:.0f} s")

    with _alone(folder), interrupted_by_sigterm(), ThreadPoolExecutor(jobs) as executor:
        waiting = [cell for cell in cells if not cell.file(folder).is_file()]
        if len(waiting) < len(cells):
            tell(f"{len(cells) - len(waiting)} of {len(cells)} cells were finished before")
        futures = [executor.submit(work, group) for group in _by_training(waiting)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            workers.stop()
            executor.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


def finished(cells: Iterable[Cell], folder: str | Path) -> list[dict[str, Any]]:
    """The records of those cells that are finished, in their order and under their present names."""
    return [read_json(cell.file(Path(folder))) | {"cell": cell.names} for cell in cells if cell.file(Path(folder)).is_file()]


def _by_training(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that share a training together, so that the first trains for the others."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.model_key(), []).append(cell)
    return list(groups.values())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other benchmarks out of the folder, and remove what one that was killed left half-written."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            for left in (path for place in (CELLS, MODELS) for path in (folder / place).rglob(".*") if path.suffix in {".partial", ".old"}):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
    except Timeout as error:
        raise WriteError(f"{folder}: another benchmark is writing into this folder; wait for it, or choose another one") from error


def _gist(record: dict[str, Any]) -> str:
    """The first number of a cell for its line."""
    return "image AUROC " + " ".join(f"{result['metrics'].get('image_auroc', float('nan')):.4f}" for result in record["results"])


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON-ready value (or one of dataclasses)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:12]


def file_name(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.+-]+|^\.+", "-", text)


def _digest_of_images(dataset: Dataset, category: str) -> str:
    """Digest of what is known of the images of a category without reading them, wherever the data set lies."""

    def entry(path: Path) -> tuple[str, int]:
        return os.fsencode(os.path.relpath(path, dataset.root)).hex(), path.stat().st_size if path.is_file() else -1

    rows = []
    for sample in dataset.samples:
        if sample.category == category:
            mask = sample.mask_path
            masks = [] if mask is None else [entry(path) for path in (list_images(mask) if mask.is_dir() else [mask])]
            rows.append((*entry(sample.image_path), sample.gt_label, sample.split, sample.defect_type, masks))
    return digest(sorted(rows))
