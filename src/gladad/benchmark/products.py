"""Products for a benchmark that are made where it runs: drawn by rule, or taken out of a package that brings images along.

Each is written in the MVTec layout, as links where the images are files already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from gladad.benchmark import generated
from gladad.benchmark.config import BenchmarkConfig
from gladad.core.errors import ConfigError, DataError
from gladad.core.images import list_images, load_image

TRAIN, TEST = 400, 100
"""Images of a package taken at most to learn from, and of each kind to judge."""
TEXTURES = 3  # classes of DTD
_TEXTILE = "data/textile_images/simulated"


def make(name: str, root: Path, data: Path) -> str:
    """Write one product below ``root``, whole or not at all, unless it is there.

    Args:
        name: One of `MADE`.
        root: Folder that gets a folder of this name.
        data: Where data sets lie, for those made of one.

    Returns:
        Why there is no such product here, or nothing.
    """
    if (root / name).is_dir():
        return ""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as temporary:
        reason = MADE[name](name, Path(temporary), data)
        if not reason:
            (Path(temporary) / name).rename(root / name)
    return reason


def _generated(name: str, root: Path, data: Path) -> str:
    generated.write(root, name)
    return ""


def package(name: str) -> Path | None:
    """Folder of an installed package, if it is."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _link(folder: Path, paths: Sequence[Path]) -> None:
    folder.mkdir(parents=True)
    for path in paths:
        (folder / path.name).symlink_to(path.resolve())


def _split(name: str, root: Path, good: Sequence[Path], bad: Sequence[Path]) -> None:
    """Choose at random what is learnt from and what is judged."""
    random = np.random.default_rng(0)
    good, bad = ([paths[i] for i in random.permutation(len(paths))] for paths in (sorted(good), sorted(bad)))
    _link(root / name / "train" / "good", good[TEST : TEST + TRAIN])
    _link(root / name / "test" / "good", good[:TEST])
    _link(root / name / "test" / "bad", bad[:TEST])


def _solar_cells(name: str, root: Path, data: Path) -> str:
    """Cells of ``elpv-dataset`` that all experts called functional, and those that all called defective."""
    folder = package("elpv_dataset")
    if folder is None:
        return "elpv-dataset is not installed"
    _split(name, root, *solar_cells(folder / "data", name.removeprefix("solar_")))
    return ""


def solar_cells(folder: Path, kind: str) -> tuple[list[Path], list[Path]]:
    """Files of ``elpv-dataset``, from its data folder: cells of a kind, ``mono`` or ``poly``, certainly functional and certainly defective.

    Raises:
        DataError: The folder does not hold the data set.
    """
    try:
        lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{folder}: holds no solar cells (no labels.csv); reinstall elpv-dataset") from error
    cells = [(folder / path, float(defect)) for path, defect, of in map(str.split, filter(str.strip, lines)) if of == kind]
    good, bad = ([path for path, defect in cells if defect == wanted] for wanted in (0, 1))
    return good, bad


def _textile(name: str, root: Path, data: Path) -> str:
    """Simulated textiles of ``conformal-clip-data`` with local or global defects."""
    folder = package("conformal_clip_data")
    if folder is None:
        return "conformal-clip-data is not installed"
    _split(name, root, *(list_images(folder / _TEXTILE / kind) for kind in ("nominal", name.removeprefix("textile_"))))
    return ""


def _texture(name: str, root: Path, data: Path) -> str:
    """A class of DTD, and in half of the test images a disc of another class."""
    classes = sorted(path for path in (data / "dtd").glob("*") if path.is_dir())
    number = int(name.removeprefix("texture_")) - 1
    if len(classes) <= number + 1:
        return f"{data / 'dtd'}: no such folder of textures"
    paths, others = list_images(classes[number]), list_images(classes[number + 1])
    judged = max(2, len(paths) // 3)
    _link(root / name / "train" / "good", paths[2 * judged :] + paths[judged : judged + judged // 2])
    _link(root / name / "test" / "good", paths[:judged])
    for folder in ("test", "ground_truth"):
        (root / name / folder / "foreign").mkdir(parents=True)
    random = np.random.default_rng(number)
    for index, path in enumerate(paths[judged + judged // 2 : 2 * judged]):
        pixels = load_image(path)
        height, width = pixels.shape[:2]
        foreign = np.asarray(Image.fromarray(load_image(others[index % len(others)])).resize((width, height)))
        radius = random.uniform(0.08, 0.2) * min(height, width)
        y, x = (random.uniform(radius, side - radius) for side in (height, width))
        mask = np.hypot(np.arange(height)[:, None] - y, np.arange(width)[None, :] - x) < radius
        Image.fromarray(np.where(mask[..., None], foreign, pixels)).save(root / name / "test/foreign" / f"{path.stem}.png")
        Image.fromarray(mask).save(root / name / "ground_truth/foreign" / f"{path.stem}_mask.png")
    return ""


MADE: dict[str, Callable[[str, Path, Path], str]] = {
    **dict.fromkeys(generated.PRODUCTS, _generated),
    **dict.fromkeys(("solar_mono", "solar_poly"), _solar_cells),
    **dict.fromkeys(("textile_local", "textile_global"), _textile),
    **{f"texture_{number + 1}": _texture for number in range(TEXTURES)},
}
"""What can be made, and by what."""


def prepared(
    config: BenchmarkConfig, folder: Path, data: Path, categories: Sequence[str] | None = None
) -> tuple[BenchmarkConfig, list[str]]:
    """The benchmark with the products it wants made below a folder, or only some of them; and notes on those that cannot be.

    Raises:
        ConfigError: A name is not known.
    """
    datasets, notes = [], []
    for entry in config.dataset:
        if unknown := sorted(set(entry.made) - set(MADE)):
            raise ConfigError(f"{config.source}: no product {unknown[0]!r} can be made; there are {', '.join(MADE)}")
        wanted = [name for name in entry.made if not categories or name in categories or (folder / name).is_dir()]
        reasons = {name: make(name, folder, data) for name in wanted}
        notes += [f"{entry.name}: left out {name}, because {reason}" for name, reason in reasons.items() if reason]
        there = tuple(name for name, reason in reasons.items() if not reason)
        if there or not entry.made:
            datasets.append(replace(entry, path=str(folder.absolute()), categories=there) if entry.made else entry)
    return replace(config, dataset=tuple(datasets)), notes
