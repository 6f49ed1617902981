"""Many detectors on many data sets, side by side: what is to be run, and running it, one cell at a time, from where it stopped.

A *cell* is one configuration on one category with one seed. Each runs in a process of its own, so that its peak memory is its own and one
that dies takes nothing with it. A finished cell is one JSON file, written whole; it is not run again unless something that its result
depends on changes: settings, defaults, the code, or what is in the images. What a cell does is in `gladad.benchmark.cell`.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gladad.benchmark.config import BenchmarkConfig, Configuration, ShiftEntry
from gladad.benchmark.identity import SOURCE, content, digest, file_name, images_digest, samples_digest, source_fingerprint
from gladad.benchmark.workers import Starter, Workers, in_parallel, threads_of
from gladad.core.errors import ConfigError, DataError
from gladad.core.images import list_images
from gladad.core.records import Sample
from gladad.core.settings import to_json
from gladad.core.storage import WriteError, read_json
from gladad.core.threads import interrupted_by_sigterm
from gladad.data.corruptions import SHIFTS
from gladad.data.layouts import Dataset, read_dataset
from gladad.models.registry import family_of, make_settings
from gladad.models.settings import DenoisingSettings, FitSettings

CELLS, MODELS = "cells", "models"
PLAIN, CORRUPTION, CONTAMINATION = "plain", "corruption", "contamination"
Tell = Callable[[str], None]
_Facts = dict[str, Any]
"""Fields of a `Cell` that its category decides."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to run."""

    dataset: str  # its name
    category: str  # the product
    configuration: str  # name of what runs on it
    base: str  # its model
    settings: FitSettings
    root: str  # where the data set lies
    layout: str  # how it is read
    code: str  # SHA-256 of the code that decides the result
    trained: str  # the same of what is learnt from: names and contents of images
    images: str  # the same of all images of the category: names, contents, labels, splits and masks
    together: tuple[str, ...] = ()  # all categories of the data set that one model is for; empty where it is for one
    kind: str = PLAIN  # or CORRUPTION or CONTAMINATION
    corruption: str = ""  # its name, for that kind
    severities: tuple[int, ...] = ()  # of the corruption
    shares: tuple[float, ...] = ()  # of defective images mixed into training, for CONTAMINATION

    @property
    def names(self) -> dict[str, Any]:
        """Its place in the tables."""
        return {"dataset": self.dataset, "category": self.category, "configuration": self.configuration, "seed": self.settings.seed}

    @property
    def label(self) -> str:
        """What to call it in messages."""
        shift = {PLAIN: "", CORRUPTION: f" {self.corruption}", CONTAMINATION: " contamination"}[self.kind]
        return f"{self.dataset} {self.category}: {self.configuration}{shift}, seed {self.settings.seed}"

    @property
    def key(self) -> str:
        """Name of its file, with a digest of everything that its result depends on; where things lie and headings do not belong to that."""
        identity = [self.model_key(whole=True), self.category, self.images, self.kind, self.corruption, self.severities, self.shares]
        return "_".join([file_name(self.category), self.corruption or self.kind, f"seed{self.settings.seed}", digest(identity)])

    def model_key(self, extra: Iterable[Path] = (), *, whole: bool = False) -> str:
        """SHA-256 of everything that a training depends on, ``extra`` images that are learnt from included.

        ``whole`` counts settings too that another training is not needed for.
        """
        settings = to_json(self.settings) if whole else family_of(self.base).training_values(self.settings)
        return digest([self.code, self.base, settings, self.together, self.trained, [content(path) for path in extra]])

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / CELLS / f"{self.key}.json"


def plan(config: BenchmarkConfig, data: Path, *, seeds: Sequence[int] = (), source: Path = SOURCE) -> tuple[list[Cell], list[str]]:
    """The cells of a benchmark in the order in which they are run: seed by seed, so that an early table has all categories.

    Args:
        config: What to compare.
        data: Folder that the paths of the data sets are below.
        seeds: Others besides the file's.
        source: Folder of the package whose code runs.

    Returns:
        All cells, shifts included, and notes on what is left out because it is not there.

    Raises:
        DataError: None of the data sets is there, or one has no split.
        ConfigError: A setting or a shift is wrong; what it belongs to is named.
    """
    shift = config.shift
    if unknown := sorted(set(shift.corruptions) - set(SHIFTS)):
        raise ConfigError(f"{config.source}: unknown corruption {unknown[0]!r}; known are {', '.join(sorted(SHIFTS))}")
    places, notes = _places(config, data, source_fingerprint(source))
    cells: dict[Cell, None] = {}  # an ordered set
    for seed, (place, learnt), one in itertools.product([*config.seeds, *seeds], places, config.configuration):
        try:
            cells |= dict.fromkeys(_variants(_cell(place, learnt, one, seed), shift))
        except ConfigError as error:
            raise ConfigError(f"{config.source}: configuration {one.name!r}: {error}") from error
    if shift.contamination and any(one.multi_class and shift.covers(one.name) for one in config.configuration):
        notes.append("contamination is measured on models of one category only")
    return list(cells), notes


def select(cells: Sequence[Cell], *, shift: bool = False, **wanted: Sequence[Any] | None) -> list[Cell]:
    """A part of a plan: with shifts or without, and what is wanted of each ``configuration``, ``category`` and ``seed``; none means all.

    Raises:
        DataError: A name does not exist.
        ConfigError: There are no shifts.
    """
    if shift and all(cell.kind == PLAIN for cell in cells):
        raise ConfigError("this benchmark has no [shift] with corruptions or contamination; leave --shift out")
    for key, names in wanted.items():
        there = list(dict.fromkeys(cell.names[key] for cell in cells))
        if unknown := sorted(set(names or ()) - set(there)):
            raise DataError(f"no {key} {unknown[0]!r} in this benchmark; there are {', '.join(map(str, there))}")
        cells = [cell for cell in cells if not names or cell.names[key] in names]
    return [cell for cell in cells if shift or cell.kind == PLAIN]


def _places(config: BenchmarkConfig, data: Path, code: str) -> tuple[list[tuple[_Facts, dict[str, str]]], list[str]]:
    """The categories that are there, each with what is learnt from in all categories that are wanted of its data set; and notes."""
    places: list[tuple[_Facts, dict[str, str]]] = []
    notes: list[str] = []
    for entry in config.dataset:
        root = data / entry.path
        if not root.exists():
            notes.append(f"{entry.name}: left out, because {root} is not there")
            continue
        dataset = read_dataset(root, entry.layout)
        if missing := sorted(set(entry.categories) - set(dataset.categories)):
            notes.append(f"{entry.name}: left out {', '.join(missing)}, not in {root}")
        wanted = [name for name in dict.fromkeys(entry.categories or dataset.categories) if name in dataset.categories]
        learnt = {name: images_digest(split_of(dataset, name)[0], dataset.root) for name in wanted}
        facts = {"dataset": entry.name, "root": str(root), "layout": dataset.layout, "code": code}
        for name in wanted:
            images = samples_digest((sample for sample in dataset.samples if sample.category == name), dataset.root)
            places.append((facts | {"category": name, "images": images}, learnt))
    if not places:
        raise DataError(f"{data}: none of the benchmark's data sets is there ({'; '.join(notes)})")
    return places, notes


def _cell(facts: _Facts, learnt: Mapping[str, str], configuration: Configuration, seed: int) -> Cell:
    """A configuration on a category; what a run would refuse later is refused now."""
    base, category = configuration.base, facts["category"]
    settings = make_settings(base, configuration.values(category) | {"seed": seed})
    family_of(base).check(base, settings, configuration.multi_class)
    trained = digest(learnt) if configuration.multi_class else learnt[category]
    if isinstance(settings, DenoisingSettings) and settings.textures is not None:
        trained = digest([trained, *map(content, list_images(Path(settings.textures)))])
    names = tuple(learnt) if configuration.multi_class else ()
    return Cell(**facts, configuration=configuration.name, base=base, settings=settings, trained=trained, together=names)


def split_of(dataset: Dataset, category: str) -> tuple[list[Path], list[Sample]]:
    """Training images and test samples of one category.

    Raises:
        DataError: It lacks one of them, or an image is in both.
    """
    own = replace(dataset, samples=[sample for sample in dataset.samples if sample.category == category])
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
    if shift.covers(cell.configuration):
        for name in shift.corruptions:
            yield replace(cell, kind=CORRUPTION, corruption=name, severities=shift.severities)
        if shift.contamination and not cell.together:
            yield replace(cell, kind=CONTAMINATION, shares=shift.contamination)


def runnable(cells: Iterable[Cell], installed: Callable[[str], object] = find_spec) -> tuple[list[Cell], list[str]]:
    """Those cells whose packages are installed, and notes on the others."""
    cells = list(cells)
    absent = set() if installed("anomalib") else {cell.configuration for cell in cells if cell.base.startswith("anomalib-")}
    notes = [f"{name}: not run, because anomalib is not installed; run: pip install 'gladad[anomalib]'" for name in sorted(absent)]
    return [cell for cell in cells if cell.configuration not in absent], notes


def run(
    cells: Sequence[Cell], folder: Path, *, jobs: int = 1, tell: Tell = lambda line: None, workers: Starter | None = None
) -> list[tuple[Cell, str]]:
    """Run the cells that are not finished yet. Ctrl-C and SIGTERM stop what runs; what is finished stays.

    Args:
        cells: Of `plan`.
        folder: Where cells and models are kept.
        jobs: Cells that run at the same time; they share PyTorch's threads evenly. Times then are those of a part of the machine.
        tell: Called with a line on every cell.
        workers: Where they run; None is here.

    Returns:
        ``(cell, reason)`` of those that failed, which the next call tries again.

    Raises:
        WriteError: Another benchmark is writing into the folder.
    """
    from gladad.benchmark.cell import run_cell

    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    workers = workers or Workers()
    threads = threads_of(workers, jobs)
    failed: list[tuple[Cell, str]] = []
    count = itertools.count(1)

    def work(group: Sequence[Cell]) -> None:
        for cell in group:
            started = time.monotonic()
            problem = workers.run(run_cell, cell, folder, threads=threads)
            if workers.stopped:
                return
            if problem:
                failed.append((cell, problem))
                gist = f"FAILED: {problem}"
            else:
                found = [result["metrics"].get("image_auroc", math.nan) for result in read_json(cell.file(folder))["results"]]
                gist = f"image AUROC {' '.join(f'{value:.4f}' for value in found)}"
            tell(f"[{next(count)}/{len(waiting)}] {cell.label}: {gist}, {time.monotonic() - started:.0f} s")

    with _alone(folder), interrupted_by_sigterm():
        once = {cell.key: cell for cell in cells}  # headings may differ where nothing else does
        waiting = [cell for cell in once.values() if not cell.file(folder).is_file()]
        if len(waiting) < len(once):
            tell(f"{len(once) - len(waiting)} of {len(once)} cells were finished before")
        groups: dict[str, list[Cell]] = {}  # those of one training together: the first trains for the others
        for cell in waiting:
            groups.setdefault(cell.model_key(), []).append(cell)
        in_parallel(work, groups.values(), jobs, workers)
    return failed


def finished(cells: Iterable[Cell], folder: Path) -> list[dict[str, Any]]:
    """The records of those cells that are finished, in their order and under their present names."""
    return [read_json(cell.file(folder)) | {"cell": cell.names} for cell in cells if cell.file(folder).is_file()]


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
