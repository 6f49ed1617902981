"""Many detectors on many data sets, side by side: fit, calibrate and evaluate each, one cell at a time, and go on where it stopped.

A *cell* is one configuration on one category with one seed. Each runs in a process of its own, so that its peak memory is its own and one
that dies takes nothing with it. A finished cell is one JSON file, written whole; it is not run again unless its settings or images change.
Models are kept beside the cells: configurations that differ in the inspection only share one training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gladad import __version__
from gladad.benchmark_config import BenchmarkConfig, Configuration
from gladad.config import to_json
from gladad.errors import ConfigError, DataError, GladError
from gladad.storage import read_json, write_json
from gladad.types import Sample

if TYPE_CHECKING:
    from gladad.detector import Glad

CELLS, MODELS = "cells", "models"
FIT_FILE = "fit.json"
PLAIN = "plain"
CORRUPTION, CONTAMINATION = "corruption", "contamination"

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to run.

    Attributes:
        dataset: Name of the data set.
        root: Where it lies.
        layout: How it is read.
        category: The product.
        configuration: What runs on it.
        seed: Of everything random in it.
        kind: "plain", "corruption" or "contamination".
        corruption: Name of the corruption, for that kind.
        severities: Of the corruption.
        shares: Of defective images mixed into training, for "contamination".
        images: Digest of names and sizes of the images.
        together: All categories of the data set that are run, where one model is for all of them.
    """

    dataset: str
    root: str
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
    def settings(self) -> dict[str, Any]:
        """Settings of the fit."""
        return self.configuration.settings_of(self.category, self.seed)

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
        """Name of its file: a digest of everything that its result depends on, which names of columns and of folders do not."""
        identity = {name: value for name, value in to_json(self).items() if name not in {"root", "dataset"}}
        identity["configuration"] = {name: value for name, value in identity["configuration"].items() if name != "name"}
        parts = [self.category, self.corruption or self.kind, f"seed{self.seed}", _digest(identity)]
        return "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in parts)

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / CELLS / f"{self.key}.json"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        finished: Cells that are there now, in the order of the plan.
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
        DataError: None of the data sets is there, or a name given does not exist.
        ConfigError: A setting is wrong (its configuration is named), or a corruption is unknown.
    """
    from gladad.datasets import read_dataset

    notes: list[str] = []
    unknown = sorted(set(configurations) - {c.name for c in config.configurations})
    if unknown:
        names = ", ".join(c.name for c in config.configurations)
        raise DataError(f"no configuration {unknown[0]!r} in this benchmark; it has {names}")
    chosen = []
    for configuration in config.configurations:
        if configurations and configuration.name not in configurations:
            continue
        if configuration.base.startswith("anomalib-") and find_spec("anomalib") is None:
            notes.append(f"{configuration.name}: left out, because anomalib is not installed; run: pip install 'gladad[anomalib]'")
        else:
            _check(configuration, config)
            chosen.append(configuration)
    places: list[tuple[Callable[..., Cell], tuple[str, ...], str]] = []
    for entry in config.datasets:
        root = Path(data) / entry.path
        if not root.exists():
            notes.append(f"{entry.name}: left out, because {root} is not there")
            continue
        dataset = read_dataset(root, entry.layout)
        if missing := sorted(set(entry.categories) - set(dataset.categories)):
            notes.append(f"{entry.name}: left out {', '.join(missing)}, not in {root}")
        wanted = [name for name in entry.categories or dataset.categories if name in dataset.categories]
        wanted = [name for name in wanted if not categories or name in categories]
        place = partial(Cell, dataset=entry.name, root=str(root), layout=dataset.layout)
        digests = {name: _digest_of_files(root, (s.image_path for s in dataset.samples if s.category == name)) for name in wanted}
        places += [(partial(place, category=name, images=digests[name]), tuple(wanted), _digest(digests)) for name in wanted]
    if not places:
        raise DataError(f"{data}: none of the benchmark's data sets or categories is there ({'; '.join(notes) or 'none was chosen'})")
    cells = []
    for seed in seeds or config.seeds:
        for make, together, digest in places:
            for configuration in chosen:
                cell = make(configuration=configuration, seed=seed)
                if configuration.multi_class:
                    cell = replace(cell, together=together, images=digest)
                cells.append(cell)
                if shift and (not config.shift.configurations or configuration.name in config.shift.configurations):
                    severities = config.shift.severities
                    cells += [replace(cell, kind=CORRUPTION, corruption=n, severities=severities) for n in config.shift.corruptions]
                    if config.shift.contamination:
                        cells.append(replace(cell, kind=CONTAMINATION, shares=config.shift.contamination))
    return cells, notes


def _check(configuration: Configuration, config: BenchmarkConfig) -> None:
    """Refuse now what every cell would refuse later."""
    from gladad.bases import settings_of
    from gladad.corruptions import SHIFTS

    try:
        settings_of(configuration.settings_of("category", 0))
    except ConfigError as error:
        raise ConfigError(f"configuration {configuration.name!r}: {error}") from error
    if unknown := sorted(set(config.shift.corruptions) - set(SHIFTS)):
        raise ConfigError(f"unknown corruption {unknown[0]!r}; known are {', '.join(sorted(SHIFTS))}")


# -- running ----------------------------------------------------------------------------------------------------


def run(cells: Sequence[Cell], folder: str | Path, *, jobs: int = 1, tell: Tell = lambda line: None) -> list[tuple[Cell, str]]:
    """Run the cells that are not finished yet.

    Args:
        cells: Of `plan`.
        folder: Where cells and models are kept.
        jobs: Cells that run at the same time; they share the cores evenly. Times then are those of a part of the machine.
        tell: Called with a line on every cell.

    Returns:
        ``(cell, reason)`` of those that failed; they are tried again the next time.
    """
    folder = Path(folder)
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in cells if not cell.file(folder).is_file()]
    if len(waiting) < len(cells):
        tell(f"{len(cells) - len(waiting)} of {len(cells)} cells were finished before")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failed: list[tuple[Cell, str]] = []
    count = itertools.count(1)

    stopping = threading.Event()

    def work(group: Sequence[Cell]) -> None:
        for cell in group:
            if stopping.is_set():
                return
            started = time.monotonic()
            problem = _in_a_process_of_its_own(cell, folder, threads)
            if problem:
                failed.append((cell, problem))
            gist = f"FAILED: {problem}" if problem else _gist(read_json(cell.file(folder)))
            tell(f"[{next(count)}/{len(waiting)}] {cell.label}: {gist}, {time.monotonic() - started:.0f} s")

    with ThreadPoolExecutor(jobs) as executor:
        futures = [executor.submit(work, group) for group in _by_training(waiting)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C: what runs is stopped, what is finished stays
            stopping.set()
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failed


def finished(cells: Iterable[Cell], folder: str | Path) -> list[dict[str, Any]]:
    """The records of those cells that are finished, in their order and under their present names."""
    return [read_json(cell.file(Path(folder))) | {"cell": cell.names} for cell in cells if cell.file(Path(folder)).is_file()]


def _by_training(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that share a training together, so that the first trains for the others."""
    from gladad.bases import INSPECTION_SETTINGS

    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        trained = {name: value for name, value in cell.settings.items() if name not in INSPECTION_SETTINGS}
        whole = cell.together or cell.category
        groups.setdefault(_digest([cell.root, whole, cell.configuration.base, trained]), []).append(cell)
    return list(groups.values())


def _in_a_process_of_its_own(cell: Cell, folder: Path, threads: int) -> str:
    """Run one cell; returns what went wrong, or nothing."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_few_threads, initargs=(threads,)) as executor:
        try:
            executor.submit(run_cell, cell, folder).result()
        except BrokenProcessPool:
            return "its process was killed; most often memory ran out"
        except GladError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _few_threads(threads: int) -> None:
    """Set up a process: Ctrl-C is for the one that started it, and the cores are shared.

    Two OpenMP programs that both take all cores wait for each other most of the time.
    """
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def run_cell(cell: Cell, folder: Path) -> None:
    """Fit (or load), calibrate and evaluate one cell, and write its file."""
    from gladad.datasets import read_dataset

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    dataset = read_dataset(cell.root, cell.layout, cell.category)
    train, test = dataset.training_images(), dataset.test_samples()
    if cell.kind == CONTAMINATION and cell.together:
        raise ConfigError(
            "contamination is measured on models of one category; leave multi-class configurations out of shift.configurations"
        )
    if cell.kind == CONTAMINATION:
        results = _contaminated(cell, folder, train, test)
    else:
        detector, facts = _fitted(cell, folder, train)
        if cell.kind == CORRUPTION:
            results = [_judged(_Corrupted(detector, cell.corruption, severity), test, severity=severity) for severity in cell.severities]
        else:
            results = [_judged(detector, test, pixels=True)]
        results = [result | facts for result in results]
    record = {
        "cell": cell.names,
        "kind": cell.kind,
        "corruption": cell.corruption,
        "settings": cell.settings,
        "base": cell.configuration.base,
        "results": results,
        "peak_memory_gib": _peak_memory(),
        "version": __version__,
    }
    write_json(cell.file(folder), record)


def _fitted(cell: Cell, folder: Path, train: Sequence[Path], extra: Sequence[Path] = ()) -> tuple[Glad, dict[str, Any]]:
    """The detector of a cell: from the models kept, by adjusting one of them, or trained; and facts about its training."""
    from gladad.bases import INSPECTION_SETTINGS, settings_of
    from gladad.detector import Glad

    settings = settings_of(cell.settings)
    images = [*train, *extra]
    trained = {name: value for name, value in to_json(settings).items() if name not in INSPECTION_SETTINGS}
    identity = [cell.configuration.base, trained, cell.images, [os.path.relpath(path, cell.root) for path in extra], cell.together]
    name = f"{'together' if cell.together else cell.category}_{_digest(identity)}"
    place = folder / MODELS / name / cell.category if cell.together else folder / MODELS / name
    if fresh := not (place / FIT_FILE).is_file():
        started = time.monotonic()
        detectors = _fit_together(cell, settings) if cell.together else {}
        detector = detectors.get(cell.category) or Glad.from_base(cell.configuration.base, settings=settings).fit(images)
        seconds = time.monotonic() - started
        for category, other in detectors.items():
            _keep(other, place.parent / category, seconds)
        if not detectors:
            _keep(detector, place, seconds)
    else:
        detector = Glad.from_pretrained(place)
        if detector.settings != settings:
            detector.adjust(images, settings)
    return detector, {"fit_seconds": float(read_json(place / FIT_FILE)["seconds"]), "fitted": fresh}


def _fit_together(cell: Cell, settings: Any) -> dict[str, Glad]:
    from gladad.datasets import read_dataset
    from gladad.detector import Glad

    images = {name: read_dataset(cell.root, cell.layout, name).training_images() for name in cell.together}
    return Glad.fit_together(images, cell.configuration.base, settings)


def _keep(detector: Glad, place: Path, seconds: float) -> None:
    """Save a model with the time of its training, which is there when the model is."""
    place.parent.mkdir(parents=True, exist_ok=True)
    detector.save_pretrained(place)
    write_json(place / FIT_FILE, {"seconds": seconds})


def _judged(detector: Any, samples: Sequence[Sample], *, pixels: bool = False, **facts: Any) -> dict[str, Any]:
    """Metrics of one detector on some samples."""
    from gladad.evaluation import evaluate

    if not pixels:  # the masks of a moved image would have to move with it
        samples = [replace(sample, mask_path=None) for sample in samples]
    report = evaluate(detector, samples)
    return facts | {"metrics": report.metrics, "counts": report.counts, "per_type": report.details["per_type"]}


@dataclass(frozen=True)
class _Corrupted:
    """A detector that is shown every image through one corruption."""

    detector: Glad
    corruption: str
    severity: int

    @property
    def calibration_(self) -> Any:
        return self.detector.calibration_

    @property
    def workers(self) -> int:
        return self.detector.workers

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Any:
        from gladad.corruptions import corrupt
        from gladad.images import as_pixels

        pixels = as_pixels(image)
        seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:4], "big")  # of the image alone, so no order matters
        return self.detector.inspect(corrupt(pixels, self.corruption, self.severity, seed), reconstruct=reconstruct)


def _contaminated(cell: Cell, folder: Path, train: Sequence[Path], test: Sequence[Sample]) -> list[dict[str, Any]]:
    """Fits with some defective images among the good ones, all judged on the same remaining test images."""
    import numpy as np

    bad = [sample for sample in test if sample.gt_label]
    order = np.random.default_rng(cell.seed).permutation(len(bad)).tolist()
    counts = [round(share / (1 - share) * len(train)) for share in cell.shares]
    if max(counts) >= len(bad):
        raise DataError(f"{cell.category}: {max(counts)} defective images are to be mixed in, and there are {len(bad)}")
    mixed = {bad[place].image_path for place in order[: max(counts)]}
    rest = [sample for sample in test if sample.image_path not in mixed]
    results = []
    for share, count in zip(cell.shares, counts, strict=True):
        detector, facts = _fitted(cell, folder, train, [bad[place].image_path for place in order[:count]])
        results.append(_judged(detector, rest, pixels=True, share=share, defective=count) | facts)
    return results


def _gist(record: dict[str, Any]) -> str:
    """The first number of a cell for its line."""
    results = record["results"]
    values = [result["metrics"].get("image_auroc", math.nan) for result in results]
    return "image AUROC " + " ".join(f"{value:.4f}" for value in values)


def _peak_memory() -> float:
    """Largest resident memory of this process so far, in GiB."""
    try:  # unlike the resource module's number, not inherited from the process that started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    if found:
        return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:12]


def _digest_of_files(root: Path, files: Iterable[Path]) -> str:
    """Digest of names and sizes, wherever the data set lies: contents are not read."""
    return _digest(sorted((os.fsencode(os.path.relpath(file, root)).hex(), file.stat().st_size) for file in files if file.is_file()))
