"""A generated product and a detector of it, made once for all tests."""

from __future__ import annotations

import os

# the tests' networks are tiny: more threads only wait for each other, on a busy machine for very long
os.environ["OMP_NUM_THREADS"] = "1"

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gladad.detector.glad import Glad

SIDE = 72
TINY = {"image_size": 64, "memory": 400, "widths": [32, 32], "training.batch_size": 8, "training.pool": 32, "training.decoder_steps": 5}
"""Settings of a ``lite`` model that trains in a second or two."""
TINY_FLAGS = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]
"""The same for the command line."""
pytest_plugins = ["tiny_base", "service_base", "console_base"]


def draw_part(seed: int, defective: bool = False) -> tuple[Image.Image, Image.Image]:
    """A striped part, and the mask of its defect, a dark square; every one is different."""
    rng = np.random.default_rng(seed)
    grey = 120 + 40 * np.sin(np.arange(SIDE) / 6) + rng.normal(0, 4, (SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    if defective:
        top, left = rng.integers(12, 40, 2)
        mask[top : top + 20, left : left + 20] = 255
        grey[mask > 0] = 15
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB"), Image.fromarray(mask)


def write_category(root: Path, train: int = 16, test: int = 4) -> Path:
    """A category in MVTec's layout."""
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (root / folder).mkdir(parents=True)
    for index in range(train):
        draw_part(index)[0].save(root / "train/good" / f"{index:03}.png")
    for index in range(test):
        draw_part(1000 + index)[0].save(root / "test/good" / f"{index:03}.png")
        image, mask = draw_part(2000 + index, defective=True)
        image.save(root / "test/hole" / f"{index:03}.png")
        mask.save(root / "ground_truth/hole" / f"{index:03}_mask.png")
    return root


@pytest.fixture(scope="session")
def category(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small category; read only."""
    return write_category(tmp_path_factory.mktemp("data") / "widget")


@pytest.fixture(scope="session")
def detector(category: Path) -> Glad:
    """A real detector with next to no training; read only."""
    settings = TINY | {"training.steps": 8, "false_reject_rate": 0.2, "calibration": "held-out"}
    return Glad.from_base("lite", settings=settings).fit(category)


@pytest.fixture(scope="session")
def model(detector: Glad, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the detector is saved in; read only."""
    folder = tmp_path_factory.mktemp("models") / "widget"
    detector.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def report_folder(detector: Glad, category: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything; read only."""
    from reports import mislabelled, put_report  # here, as processes that draw parts import this module, and need no metrics

    folder = tmp_path_factory.mktemp("report")
    put_report(detector, mislabelled(detector, category), folder)
    return folder


@pytest.fixture(scope="session")
def report_folder_without_masks(detector: Glad, category: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the same images without their masks; read only."""
    from reports import mislabelled, put_report

    folder = tmp_path_factory.mktemp("report-without-masks")
    put_report(detector, [replace(sample, mask_path=None) for sample in mislabelled(detector, category)], folder)
    return folder
