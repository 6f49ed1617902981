"""What is in the files of a data set, and what is wrong with them: every image and mask is read once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gladad.core.errors import DataError
from gladad.core.images import load_image, load_mask
from gladad.core.records import Progress, Sample, no_progress
from gladad.core.storage import printable
from gladad.core.threads import in_order
from gladad.data.layouts import FOLDER_LAYOUTS, SPLITS, Dataset

MAX_WORKERS = 8

Problems = dict[str, list[tuple[Path, str]]]  # what is wrong -> the files, and what is to be said of each of them

UNREADABLE = "images that cannot be read"
BAD_MASK = "masks that cannot be read"
CONTRADICTION = "images that are labelled normal and, pixel for pixel the same, anomalous"
LEAKED = "images that are, pixel for pixel, in two splits"
IN_TRAINING = "anomalous images in the training split, never learnt from; move them, or rename their folder to good"
NO_MASK = "anomalous test images without a mask, though there are masks for their category"
UNPAIRED = "masks that belong to no image, though their category has anomalous images without a mask: compare the names"
OTHER_SIZE = "masks of another size than their image"
NORMAL_MASK = "masks of normal images that are not empty"
SUPERVISED = "anomalous images in the training split, as the table says; never learnt from"
EMPTY_MASK = "anomalous images whose mask is empty"
ORPHANS = "masks that belong to no image"
SHARED = "masks that belong to several images"
COPIES = "images that are, pixel for pixel, another one of the same split"
SERIOUS = (UNREADABLE, BAD_MASK, CONTRADICTION, LEAKED, IN_TRAINING, NO_MASK, UNPAIRED, OTHER_SIZE, NORMAL_MASK)
# What `check_dataset` looks for in files -> whether it is serious, in the order of the report.
FINDINGS = dict.fromkeys(SERIOUS, True) | dict.fromkeys((SUPERVISED, EMPTY_MASK, ORPHANS, SHARED, COPIES), False)


@dataclass(frozen=True)
class Finding:
    """Something about a data set that is worth knowing."""

    text: str  # what it is
    serious: bool  # whether results would be wrong or missing
    paths: tuple[Path, ...] = ()  # the files, if it is about files
    remarks: tuple[str, ...] = ()  # what is to be said of each of them, or ""


@dataclass(frozen=True)
class Inventory:
    """What `check_dataset` found."""

    counts: dict[tuple[str, str, str], int]  # (category, split, kind) -> images
    masks: dict[tuple[str, str, str], int]  # the same -> images with a mask
    sizes: dict[str, Counter[tuple[int, int]]]  # category -> (width, height) in pixels -> images
    findings: list[Finding] = field(default_factory=list)  # serious ones first

    @property
    def sound(self) -> bool:
        """Nothing serious was found."""
        return not any(finding.serious for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        counts = [
            {"category": printable(c), "split": s, "defect_type": printable(kind), "images": n, "masks": self.masks[c, s, kind]}
            for (c, s, kind), n in sorted(self.counts.items())
        ]
        findings = [
            {"text": printable(f.text), "serious": f.serious, "files": [*map(printable, f.paths)], "remarks": [*map(printable, f.remarks)]}
            for f in self.findings
        ]
        sizes = {printable(name): {f"{w}x{h}": n for (w, h), n in sizes.most_common()} for name, sizes in self.sizes.items()}
        return {"sound": self.sound, "counts": counts, "sizes": sizes, "findings": findings}


def check_dataset(dataset: Dataset, *, workers: int | None = None, progress: Progress = no_progress) -> Inventory:
    """Read every image and mask of a data set once and say what is in it and what is wrong with it.

    Images are compared by their pixels: a copy in another format or with other metadata is found too. Only hashes are kept. ``workers``
    is the number of threads; None takes as many as there are cores, at most 8.
    """
    problems: Problems = {text: [] for text in FINDINGS}
    sizes: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    by_content: dict[bytes, list[Sample]] = defaultdict(list)
    looks = in_order(partial(_look, dataset), dataset.samples, workers or min(os.cpu_count() or 1, MAX_WORKERS))
    for done, (sample, (size, content, seen)) in enumerate(zip(dataset.samples, looks, strict=True), start=1):
        for text, path, remark in seen:
            problems[text].append((path, f"{remark}, line {sample.line}" if sample.line else remark))
        if size is not None:
            sizes[sample.category][size] += 1
            by_content[content].append(sample)
        progress("reading files", done, len(dataset.samples))
    _check_copies(dataset, by_content.values(), problems)
    _check_labels_and_masks(dataset, problems)
    counts = Counter((sample.category, sample.split, sample.defect_type) for sample in dataset.samples)
    masks = Counter((s.category, s.split, s.defect_type) for s in dataset.samples if s.mask_path is not None)
    findings = [Finding(text, FINDINGS[text], *zip(*files, strict=True)) for text, files in problems.items() if files]
    findings = sorted((*findings, *_check_splits(dataset)), key=lambda finding: not finding.serious)
    return Inventory(dict(counts), {key: masks[key] for key in counts}, dict(sizes), findings)


def short_name(path: Path, dataset: Dataset) -> str:
    """The path of a file inside a data set from there, as text that can be written; any other path whole."""
    root = dataset.root.parent if dataset.root.is_file() else dataset.root
    return printable(path.relative_to(root) if path.is_relative_to(root) else path)


def describe_sizes(sizes: Counter[tuple[int, int]]) -> str:
    """The sizes of images in one line: each with its number while there are few, else the smallest and the largest sides."""
    if len(sizes) <= 3:
        return ", ".join(f"{w}x{h} ({count})" if len(sizes) > 1 else f"{w}x{h}" for (w, h), count in sizes.most_common())
    widths, heights = [w for w, _ in sizes], [h for _, h in sizes]
    return f"{len(sizes)} sizes, {min(widths)} to {max(widths)} wide and {min(heights)} to {max(heights)} high"


def _look(dataset: Dataset, sample: Sample) -> tuple[tuple[int, int] | None, bytes, list[tuple[str, Path, str]]]:
    """What is seen of one sample: ``(width, height)``, a hash of the pixels, and problems as ``(text, path, remark)``."""
    path, mask_path = sample.image_path, sample.mask_path
    try:
        pixels = load_image(path)
    except DataError as error:
        return None, b"", [(UNREADABLE, path, str(error).removeprefix(f"{path}: "))]
    height, width = pixels.shape[:2]
    size, content = (width, height), hashlib.blake2b(pixels.data, digest_size=16, salt=f"{width}x{height}".encode()[:16]).digest()
    if mask_path is None:
        return size, content, []
    try:
        mask = load_mask(mask_path)
    except (DataError, OSError) as error:
        return size, content, [(BAD_MASK, mask_path, str(error).removeprefix(f"{mask_path}: "))]
    seen = []
    if mask.shape != (height, width):
        seen.append((OTHER_SIZE, mask_path, f"{mask.shape[1]}x{mask.shape[0]}, the image {width}x{height}"))
    if mask.any() != bool(sample.gt_label):
        seen.append((EMPTY_MASK if sample.gt_label else NORMAL_MASK, mask_path, f"of {short_name(path, dataset)}"))
    return size, content, seen


def _check_copies(dataset: Dataset, groups: Iterable[list[Sample]], problems: Problems) -> None:
    for group in groups:
        first, *others = sorted(group, key=lambda sample: SPLITS.index(sample.split))
        splits = {first.split}
        for sample in others:
            same = short_name(first.image_path, dataset)
            if sample.gt_label != first.gt_label:
                problems[CONTRADICTION].append((sample.image_path, f"the same as {same}"))
            if splits - {sample.split}:
                problems[LEAKED].append((sample.image_path, f"in {sample.split}; in {first.split} as {same}"))
            elif sample.gt_label == first.gt_label:
                problems[COPIES].append((sample.image_path, f"the same as {same}"))
            splits.add(sample.split)


def _check_labels_and_masks(dataset: Dataset, problems: Problems) -> None:
    masked = {sample.category for sample in dataset.samples if sample.gt_label and sample.mask_path is not None} | set(dataset.orphans)
    unmasked: set[str] = set()
    users: dict[Path, list[Sample]] = defaultdict(list)
    for sample in dataset.samples:
        where = f"line {sample.line}" if sample.line else ""
        if sample.mask_path is not None:
            users[sample.mask_path].append(sample)
        if sample.gt_label and sample.split == "train":
            # VisA's tables for few and many shots are made for methods that learn from them.
            problems[SUPERVISED if dataset.layout == "visa" else IN_TRAINING].append((sample.image_path, where))
        if sample.gt_label and sample.split == "test" and sample.mask_path is None:
            unmasked.add(sample.category)
            if sample.category in masked:
                problems[NO_MASK].append((sample.image_path, where))
    for category, masks in dataset.orphans.items():
        for mask in masks:
            problems[UNPAIRED if category in unmasked else ORPHANS].append((mask, ""))
    for mask, samples in users.items():
        if len({sample.image_path for sample in samples}) > 1:
            problems[SHARED].append((mask, "of " + ", ".join(short_name(sample.image_path, dataset) for sample in samples)))


def _check_splits(dataset: Dataset) -> Iterable[Finding]:
    """Categories that lack what learning or judging needs."""
    has: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for sample in dataset.samples:
        has[sample.category].add((sample.split, sample.gt_label))
    masked = {sample.category for sample in dataset.samples if sample.mask_path is not None} | set(dataset.orphans)
    judged = {name for name in has if {("test", 0), ("test", 1)} & has[name]}
    unlearnable = {name for name in has if ("train", 0) not in has[name]} if dataset.part in (None, "train") else set()
    plain = dataset.layout == "folders"
    defective = {name for name in judged if ("test", 1) in has[name]}
    lacking = [
        ("no good images to learn from", unlearnable, dataset.layout in FOLDER_LAYOUTS),
        ("no labelled test images", set(has) - judged if dataset.part in (None, "test") else set(), False),
        ("no good test images, so no AUROC", set() if plain else {name for name in judged if ("test", 0) not in has[name]}, False),
        ("no anomalous test images, so no AUROC", judged - defective, False),
        ("no masks, so no pixel metrics", defective - masked, False),
    ]
    yield from (Finding(f"{text}: {', '.join(sorted(names))}", serious) for text, names, serious in lacking if names)
    if plain and judged:
        yield Finding("no train and test folders: the good images are learnt from and judged, unless two folders are used", False)
