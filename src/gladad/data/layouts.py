"""Data sets as they lie on disk: the layout is seen from the tree, and every image becomes one labelled record.

All layouts of good and bad folders (`gladad.data.samples`) are read by one rule; VisA's own tree has a reader of its own, and manifests are
`gladad.data.manifests`. What each looks like is in ``docs/datasets.md``; `gladad.data.checks` looks into the files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gladad.core.errors import DataError
from gladad.core.images import is_image, list_images
from gladad.core.records import Sample
from gladad.data.manifests import SUFFIXES, is_visa_table, read_manifest
from gladad.data.samples import (
    MASK_FOLDERS,
    NORMAL_NAMES,
    PRIVATE,
    TEST_FOLDERS,
    absolute,
    category_folders,
    category_samples,
    folders_named,
    good_images,
    images_directly_in,
    is_category,
    kind_folders,
    labelled_images,
    product_name,
    subfolders,
    visa_images,
)

FOLDER_LAYOUTS = ("mvtec_ad", "mvtec_loco", "mvtec_ad_2", "visa_1cls", "mpdd", "pcb_bank", "btad", "folders")
LAYOUTS = (*FOLDER_LAYOUTS, "visa", "manifest")  # what `read_dataset` takes besides "auto"
SPLITS = ("train", "validation", "test")
HELD_OUT_EVERY = 10  # without VisA's table, one normal image in so many is for testing: the share that its 1cls.csv takes


@dataclass
class Dataset:
    """What `read_dataset` found."""

    root: Path  # where it lies
    layout: str  # one of `LAYOUTS`
    samples: list[Sample] = field(default_factory=list)  # every labelled image, sorted by category, split, kind and path; not yet opened
    unlabelled: int = 0  # images without a label that were left out, such as those of private test splits
    orphans: dict[str, list[Path]] = field(default_factory=dict)  # category -> masks that belong to none of its images
    notes: list[str] = field(default_factory=list)  # what was left out or assumed, a sentence each
    known: list[str] = field(default_factory=list)  # categories whose folders are there, also those that were not asked for
    part: str | None = None  # the only split that was read, if its folder was given instead of the category's

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the products, sorted."""
        return tuple(sorted({sample.category for sample in self.samples}))

    def of(self, split: str) -> list[Sample]:
        """The samples of a split: train, validation or test."""
        return [sample for sample in self.samples if sample.split == split]

    def training_images(self) -> list[Path]:
        """The normal images of the training split; anomalous ones in it are never learnt from.

        Raises:
            DataError: There are none.
        """
        found = [sample.image_path for sample in self.of("train") if not sample.gt_label]
        if not found:
            hint = "; rows without a split count as test" if self.layout == "manifest" else ""
            raise DataError(f"{self.root}: no good images to learn from in this {self.layout} data set{hint}")
        return found

    def test_samples(self) -> list[Sample]:
        """The labelled samples of the test split. Plain folders have no splits: all of a category with defects are judged.

        Raises:
            DataError: There are none.
        """
        found = self.of("test")
        if self.layout == "folders":
            judged = {sample.category for sample in found} - {sample.category for sample in found if not sample.gt_label}
            found = [replace(s, split="test") for s in self.samples if s.split == "test" or s.category in judged]
        if not found:
            raise DataError(f"{self.root}: no labelled test images in this {self.layout} data set")
        return found


def read_dataset(path: str | Path, layout: str = "auto", category: str | None = None) -> Dataset:
    """Read a data set where it lies.

    Args:
        path: A category, its ``train`` or ``test`` folder, a folder of categories (up to two deep), a manifest, or a table of VisA's.
        layout: One of `LAYOUTS`; "auto" sees it from the tree.
        category: Only this one.

    Raises:
        DataError: There is no such thing, the layout does not fit, a manifest is wrong (file and line are named), there is no such
            category (those that are there are listed), or nothing is labelled.
    """
    path = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise DataError(f"layout must be auto or one of {', '.join(LAYOUTS)}, not {layout!r}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    try:
        found = Dataset(path, detect_layout(path) if layout == "auto" else layout)
        _refuse_misfit(path, found.layout)
        if found.layout == "manifest":
            found.samples, found.unlabelled = read_manifest(path, path.parent)
        elif found.layout == "visa":
            _read_visa(found)
        else:
            _read_folders(found, category)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    known = sorted({*found.known, *(sample.category for sample in found.samples)})
    if category is not None and category not in known:
        raise DataError(f"{path}: no category {category!r}; it has {', '.join(known)}")
    found.samples = [sample for sample in found.samples if category in (None, sample.category)]
    if not found.samples:
        raise DataError(f"{path}: no labelled images of the layout {found.layout}; see docs/datasets.md for how it looks")
    found.samples.sort(key=lambda s: (s.category, SPLITS.index(s.split), s.defect_type, str(s.image_path)))
    found.orphans = {name: masks for name, masks in found.orphans.items() if masks and category in (None, name)}
    return found


def training_images(path: str | Path, layout: str = "auto", category: str | None = None) -> list[Path]:
    """The good images to learn from, of one product: a folder of them, a category, or a category of a data set.

    Raises:
        DataError: As `read_dataset` and `gladad.data.samples.good_images`.
    """
    if _is_one_product(Path(path), layout, category):
        return good_images(path)
    return one_category(path, layout, category).training_images()


def labelled_samples(path: str | Path, layout: str = "auto", category: str | None = None) -> list[Sample]:
    """The labelled images to judge a model of one product by.

    Raises:
        DataError: As `read_dataset` and `gladad.data.samples.category_samples`.
    """
    if _is_one_product(Path(path), layout, category):
        return category_samples(path)
    return one_category(path, layout, category).test_samples()


def one_category(path: str | Path, layout: str = "auto", category: str | None = None) -> Dataset:
    """`read_dataset` for one product.

    Raises:
        DataError: As there, or there are several categories and none was chosen.
    """
    dataset = read_dataset(path, layout, category)
    if len(dataset.categories) > 1:
        raise DataError(f"{path}: holds the categories {', '.join(dataset.categories)}; choose one with --category")
    return dataset


def detect_layout(path: Path) -> str:
    """Name the layout of a file or folder, without reading images; MVTec AD stands for MPDD, PCB-Bank and ``VisA_pytorch/1cls`` too.

    Raises:
        DataError: It is a single file, but no manifest.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: is a single file; give a folder, or a manifest (.csv or .jsonl)")
        return "visa" if is_visa_table(path) else "manifest"
    folders = category_folders(path)
    if any(visa_images(folder) for folder in folders):
        return "visa"
    if not any(is_category(folder) for folder in folders) and (_own_name(path) == "split_csv" or folders_named(path, {"split_csv"})):
        return "visa"
    for folder in folders:
        tests = folders_named(folder, TEST_FOLDERS)
        if any(test.name.lower() == "test_public" for test in tests):
            return "mvtec_ad_2"
        kinds = {kind.name.lower() for test in tests for kind in subfolders(test)}
        if kinds & {"logical_anomalies", "structural_anomalies"}:
            return "mvtec_loco"
        if "ko" in kinds:
            return "btad"
    return "mvtec_ad" if any(_has_splits(folder) for folder in (*folders, _above_split(path))) else "folders"


def _is_one_product(path: Path, layout: str, category: str | None) -> bool:
    """Whether `good_images` and `category_samples` know all there is to know, errors included."""
    if layout != "auto" or category is not None:
        return False
    return not path.exists() or (path.is_dir() and detect_layout(path) in FOLDER_LAYOUTS and category_folders(path) == [path])


def _refuse_misfit(path: Path, layout: str) -> None:
    if layout == "manifest" and (path.is_dir() or path.suffix.lower() not in SUFFIXES):
        raise DataError(f"{path}: is not a manifest; give a .csv or .jsonl file")
    if layout in FOLDER_LAYOUTS and not path.is_dir():
        raise DataError(f"{path}: is a single file; the layout {layout} is a folder")
    if layout == "visa" and path.is_file() and not is_visa_table(path):
        raise DataError(f"{path}: is not one of VisA's tables (object,split,label,image,mask); give one of them, or their folder")
    if layout in FOLDER_LAYOUTS[:-1] and not any(_has_splits(folder) for folder in (*category_folders(path), _above_split(path))):
        raise DataError(f"{path}: no train or test folder, so the layout is not {layout}; try --layout folders")


def _has_splits(folder: Path) -> bool:
    return bool(folders_named(folder, {"train", *TEST_FOLDERS}))


def _above_split(path: Path) -> Path:
    """The category of a folder that is one of its splits; any other folder itself."""
    return absolute(path).parent if _own_name(path) in {"train", "validation", *TEST_FOLDERS} else path


def _own_name(path: Path) -> str:
    return absolute(path).name.lower()


def _read_folders(found: Dataset, category: str | None) -> None:
    path = found.root
    folders = category_folders(path)
    if folders == [path] and not _has_splits(path) and (above := _above_split(path)) != path:
        found.part = "test" if _own_name(path) in TEST_FOLDERS else _own_name(path)
        _add_category(found, above, product_name(above))
        found.samples = [sample for sample in found.samples if sample.split == found.part]
        return
    found.known = [product_name(folder) for folder in folders]
    if len(set(found.known)) < len(folders):
        found.known = [folder.relative_to(path).as_posix() for folder in folders]
    for folder, name in zip(folders, found.known, strict=True):
        if category in (None, name):
            _add_category(found, folder, name)
    if folders != [path]:
        taken = {*folders, *(folder.parent for folder in folders)}
        if others := [folder.name for folder in subfolders(path) if folder not in taken and _has_image(folder)]:
            found.notes.append(f"left out, because there is no train/, test/ or good/ in it: {', '.join(others)}")


def _add_category(found: Dataset, folder: Path, name: str) -> None:
    """Training, validation and test samples of one category in folders."""
    trains, tests = folders_named(folder, {"train"}), folders_named(folder, TEST_FOLDERS)
    samples: list[Sample] = []
    for split in ("train", "validation"):
        for parent in folders_named(folder, {split}):
            samples += labelled_images(kind_folders(parent), [], name, split)
    if not any(folders_named(parent, NORMAL_NAMES) for parent in trains):
        samples += [Sample(image, category=name, split="train") for parent in trains for image in images_directly_in(parent)]
    if trains or tests:
        kinds = [kind for parent in tests for kind in kind_folders(parent)]
        samples += labelled_images(kinds, [folder, *tests], name, "test")
        found.unlabelled += sum(len(images_directly_in(parent)) for parent in tests)
    elif visa := visa_images(folder):
        samples += _without_split([kind for images in visa for kind in kind_folders(images)], [images.parent for images in visa], name)
    elif folders_named(folder, NORMAL_NAMES):
        samples += _without_split(kind_folders(folder), [folder], name)
    else:
        samples += [Sample(image, category=name, split="train") for image in good_images(folder)]
    found.samples += samples
    found.unlabelled += sum(len(list_images(private)) for private in folders_named(folder, PRIVATE))
    found.orphans[name] = _unused_masks([folder, *tests, *(images.parent for images in visa_images(folder))], samples)


def _without_split(kinds: Sequence[Path], mask_parents: Sequence[Path], category: str) -> list[Sample]:
    """Plain folders have no splits: the good images are there to learn from, the others to be judged."""
    samples = labelled_images(kinds, mask_parents, category, "test")
    return [sample if sample.gt_label else replace(sample, split="train") for sample in samples]


def _unused_masks(parents: Sequence[Path], samples: Iterable[Sample]) -> list[Path]:
    """What lies in the folders of masks directly inside some folders, but belongs to no sample."""
    masks = [mask for parent in parents for root in folders_named(parent, MASK_FOLDERS) for mask in list_images(root)]
    used = {sample.mask_path for sample in samples}
    return [mask for mask in masks if used.isdisjoint((mask, *mask.parents))]


def _has_image(folder: Path) -> bool:
    return any(is_image(Path(name)) for _, _, files in os.walk(folder) for name in files)


def _read_visa(found: Dataset) -> None:
    table, root, only = _visa_table(found.root)
    if table is None:
        _read_visa_without_table(found)
        return
    samples, found.unlabelled = read_manifest(table, root)
    named = {sample.category for sample in samples if only in (None, sample.category)}
    if not named:
        raise DataError(f"{table}: has no rows of {only}; give {root}, or read the folder alone with --layout folders")
    absent = {name for name in named if not (root / name).is_dir()}
    if absent == named:
        raise DataError(f"{table}: none of the categories that it names is in {root}; put them beside its folder")
    if absent:
        found.notes.append(f"left out, because the table names them but they are not there: {', '.join(sorted(absent))}")
    found.samples = [sample for sample in samples if sample.category in named - absent]
    for name in named - absent:
        found.orphans[name] = _unused_masks([root / name, *folders_named(root / name, {"data"})], found.samples)


def _visa_table(path: Path) -> tuple[Path | None, Path, str | None]:
    """VisA's split table, the folder that its paths are relative to, and the only category that was asked for."""
    whole = absolute(path)  # a link to a category may have the table beside it
    if whole.name.lower() == "split_csv":
        path, whole = path.parent, whole.parent
    if path.is_file():
        return path, whole.parent.parent if whole.parent.name.lower() == "split_csv" else whole.parent, None
    places: list[tuple[Path, str | None]] = [(path, None)]
    if visa_images(path):
        places += [(whole.parent, whole.name), (path.resolve().parent, path.resolve().name)]
    for root, only in places:
        for folder in folders_named(root, {"split_csv"}):
            tables = sorted(file for file in folder.iterdir() if is_visa_table(file))
            first = [table for table in tables if table.name.lower() == "1cls.csv"] or tables
            if len(first) > 1:
                names = ", ".join(table.name for table in tables)
                raise DataError(f"{folder}: has no 1cls.csv but {names}; give one of these instead of the folder")
            if first:
                return first[0], root, only
    return None, path, None


def _read_visa_without_table(found: Dataset) -> None:
    path = found.root
    for folder in category_folders(path):
        if visa_images(folder):
            if (table := _visa_table(folder)[0]) is not None:
                raise DataError(f"{path}: holds VisA and more; give {table.parent.parent} for the data set of {table.name}")
            _add_category(found, folder, product_name(folder))
    if not found.samples:
        raise DataError(f"{path}: no split_csv/1cls.csv and no <category>/Data/Images/Normal; give the folder that holds them")
    normal: Counter[str] = Counter()
    for index, sample in enumerate(found.samples):
        if not sample.gt_label:
            normal[sample.category] += 1
            if normal[sample.category] % HELD_OUT_EVERY == 0:
                found.samples[index] = replace(sample, split="test")
    share = f"every {HELD_OUT_EVERY}th normal image is taken for testing"
    found.notes.append(f"no split_csv/1cls.csv: {share}, which is not the published split")
