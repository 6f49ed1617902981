"""A report with every outcome, of the generated category, and a parser of its page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from gladad.core.records import Report, Sample
from gladad.data.samples import category_samples
from gladad.detector.glad import Glad
from gladad.evaluation.run import evaluate, write_report
from gladad.report.gallery import GalleryItem

FILES = ("index.html", "predictions.csv", "report.json", "report.md")
VOID = {"meta", "img", "br", "link", "input"}


def mislabelled(detector: Glad, category: Path) -> list[Sample]:
    """The samples of the generated category, with a part that is accepted and one that is rejected under the wrong label as well."""
    samples = category_samples(category)
    rejected = {sample.image_path: detector.inspect(sample.image_path).pred_label for sample in samples}
    accepted_part = next(path for path, answer in rejected.items() if not answer)
    rejected_part = next(path for path, answer in reversed(rejected.items()) if answer)
    return [
        *samples,
        Sample(accepted_part, None, 1, "widget", 'odd "kind" <1> & ünï'),
        Sample(rejected_part, None, 0, "widget", "good"),
    ]


def put_report(detector: Glad, samples: list[Sample], folder: Path) -> Report:
    items: list[GalleryItem] = []
    report = evaluate(detector, samples, collect=items.append, pictures=folder / "pictures", maps=folder / "maps")
    write_report(report, items, folder, title="Widgets & <gadgets>")
    return report


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["rows"]
    return rows


def rejected_of(folder: Path, gt_label: int) -> tuple[int, int]:
    """How many of the parts of a label were rejected, and how many there are."""
    labels = [row["pred_label"] for row in rows_of(folder) if row["gt_label"] == gt_label]
    return sum(labels), len(labels)


class Page(HTMLParser):
    """Checks that tags nest, and keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, wanted: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == wanted]
