"""Data sets as they lie on disk: the layout is seen from the tree, and every image becomes one labelled record.

All layouts of good and bad folders (`gladad.data`) are read by one rule; VisA's own tree and manifests have readers of their own. What each
looks like is in ``docs/datasets.md``.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from gladad.data import HELD_BACK, MASK_FOLDERS, NORMAL_NAMES, TEST_FOLDERS, category_samples, folders_named, good_images, subfolders
from gladad.errors import DataError
from gladad.images import list_images, load_image, load_mask
from gladad.types import Progress, Sample, no_progress

FOLDER_LAYOUTS = ("mvtec_ad", "mvtec_loco", "mvtec_ad_2", "visa_1cls", "mpdd", "pcb_bank", "btad", "folders")
LAYOUTS = (*FOLDER_LAYOUTS, "visa", "manifest")
"""Names that `read_dataset` takes besides ``auto``."""

NORMAL_LABELS = NORMAL_NAMES | {"0"}
ANOMALOUS_LABELS = frozenset({"1", "anomalous", "anomaly", "bad", "defect", "ng", "ko"})
SPLITS = ("train", "validation", "test")
MANIFESTS = frozenset({".csv", ".jsonl"})


@dataclass(frozen=True)
class Dataset:
    """What `read_dataset` found.

    Attributes:
        root: Where it lies.
        layout: One of `LAYOUTS`.
        samples: Every labelled image of every category, sorted by category, split, kind and path.
        unlabelled: Number of images without a label that were left out, such as those of private test splits.
    """

    root: Path
    layout: str
    samples: tuple[Sample, ...]
    unlabelled: int = 0

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the products, sorted."""
        return tuple(sorted({sample.category for sample in self.samples}))

    def of(self, split: str) -> list[Sample]:
        """The samples of a split."""
        return [sample for sample in self.samples if sample.split == split]

    def training_images(self) -> list[Path]:
        """The normal images of the training split.

        Raises:
            DataError: There are none.
        """
        found = [sample.image_path for sample in self.of("train") if not sample.gt_label]
        if not found:
            raise DataError(f"{self.root}: no good images to learn from in this {self.layout} data set")
        return found

    def test_samples(self) -> list[Sample]:
        """The labelled samples of the test split.

        Raises:
            DataError: There are none.
        """
        found = self.of("test")
        if not found:
            raise DataError(f"{self.root}: no labelled test images in this {self.layout} data set")
        return found


def read_dataset(path: str | Path, layout: str = "auto", category: str | None = None) -> Dataset:
    """Read a data set where it lies.

    Args:
        path: A category, a folder of categories, or a manifest (CSV, JSON lines).
        layout: One of `LAYOUTS`; "auto" sees it from the tree.
        category: Only this one.

    Raises:
        DataError: There is no such thing, the layout does not fit, a manifest is wrong (file and line are named), or there is no such
            category (those that are there are listed).
    """
    path = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise DataError(f"layout must be auto or one of {', '.join(LAYOUTS)}, not {layout!r}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    layout = detect_layout(path) if layout == "auto" else layout
    unlabelled = 0
    if layout == "manifest":
        samples = list(_manifest(path))
    elif layout == "visa":
        samples = list(_visa(path))
    else:
        folders = category_folders(path)
        chosen = [folder for folder in folders if category in (None, folder.absolute().name)] or folders
        samples = [sample for folder in chosen for sample in _folder_samples(folder)]
        private = [p for folder in chosen for p in subfolders(folder) if p.name.lower().startswith("test_private")]
        unlabelled = sum(len(list_images(folder)) for folder in private)
    if category is not None:
        known = sorted({sample.category for sample in samples})
        samples = [sample for sample in samples if sample.category == category]
        if not samples:
            raise DataError(f"{path}: no category {category!r}; it has {', '.join(known)}")
    if not samples:
        raise DataError(f"{path}: no images of the layout {layout}")
    ordered = sorted(samples, key=lambda s: (s.category, SPLITS.index(s.split), s.defect_type, str(s.image_path)))
    return Dataset(path, layout, tuple(ordered), unlabelled)


def training_images(path: str | Path, layout: str = "auto", category: str | None = None) -> list[Path]:
    """The good images to learn from, of one product: a folder of them, a category, or a category of a data set.

    Raises:
        DataError: As `read_dataset` and `gladad.data.good_images`.
    """
    if layout == "auto" and category is None and Path(path).is_dir() and detect_layout(Path(path)) in FOLDER_LAYOUTS:
        return good_images(path)
    return one_category(path, layout, category).training_images()


def labelled_samples(path: str | Path, layout: str = "auto", category: str | None = None) -> list[Sample]:
    """The labelled images to judge a model of one product by.

    Raises:
        DataError: As `read_dataset` and `gladad.data.category_samples`.
    """
    if layout == "auto" and category is None and (not Path(path).exists() or detect_layout(Path(path)) in FOLDER_LAYOUTS):
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
    """Name the layout of a file or folder, without reading images."""
    if path.is_file():
        if path.suffix.lower() not in MANIFESTS:
            raise DataError(f"{path}: is a single file; give a folder, or a manifest (.csv or .jsonl)")
        return "manifest"
    if _visa_tables(path):
        return "visa"
    folders = category_folders(path)
    for folder in folders:
        tests = folders_named(folder, TEST_FOLDERS)
        if any(test.name.lower() == "test_public" for test in tests):
            return "mvtec_ad_2"
        if any(folders_named(test, {"logical_anomalies", "structural_anomalies"}) for test in tests):
            return "mvtec_loco"
        if any(folders_named(test, {"ko"}) for test in tests):
            return "btad"
    if any(folders_named(folder, {"train", *TEST_FOLDERS}) for folder in folders):
        return "mvtec_ad"
    return "folders"


def category_folders(path: Path) -> list[Path]:
    """The folder itself if it is a category, else those in it that are; the folder itself when there are none."""

    def is_category(folder: Path) -> bool:
        names = {inner.name.lower() for inner in subfolders(folder)}
        return bool(names & {"train", *TEST_FOLDERS}) or bool(names & NORMAL_NAMES)

    if is_category(path):
        return [path]
    return [folder for folder in subfolders(path) if is_category(folder)] or [path]


def _folder_samples(folder: Path) -> Iterator[Sample]:
    """Training, validation and test samples of one category in folders."""
    labelled = folders_named(folder, TEST_FOLDERS)
    if labelled or folders_named(folder, {"train"}):
        if folders_named(folder, {"train"}):
            yield from category_samples(folder, "train")
        yield from category_samples(folder, "validation")
        if labelled:
            yield from category_samples(folder, "test")
        return
    # Plain folders have no split: the good images are there to learn from, and all that is labelled can be judged.
    yield from (Sample(image, category=folder.absolute().name, split="train") for image in good_images(folder))
    reserved = NORMAL_NAMES | MASK_FOLDERS | HELD_BACK
    if folders_named(folder, NORMAL_NAMES) and any(inner.name.lower() not in reserved for inner in subfolders(folder)):
        yield from (sample for sample in category_samples(folder) if sample.gt_label)


# -- VisA -------------------------------------------------------------------------------------------------------


def _visa_tables(path: Path) -> list[Path]:
    return [table for folder in (path, path.parent) for table in [folder / "split_csv" / "1cls.csv"] if table.is_file()]


def _visa(path: Path) -> Iterator[Sample]:
    tables = _visa_tables(path)
    if not tables:
        raise DataError(f"{path}: no split_csv/1cls.csv; give the folder that holds it, with the products beside it")
    root = tables[0].parent.parent
    only = None if root == path else path.name
    for line, row in _csv_rows(tables[0], ("object", "split", "label", "image")):
        if only in (None, row["object"]):
            label = _label(row["label"], tables[0], line)
            mask = (row.get("mask") or "").strip()
            kind = "bad" if label else "good"
            yield Sample(
                root / row["image"], root / mask if mask else None, label, row["object"], kind, _split(row["split"], tables[0], line)
            )


# -- manifests --------------------------------------------------------------------------------------------------


def _manifest(path: Path) -> Iterator[Sample]:
    required = ("image", "label", "split")
    rows = _csv_rows(path, required) if path.suffix.lower() == ".csv" else _json_rows(path, required)
    for line, row in rows:
        label = _label(row["label"], path, line)
        image, mask = path.parent / str(row["image"]), str(row.get("mask") or "").strip()
        yield Sample(
            image_path=image,
            mask_path=path.parent / mask if mask else None,
            gt_label=label,
            category=str(row.get("category") or path.stem),
            defect_type=str(row.get("defect_type") or ("bad" if label else "good")),
            split=_split(row["split"], path, line),
        )


def _csv_rows(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in required if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}; needed are {', '.join(required)}")
        for row in reader:
            yield reader.line_num, row


def _json_rows(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}, line {line}: not JSON ({error})") from error
        missing = [name for name in required if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"{path}, line {line}: no key {', '.join(missing)}; needed are {', '.join(required)}")
        yield line, row


def _label(value: Any, path: Path, line: int) -> int:
    text = str(int(value) if isinstance(value, bool) else value).strip().lower()
    if text in NORMAL_LABELS:
        return 0
    if text in ANOMALOUS_LABELS:
        return 1
    raise DataError(f"{path}, line {line}: label {value!r} is unknown; write 0 or normal, 1 or anomalous")


def _split(value: Any, path: Path, line: int) -> str:
    text = str(value).strip().lower()
    if text not in SPLITS:
        raise DataError(f"{path}, line {line}: split {value!r} is unknown; write one of {', '.join(SPLITS)}")
    return text


# -- checks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something about the files of a data set that is worth knowing.

    Attributes:
        text: What it is.
        paths: The files.
        serious: Whether results would be wrong.
    """

    text: str
    paths: tuple[Path, ...]
    serious: bool


@dataclass(frozen=True)
class Inventory:
    """What `check_dataset` found.

    Attributes:
        counts: ``(category, split, kind)`` -> images.
        sizes: Category -> ``"WxH"`` -> images.
        findings: Serious ones first.
    """

    counts: dict[tuple[str, str, str], int]
    sizes: dict[str, Counter[str]]
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing serious was found."""
        return not any(finding.serious for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        counts = [{"category": c, "split": s, "defect_type": kind, "images": n} for (c, s, kind), n in sorted(self.counts.items())]
        findings = [{"text": f.text, "serious": f.serious, "files": [str(p) for p in f.paths]} for f in self.findings]
        return {"counts": counts, "sizes": {name: dict(sizes) for name, sizes in self.sizes.items()}, "findings": findings}


def check_dataset(dataset: Dataset, *, progress: Progress = no_progress) -> Inventory:
    """Read every file of a data set once and say what is in it and what is wrong with it.

    Args:
        dataset: What `read_dataset` returned.
        progress: Told of every image.
    """
    problems: dict[str, list[Path]] = defaultdict(list)
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    with_masks = {sample.category for sample in dataset.samples if sample.mask_path is not None}
    for done, sample in enumerate(dataset.samples, start=1):
        size = _check_image(sample, problems)
        if size is not None:
            sizes[sample.category][f"{size[0]}x{size[1]}"] += 1
            _check_mask(sample, size, sample.category in with_masks, problems)
        progress("reading files", done, len(dataset.samples))
    _check_copies(dataset.samples, problems)
    findings = [Finding(text, tuple(problems[text]), serious) for text, serious in FINDINGS.items() if problems[text]]
    counts = Counter((sample.category, sample.split, sample.defect_type) for sample in dataset.samples)
    return Inventory(dict(counts), dict(sizes), findings)


UNREADABLE = "images that cannot be read"
BAD_MASK = "masks that cannot be read"
NO_MASK = "anomalous test images without a mask, though others of their category have one"
OTHER_SIZE = "masks of another size than their image"
LEAKED = "test images that are byte for byte in the training images"
EMPTY_MASK = "anomalous images whose mask is empty"
COPIES = "images that are byte for byte another one of the same split"
FINDINGS = {UNREADABLE: True, BAD_MASK: True, LEAKED: True, NO_MASK: True, OTHER_SIZE: True, EMPTY_MASK: False, COPIES: False}
"""What `check_dataset` looks for -> whether it is serious, in the order of the report."""


def _check_image(sample: Sample, problems: dict[str, list[Path]]) -> tuple[int, int] | None:
    """``(width, height)`` of an image that can be read."""
    try:
        pixels = load_image(sample.image_path)
    except DataError:
        problems[UNREADABLE].append(sample.image_path)
        return None
    return pixels.shape[1], pixels.shape[0]


def _check_mask(sample: Sample, size: tuple[int, int], expected: bool, problems: dict[str, list[Path]]) -> None:
    if not sample.gt_label:
        return
    if sample.mask_path is None:
        if expected and sample.split == "test":
            problems[NO_MASK].append(sample.image_path)
        return
    try:
        if any(_size_of(file) != size for file in _mask_files(sample.mask_path)):
            problems[OTHER_SIZE].append(sample.mask_path)
        if not load_mask(sample.mask_path, (size[1], size[0])).any():
            problems[EMPTY_MASK].append(sample.mask_path)
    except (DataError, OSError):
        problems[BAD_MASK].append(sample.mask_path)


def _mask_files(path: Path) -> list[Path]:
    return list_images(path) if path.is_dir() else [path]


def _size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


def _check_copies(samples: Iterable[Sample], problems: dict[str, list[Path]]) -> None:
    by_size: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.image_path.is_file():
            by_size[sample.image_path.stat().st_size].append(sample)
    by_content: dict[bytes, list[Sample]] = defaultdict(list)
    for group in by_size.values():
        if len(group) > 1:
            for sample in group:
                with sample.image_path.open("rb") as file:
                    by_content[hashlib.file_digest(file, "sha256").digest()].append(sample)
    for same in by_content.values():
        seen: set[str] = set()
        for sample in sorted(same, key=lambda s: SPLITS.index(s.split)):
            if sample.split in seen:
                problems[COPIES].append(sample.image_path)
            elif sample.split == "test" and "train" in seen:
                problems[LEAKED].append(sample.image_path)
            seen.add(sample.split)
