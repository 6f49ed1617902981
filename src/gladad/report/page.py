"""The page of a report: everything a person needs to judge a run in one HTML file, which works offline and from a mail attachment."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from gladad.core.records import Report
from gladad.core.storage import write_text
from gladad.report.charts import charts
from gladad.report.gallery import FOLDER, GalleryItem, chosen
from gladad.report.text import counted, headline, notes, numbers, score_table, type_table

TILES = ("recall", "false_reject_rate", "image_auroc", "pixel_auroc", "pixel_aupro", "pixel_aupimo", "seconds_per_image")
"""Numbers at the top of the page; all others are in a table at its end."""


def write_page(path: Path, report: Report, items: Sequence[GalleryItem], title: str) -> None:
    """Write the page whole or not at all.

    Args:
        path: The HTML file.
        report: What is shown.
        items: Its images; of more than `gallery.MAX_PICTURES` the wrong decisions are kept first.
        title: Heading.

    Raises:
        WriteError: The disk refuses.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    folder = files("gladad.report")
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    shown = chosen(items)
    good, bad = report.counts["normal"], report.counts["anomalous"]
    head, kinds = type_table(report)
    page = template.render(
        title=title,
        palette=folder.joinpath("palette.css").read_text(encoding="utf-8"),
        script=folder.joinpath("script/page.js").read_text(encoding="utf-8"),
        report=report,
        headline=headline(report),
        tiles=[*numbers(report, TILES), ("images", str(good + bad), f"{good} good, {bad} bad")],
        scores=_scores(report),
        charts=charts(report),
        kinds_head=(head[0], "0 to 100 %", *head[1:]),
        kinds=kinds,
        items=shown,
        total=len(items),
        linked=any(picture.link for item in shown for picture in item.pictures),
        folder=FOLDER,
        numbers=[*numbers(report), *((*pair, "") for pair in counted(report))],
        notes=notes(report),
    )
    write_text(path, page.encode("utf-8", errors="replace").decode())  # names of files need not be valid Unicode


def _scores(report: Report) -> dict[str, Any]:
    """The histogram of scores: its groups, what it shows in a sentence, and the same as a table."""
    groups, label = [], "Histogram of scores around the threshold 1"
    for name, anomalous in (("good", 0), ("bad", 1)):
        rows = [row for row in report.rows if "error" not in row and row["gt_label"] == anomalous]
        rejected = sum(row["pred_label"] for row in rows)
        groups.append({"name": name.capitalize(), "scores": [row["pred_score"] for row in rows], "note": f"{rejected} rejected"})
        label += f"{'; ' if anomalous else '. '}{name}: {len(rows) - rejected} accepted, {rejected} rejected"
    head, table = score_table(report)
    return {"groups": groups, "label": f"{label}.", "head": head, "rows": table}
