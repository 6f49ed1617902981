"""Which files to learn from and which to judge: folders, data-set categories and lists of paths.

A *category* is one product in the layout of MVTec AD::

    bottle/train/good/000.png
    bottle/test/good/000.png
    bottle/test/broken_large/000.png
    bottle/ground_truth/broken_large/000_mask.png

or plain folders, ``good/`` beside one folder per kind of defect. Names of folders and suffixes are read in any case.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from gladad.errors import DataError
from gladad.images import is_image, list_images
from gladad.types import Sample

Item = TypeVar("Item")

NORMAL_NAMES = frozenset({"good", "normal", "ok"})
"""Names of folders (lower case) whose images are normal."""

TEST_FOLDERS = frozenset({"test", "test_public"})
"""Names of folders (lower case) that hold the labelled test images."""

MASK_FOLDERS = frozenset({"ground_truth", "masks"})
"""Names of folders (lower case) that hold masks, never images to learn from or to judge."""

HELD_BACK = TEST_FOLDERS | {"validation", "test_private", "test_private_mixed"}
"""Names of folders (lower case) whose images are never learnt from."""

EXPECTED = "a folder of good images, or a category with train/good/"
EXPECTED_LABELS = "test/good/ and test/<defect>/, or good/ beside folders of defects"


def good_images(path: str | Path) -> list[Path]:
    """The images to learn from, sorted.

    The first of these that is there, and nothing else: ``train/good``; the images directly in ``train``; ``good``, so that folders of
    defects beside it are left out; every image below the folder, at any depth. Masks and anything below a ``test`` folder are never
    taken.

    Args:
        path: A folder of good images, or a category.

    Raises:
        DataError: There is no such folder, it holds several categories, it is a test split, or it has no images.
    """
    path = _folder(path, EXPECTED)
    if _is_held_back(path):
        raise DataError(f"{path}: test images are not for learning; give {EXPECTED}")
    _refuse_several_categories(path)
    train = folders_named(path, {"train"})
    if normal := [folder for parent in train or [path] for folder in folders_named(parent, NORMAL_NAMES)]:
        found = [image for folder in normal for image in list_images(folder)]
    elif train:
        found = [image for folder in train for image in sorted(folder.iterdir()) if is_image(image) and image.is_file()]
    else:
        found = _images_outside(path, MASK_FOLDERS | HELD_BACK)
    if not found:
        raise DataError(f"{path}: no images to learn from; expected {EXPECTED}")
    return found


def category_samples(path: str | Path, split: Literal["train", "validation", "test"] = "test") -> list[Sample]:
    """The labelled images of a category, sorted by kind and name.

    The label is the name of the folder: good, normal and ok are normal, any other is a kind of defect. A mask belongs to the image of
    its name: ``ground_truth/<kind>/<name>_mask.*`` or ``ground_truth/<kind>/<name>.*``, or the folder ``ground_truth/<kind>/<name>/``
    of one mask for each defect. An image without one has mask_path None.

    Args:
        path: The category: with ``test/<kind>/`` (or ``test_public/<kind>/``), or with ``good/`` and the kinds of defect beside it.
        split: ``test``; ``train`` for what `good_images` finds; ``validation`` for the good images of that folder, if it is there.

    Raises:
        DataError: There is no such folder, it holds several categories, or no labelled images.
    """
    path = _folder(path, "a category with test/<kind>/ folders")
    if path.name.lower() in TEST_FOLDERS:
        path = path.parent  # where the masks are
    category = path.absolute().name
    if split == "train":
        return [Sample(image, category=category, split="train") for image in good_images(path)]
    if split == "validation":
        good = [folder for parent in folders_named(path, {"validation"}) for folder in folders_named(parent, NORMAL_NAMES)]
        return [Sample(image, category=category, split="validation") for folder in good for image in list_images(folder)]
    _refuse_several_categories(path)
    roots = [path]
    if test := folders_named(path, TEST_FOLDERS):
        roots += test
        kinds = [folder for parent in test for folder in subfolders(parent) if folder.name.lower() not in MASK_FOLDERS]
    elif folders_named(path, NORMAL_NAMES):
        kinds = [folder for folder in subfolders(path) if folder.name.lower() not in MASK_FOLDERS | {"train", "validation"}]
    else:
        raise DataError(f"{path}: no labels; expected {EXPECTED_LABELS}")

    samples = []
    for folder in kinds:
        label = int(folder.name.lower() not in NORMAL_NAMES)
        masks = _masks_by_name(roots, folder.name) if label else {}
        for image in list_images(folder):
            key = _key(image.relative_to(folder))
            mask = masks.get(key + "_mask", masks.get(key))
            samples.append(Sample(image, mask, label, category, folder.name, "test"))
    if not samples:
        raise DataError(f"{path}: no labelled images; expected {EXPECTED_LABELS}")
    return samples


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """The images that files and folders stand for: folders at any depth, sorted within each, masks left out.

    A file is taken as it is given, whatever its suffix. What is named twice, or by a link as well, is listed once.

    Raises:
        DataError: A path does not exist, or a folder has no images.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, paths):
        images = [given]
        if given.is_dir():
            images = _images_outside(given, MASK_FOLDERS)
            if not images:
                raise DataError(f"{given}: no images in this folder")
        elif not given.exists():
            raise DataError(f"{given}: no such file or folder")
        for image in images:
            found.setdefault(image.resolve(), image)
    return list(found.values())


def fingerprint(paths: Sequence[str | Path]) -> str:
    """SHA-256 (hexadecimal) over names and contents of files, whatever their order and wherever their common folder is."""
    files = [Path(p).absolute() for p in paths]
    root = Path(os.path.commonpath([p.parent for p in files])) if files else Path()
    digest = hashlib.sha256()
    for name, file in sorted((os.fsencode(p.relative_to(root).as_posix()), p) for p in files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(name + b"\0" + content)
    return digest.hexdigest()


def split_held_out(items: Sequence[Item], share: float, minimum: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Set some items aside at random, the same ones for the same seed; both parts keep the order.

    Args:
        items: What to split.
        share: Part to set aside, in [0, 1].
        minimum: Set aside at least this many, but never more than half of the items.
        seed: Seed of the choice.

    Returns:
        ``(kept, held_out)``.
    """
    if not 0 <= share <= 1 or minimum < 0:
        raise ValueError(f"share must lie in [0, 1] and minimum must not be negative, not {share} and {minimum}")
    count = min(max(minimum, round(share * len(items))), len(items) // 2)
    chosen = set(np.random.default_rng(seed).permutation(len(items))[:count].tolist())
    kept = [item for index, item in enumerate(items) if index not in chosen]
    return kept, [items[index] for index in sorted(chosen)]


def _folder(path: str | Path, expected: str) -> Path:
    path = Path(path)
    if path.is_file():
        raise DataError(f"{path}: is a single file; expected {expected}")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected {expected}")
    return path


def subfolders(path: Path) -> list[Path]:
    """The visible folders directly inside, sorted."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def folders_named(path: Path, names: Set[str]) -> list[Path]:
    """The folders directly inside of these names, in any case."""
    return [p for p in subfolders(path) if p.name.lower() in names]


def _images_outside(path: Path, names: Set[str]) -> list[Path]:
    """All images below a folder but those below folders of these names."""
    return [p for p in list_images(path) if names.isdisjoint(part.lower() for part in p.relative_to(path).parts[:-1])]


def _is_category(path: Path) -> bool:
    names = {p.name.lower() for p in subfolders(path)}
    return bool(names & {"train", *TEST_FOLDERS}) or bool(names & NORMAL_NAMES and names - NORMAL_NAMES)


def _is_held_back(path: Path) -> bool:
    """Whether a folder is, or lies directly in, the test images or masks of a category: something beside a ``train`` folder."""
    folders = (path.resolve(), path.resolve().parent)
    return any(p.name.lower() in MASK_FOLDERS | HELD_BACK and bool(folders_named(p.parent, {"train"})) for p in folders)


def _refuse_several_categories(path: Path) -> None:
    if _is_category(path):
        return
    categories = [folder.name for folder in subfolders(path) if _is_category(folder)]
    if categories:
        raise DataError(f"{path}: holds the categories {', '.join(categories)}; give one of them, such as {path / categories[0]}, or choose it with --category")


def _key(path: Path) -> str:
    # Archives made on macOS hold decomposed accents, and the same name must match either way.
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def _masks_by_name(parents: Sequence[Path], kind: str) -> dict[str, Path]:
    folders = [
        folder for parent in parents for root in folders_named(parent, MASK_FOLDERS) for folder in folders_named(root, {kind.lower()})
    ]
    several = {_key(Path(inner.name + ".png")): inner for folder in folders for inner in subfolders(folder)}
    return several | {_key(p.relative_to(folder)): p for folder in folders for p in list_images(folder)}
