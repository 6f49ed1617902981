"""A model for every product of a data set: fits in processes of their own, here or on a cluster, and only those that are not done."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gladad.benchmark.identity import digest, file_name, images_digest
from gladad.benchmark.workers import Starter, Workers, in_parallel, threads_of
from gladad.core.errors import ConfigError, DataError
from gladad.core.settings import to_json
from gladad.core.storage import MODEL_FILE, check_target, read_json, write_json
from gladad.core.threads import interrupted_by_sigterm
from gladad.data.layouts import read_dataset
from gladad.detector.glad import Glad
from gladad.models.registry import family_of
from gladad.models.settings import FitSettings

RECORD = ".{}.fit.json"  # beside the model's folder: of which images and settings it is, written when it is there


@dataclass(frozen=True)
class Fit:
    """One product's fit."""

    product: str
    images: tuple[Path, ...]  # good ones
    folder: Path  # of the model
    key: str  # SHA-256 of everything that it depends on but the code

    @property
    def done(self) -> bool:
        """Whether the model of these images and settings is there."""
        record = self.folder.with_name(RECORD.format(self.folder.name))
        return record.is_file() and (self.folder / MODEL_FILE).is_file() and read_json(record).get("key") == self.key


def plan_fits(data: Path, output: Path, base: str, settings: FitSettings, layout: str = "auto") -> list[Fit]:
    """The fits of a data set, one for each category with good images to learn from.

    Raises:
        DataError: There is none.
        ConfigError: The model trains for hours, with checkpoints of its own.
        WriteError: A model's folder holds something else.
    """
    if family_of(base).LONG:
        raise ConfigError(f"{base} is fitted one product at a time, so that it goes on where it stopped: gladad fit --category")
    dataset = read_dataset(data, layout)
    fits = []
    for product in dataset.categories:
        images = [sample.image_path for sample in dataset.of("train") if sample.category == product and not sample.gt_label]
        if images:
            folder = (output / file_name(product)).absolute()
            check_target(folder)
            key = digest([base, to_json(settings), images_digest(images, dataset.root)])
            fits.append(Fit(product, tuple(path.absolute() for path in images), folder, key))
    if not fits:
        raise DataError(f"{data}: no product has good images to learn from")
    return fits


def fit_product(fit: Fit, base: str, settings: FitSettings) -> None:
    """Do one; the model is replaced at the end, and recorded after that."""
    if not fit.done:
        Glad.from_base(base, settings=settings).fit(fit.images).save_pretrained(fit.folder)
        write_json(fit.folder.with_name(RECORD.format(fit.folder.name)), {"key": fit.key, "product": fit.product})


def run_fits(
    fits: Sequence[Fit],
    base: str,
    settings: FitSettings,
    *,
    jobs: int = 1,
    tell: Callable[[str], None] = lambda line: None,
    workers: Starter | None = None,
) -> list[tuple[Fit, str]]:
    """Do those that are not done. Ctrl-C and SIGTERM stop what runs; what is done stays.

    Args:
        fits: Of `plan_fits`.
        base: As for the plan.
        settings: As for the plan.
        jobs: Fits at the same time; they share the cores evenly.
        tell: Called with a line on every fit.
        workers: Where they run; None is here.

    Returns:
        ``(fit, reason)`` of those that failed, which the next call tries again.
    """
    workers = workers or Workers()
    threads = threads_of(workers, jobs)
    waiting, count = [fit for fit in fits if not fit.done], itertools.count(1)
    failed: list[tuple[Fit, str]] = []
    if len(waiting) < len(fits):
        tell(f"{len(fits) - len(waiting)} of {len(fits)} products were fitted before")

    def work(fit: Fit) -> None:
        started = time.monotonic()
        problem = workers.run(fit_product, fit, base, settings, threads=threads)
        if workers.stopped:
            return
        if problem:
            failed.append((fit, problem))
        gist = f"FAILED: {problem}" if problem else f"{time.monotonic() - started:.0f} s"
        tell(f"[{next(count)}/{len(waiting)}] {fit.product}: {gist}")

    with interrupted_by_sigterm():
        in_parallel(work, waiting, jobs, workers)
    return failed
