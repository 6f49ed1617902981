"""The demonstration: real solar cells, learned from cells that work, judged on cells that the detector has not seen.

Electroluminescence images of monocrystalline cells from the ELPV data set (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), which
the package ``elpv-dataset`` brings along under CC BY-NC-SA 4.0. Normal are cells that all experts called functional (defect probability
0), anomalous those that all called defective (1). The cells come from 44 modules and which is not recorded, so the held-out cells are
other cells, but not all from other modules.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gladad.benchmark import products
from gladad.core.errors import MissingExtraError
from gladad.core.records import Progress, Report, Sample, no_progress
from gladad.data.samples import split_held_out
from gladad.detector.glad import Glad
from gladad.evaluation.run import evaluate, write_report
from gladad.models.registry import make_settings
from gladad.models.settings import FitSettings
from gladad.report.files import check_output
from gladad.report.gallery import GalleryItem

SEED = 0
TRAIN, TEST = 400, 150  # good cells to learn from, and cells of each kind to judge, at most
# Fewer steps than the default, so that all of it takes some four minutes on two cores. Of the 400 cells 99 are held out.
DEFAULTS = {"seed": SEED, "training.steps": 300, "false_reject_rate": 0.05}


def solar_cells(folder: Path | None = None, seed: int = SEED) -> tuple[list[Path], list[Sample]]:
    """Split the monocrystalline cells into files to learn from and labelled samples to judge, the same way for the same seed.

    ``labels.csv`` and ``images/`` are in the folder; None finds the installed package.

    Raises:
        MissingExtraError: The package is not installed.
        DataError: The folder does not hold the data set.
    """
    if folder is None:
        package = products.package("elpv_dataset")
        if package is None:
            raise MissingExtraError("the demo", "'gladad[demo]'")
        folder = package / "data"
    good, bad = products.solar_cells(folder, "mono")
    test_good, test_bad = (split_held_out(paths, share=0.0, minimum=TEST, seed=seed)[1] for paths in (good, bad))
    held_out = set(test_good)
    rest = [path for path in good if path not in held_out]
    order = np.random.default_rng(seed).permutation(len(rest))[:TRAIN]
    test = [Sample(path, category="solar cells") for path in test_good]
    test += [Sample(path, gt_label=1, category="solar cells", defect_type="defective") for path in test_bad]
    return [rest[place] for place in sorted(order.tolist())], test


def run(
    output: Path, folder: Path | None = None, *, settings: FitSettings | None = None, progress: Progress = no_progress
) -> tuple[Report, Path]:
    """Fit on good cells (of `solar_cells`), judge held-out ones, and write the report; returns the report and its page.

    The default settings of the fit take a few minutes on two cores.
    """
    train, test = solar_cells(folder)
    check_output(output)
    detector = Glad.from_base("lite", settings=settings or make_settings("lite", DEFAULTS)).fit(train, progress=progress)
    items: list[GalleryItem] = []
    report = evaluate(detector, test, collect=items.append, progress=progress)
    report.details["data"] = {"name": "ELPV, monocrystalline", "train": len(train), "test": len(test), "seed": SEED}
    return report, write_report(report, items, output, title="Solar cells: what the detector makes of cells it has not seen")
