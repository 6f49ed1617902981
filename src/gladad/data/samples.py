"""Which files to learn from and which to judge: folders, data-set categories and lists of paths.

A *category* is one product in the layout of MVTec AD (``train/good/000.png``, ``test/broken_large/000.png``,
``ground_truth/broken_large/000_mask.png``) or plain folders, ``good/`` beside one folder per kind of defect. Names of folders and suffixes
are read in any case. Folders whose name begins with a dot or an underscore are passed over. `gladad.data.layouts` reads whole data sets.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import DataError
from gladad.core.images import is_image, list_images
from gladad.core.records import Sample

# Names of folders, in lower case. What lies beside a folder of good images is anomalous, too, whatever its name.
NORMAL_NAMES = frozenset({"good", "normal", "ok"})
ANOMALOUS_NAMES = frozenset({"abnormal", "anomalous", "anomaly", "bad", "defect", "defective", "ko", "ng", "nok"})
TEST_FOLDERS = frozenset({"test", "test_public"})  # labelled test images
MASK_FOLDERS = frozenset({"ground_truth", "mask", "masks"})  # never images to learn from or to judge
PRIVATE = frozenset({"test_private", "test_private_mixed"})  # test images without labels
HELD_BACK = TEST_FOLDERS | PRIVATE | {"validation"}  # never learnt from

FEWEST_APART = 8
"""Fewer images than these say nothing of a spread: then a training is shown all, and what is usual is measured on all."""

EXPECTED = "a folder of good images, or a category with train/good/"
EXPECTED_LABELS = "test/good/ and test/<defect>/, or good/ beside folders of defects"


def good_images(path: str | Path) -> list[Path]:
    """The images to learn from, sorted.

    The first of these that is there, and nothing else: ``train/good``; the images directly in ``train``; ``good``, so that folders of
    defects beside it are left out; every image below the folder, at any depth. Masks and anything below a ``test`` folder are never
    taken.

    Raises:
        DataError: There is no such folder, it holds several categories, it is a test split, it has good and bad images further down, or
            no images.
    """
    path = _folder(path, EXPECTED)
    if _is_held_back(path):
        raise DataError(f"{path}: test images are not for learning; give {EXPECTED}")
    _refuse_several_categories(path)
    train = folders_named(path, {"train"})
    if normal := [folder for parent in train or [path] for folder in folders_named(parent, NORMAL_NAMES)]:
        found = [image for folder in normal for image in images_and_masks(folder)[0]]
    elif train:
        found = [image for folder in train for image in images_directly_in(folder)]
    else:
        found = images_outside(path, MASK_FOLDERS | HELD_BACK)
        _refuse_bad_ones(path, found)
    if not found:
        raise DataError(f"{path}: no images to learn from; expected {EXPECTED}")
    return found


def category_samples(path: str | Path) -> list[Sample]:
    """The labelled test images of a category, sorted by kind and name.

    Those of ``test/<kind>/`` (or ``test_public/<kind>/``), else of ``good/`` and the kinds of defect beside it, with labels and masks as
    `labelled_images` says.

    Raises:
        DataError: There is no such folder, it holds several categories, or no labelled images.
    """
    path = _folder(path, "a category with test/<kind>/ folders")
    if path.name.lower() in TEST_FOLDERS:
        path = path.parent  # where the masks are
    _refuse_several_categories(path)
    tests = folders_named(path, TEST_FOLDERS)
    if not tests and not _has_normal(path):
        raise DataError(f"{path}: no labels; expected {EXPECTED_LABELS}")
    kinds = [kind for parent in tests or [path] for kind in kind_folders(parent)]
    samples = labelled_images(kinds, [path, *tests], product_name(path), "test")
    if not samples:
        raise DataError(f"{path}: no labelled images; expected {EXPECTED_LABELS}")
    return samples


def labelled_images(kinds: Sequence[Path], mask_parents: Sequence[Path], category: str, split: str) -> list[Sample]:
    """The images of some folders, each labelled by its folder's name and paired with its mask by its own.

    The mask of ``<kind>/<name>.*`` is ``<name>_mask.*``, else ``<name>.*``, else the folder ``<name>/`` of one mask for each defect, in
    ``ground_truth/<kind>/`` or ``masks/<kind>/``. Then come masks directly in ``ground_truth/`` or ``masks/``, where no other kind of
    defect has an image of that name; then ``<name>_mask.*`` beside the image, which is never an image itself.

    Args:
        kinds: The folders; good, normal and ok are normal, any other name is a kind of defect.
        mask_parents: Folders that may hold a folder of masks.
        category: For the records.
        split: For the records.

    Returns:
        In the order of the folders, then by path. ``defect_type`` is the folder's name, "good" for normal images.
    """
    contents = {kind: images_and_masks(kind) for kind in kinds}
    roots = [root for parent in mask_parents for root in folders_named(parent, MASK_FOLDERS)]
    shared = {_key(Path(mask.name)): mask for root in roots for mask in images_directly_in(root)}
    defects = [kind for kind in kinds if kind.name.lower() not in NORMAL_NAMES]
    uses = Counter(_key(image.relative_to(kind)) for kind in defects for image in contents[kind][0])
    samples = []
    for kind, (images, beside) in contents.items():
        label = int(kind in defects)
        own = _masks_by_name(roots, kind.name)
        for image in images:
            key = _key(image.relative_to(kind))
            places = [own, shared, beside] if uses[key] == label else [own, beside]
            mask = next((place[name] for place in places for name in (key + "_mask", key) if name in place), None)
            samples.append(Sample(image, mask, label, category, kind.name if label else "good", split))
    return samples


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """The images that files and folders stand for: folders at any depth, sorted within each, masks left out.

    A file is taken as it is given, whatever its suffix. What is named twice, or by a link as well, is listed once.

    Raises:
        DataError: A path does not exist, or a folder has no images.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise DataError(f"{given}: no such file or folder")
        images = images_outside(given, MASK_FOLDERS) if given.is_dir() else [given]
        if not images:
            raise DataError(f"{given}: no images in this folder")
        for image in images:
            found.setdefault(image.resolve(), image)
    return list(found.values())


def fingerprint(paths: Sequence[str | Path]) -> str:
    """SHA-256 (hexadecimal) over names and contents of files, whatever their order and wherever their common folder is."""
    files = [Path(p).absolute() for p in paths]
    root = Path(os.path.commonpath([p.parent for p in files])) if files else Path()
    digest = hashlib.sha256()
    for name, file in sorted((os.fsencode(p.relative_to(root).as_posix()), p) for p in files):
        digest.update(name + b"\0" + bytes.fromhex(file_digest(file)))
    return digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 (hexadecimal) of the content of a file, which is read piece by piece, and again only if its size or time has changed.

    Raises:
        DataError: It cannot be read.
    """
    try:
        about = Path(path).stat()
        return _digest(Path(path).absolute(), about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def split_held_out(paths: Sequence[Path], share: float, minimum: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Set some files aside at random, the same ones for the same seed; both parts keep the order.

    Files of the same bytes count as one and stay together, so nothing that is set aside is also kept under another name.

    Args:
        paths: What to split.
        share: Part to set aside, in [0, 1].
        minimum: Set aside at least this many, but never more than half.
        seed: Of the choice.

    Returns:
        ``(kept, held_out)``.

    Raises:
        DataError: A file cannot be read, or so many are copies that fewer than the minimum can be set aside.
    """
    if not 0 <= share <= 1 or minimum < 0:
        raise ValueError(f"share must lie in [0, 1] and minimum must not be negative, not {share} and {minimum}")
    digests = [file_digest(path) for path in paths]
    distinct = list(dict.fromkeys(digests))
    count = min(max(minimum, round(share * len(distinct))), len(distinct) // 2)
    if count < min(minimum, len(paths) // 2):
        copies = f"of {len(paths)} images only {len(distinct)} differ, the others are copies of the same bytes"
        needed = f"at least {2 * minimum} different ones are needed to hold {minimum} out; add some"
        raise DataError(f"{paths[0].parent}: {copies}; {needed}")
    chosen = {distinct[index] for index in np.random.default_rng(seed).permutation(len(distinct))[:count]}
    parts: tuple[list[Path], list[Path]] = ([], [])
    for path, digest in zip(paths, digests, strict=True):
        parts[digest in chosen].append(path)
    return parts


def _folder(path: str | Path, expected: str) -> Path:
    path = Path(path)
    if path.is_file():
        raise DataError(f"{path}: is a single file; expected {expected}")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected {expected}")
    return path


def subfolders(path: Path) -> list[Path]:
    """The folders directly inside, sorted, but hidden ones, those put aside with an underscore, and links that lead back up."""
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if not entry.is_file(follow_symlinks=False)]
    found = sorted(path / name for name in names if not name.startswith((".", "_")) and (path / name).is_dir())
    here = path.resolve()
    return [folder for folder in found if not folder.is_symlink() or folder.resolve() not in (here, *here.parents)]


def kind_folders(path: Path) -> list[Path]:
    """The folders directly inside that stand for a label: no splits and no masks."""
    return [p for p in subfolders(path) if p.name.lower() not in MASK_FOLDERS | HELD_BACK | {"train"}]


def folders_named(path: Path, names: Set[str]) -> list[Path]:
    """The folders directly inside of these names, in any case."""
    return [p for p in subfolders(path) if p.name.lower() in names]


def images_directly_in(path: Path) -> list[Path]:
    """The images of a folder but not of the folders in it, sorted."""
    return sorted(p for p in path.iterdir() if is_image(p) and p.is_file())


def images_and_masks(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The images below a folder, and the files ``<name>_mask.*`` beside an image ``<name>.*`` by their name without suffix."""
    keys = {image: _key(image.relative_to(folder)) for image in list_images(folder)}
    names = set(keys.values())
    masks = {key: image for image, key in keys.items() if key.endswith("_mask") and key.removesuffix("_mask") in names}
    return [image for image, key in keys.items() if key not in masks], masks


def absolute(path: Path) -> Path:
    """The whole path, without following links: what is named counts."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def product_name(path: Path) -> str:
    """The name of the product that a folder is of: its own, or where that is a split's or a label's, the one above."""
    path = absolute(path)
    names = (folder.name for folder in (path, *path.parents))
    return next(name for name in names if name.lower() not in NORMAL_NAMES | HELD_BACK | {"train"}) or path.name


def visa_images(path: Path) -> list[Path]:
    """``Data/Images`` of a category in VisA's own tree: one folder, or none."""
    return [images for data in folders_named(path, {"data"}) for images in folders_named(data, {"images"}) if _has_normal(images)]


def category_folders(path: Path) -> list[Path]:
    """The folder itself if it is a category, else those in it that are, else those one deeper; the folder itself when there are none."""
    if is_category(path):
        return [path]
    inner = subfolders(path)
    found = [folder for folder in inner if is_category(folder)]
    return found or [folder for parent in inner for folder in subfolders(parent) if is_category(folder)] or [path]


def is_category(path: Path) -> bool:
    """Whether a folder has a ``train``, ``test`` or ``good`` folder in it, or is a category of VisA."""
    return bool(folders_named(path, {"train", *TEST_FOLDERS})) or _has_normal(path) or bool(visa_images(path))


def _has_normal(path: Path) -> bool:
    return bool(folders_named(path, NORMAL_NAMES))


def images_outside(path: Path, names: Set[str]) -> list[Path]:
    """All images below a folder but those below folders of these names."""
    return [p for p in list_images(path) if names.isdisjoint(part.lower() for part in p.relative_to(path).parts[:-1])]


def _is_held_back(path: Path) -> bool:
    """Whether a folder is, or lies directly in, the test images or masks of a category: something beside a ``train`` folder."""
    folders = (path.resolve(), path.resolve().parent)
    return any(p.name.lower() in MASK_FOLDERS | HELD_BACK and bool(folders_named(p.parent, {"train"})) for p in folders)


def _refuse_several_categories(path: Path) -> None:
    found = category_folders(path)
    if found != [path]:
        names = ", ".join(folder.name for folder in found)
        raise DataError(f"{path}: holds the categories {names}; give one of them, such as {found[0]}, or choose it with --category")


def _refuse_bad_ones(path: Path, images: Sequence[Path]) -> None:
    """Refuse a folder where good images are told from others further down: all of them would be learnt from."""
    above = {image: {part.lower() for part in image.relative_to(path).parts[:-1]} for image in images}
    good = [image for image in images if above[image] & NORMAL_NAMES]
    if any(names & ANOMALOUS_NAMES for names in above.values()) or 0 < len(good) < len(images):
        example = f", such as {good[0].parent}" if good else ""
        raise DataError(f"{path}: holds good images and others; give the folder of the good ones{example}")


def _key(path: Path) -> str:
    # Archives made on macOS hold decomposed accents, and the same name must match either way.
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def _masks_by_name(roots: Sequence[Path], kind: str) -> dict[str, Path]:
    folders = [folder for root in roots for folder in folders_named(root, {kind.lower()})]
    several = {_key(Path(inner.name + ".png")): inner for folder in folders for inner in subfolders(folder)}
    return several | {_key(p.relative_to(folder)): p for folder in folders for p in list_images(folder)}


def evenly(total: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` numbers from 0 to below ``total``, evenly spread and rising."""
    return np.linspace(0, total - 1, min(most, total)).round().astype(np.int64)


def apart_of(count: int, share: float) -> NDArray[np.bool_]:
    """``[count]``: which of so many good images a training is not shown, evenly spread: a third at most, none if there are few."""
    apart = np.zeros(count, dtype=np.bool_)
    wanted = max(FEWEST_APART, min(round(share * count), count // 3)) if share else 0
    if count >= 3 * wanted:
        apart[evenly(count, wanted)] = True
    return apart
