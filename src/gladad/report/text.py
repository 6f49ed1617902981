"""What a report says in words and tables, for the page, the Markdown file and the terminal."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from gladad.core.records import Report

LABELS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1-max",
    "image_pg2": "image PG2",
    "image_pb2": "image PB2",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "pixel_aupro": "AUPRO",
    "pixel_aupro_05": "AUPRO to 0.05",
    "pixel_aupimo": "AUPIMO",
    "recall": "bad parts found",
    "false_reject_rate": "good parts rejected",
    "seconds_per_image": "time per image",
}
SCORES = (0.5, 0.8, 1.0, 1.25, 2.0)  # where the ranges of the table of scores end
TYPE_HEAD = ("type", "rate", "95 % interval", "rejected", "images", "image AUROC", "AUPIMO")


def summary(report: Report) -> list[tuple[str, float]]:
    """The numbers that people look at first, those that are there, in order: ``(name, value)``."""
    return [(name, report.metrics[name]) for name in LABELS if name in report.metrics]


def cell(name: str, value: float) -> str:
    """One of these numbers as people read it: per cent, or seconds."""
    return f"{value:.3f} s" if name == "seconds_per_image" else f"{value:.1%}"


def interval(report: Report, name: str) -> str:
    """The 95 % interval of a rate; empty for numbers that have none."""
    low, high = report.details["intervals_95"].get(name, (None, None))
    return "" if low is None else f"{low:.1%} to {high:.1%}"


def numbers(report: Report, names: Sequence[str] = tuple(LABELS)) -> list[tuple[str, str, str]]:
    """Those of the named numbers that are there as people read them: ``(label, value, 95 % interval)``."""
    return [(LABELS[name], cell(name, report.metrics[name]), interval(report, name)) for name in names if name in report.metrics]


def counted(report: Report) -> list[tuple[str, str]]:
    """How many images of what there are, as text."""
    return [(name.replace("_", " "), str(count)) for name, count in report.counts.items()]


def headline(report: Report) -> str:
    """One sentence: how many bad parts were found, and how many good ones rejected."""
    parts = []
    for anomalous, text in ((True, "bad parts found"), (False, "good parts rejected")):
        rows = [row for row in report.details["per_type"] if row["anomalous"] == anomalous]
        if rows:
            parts.append(f"{sum(row['rejected'] for row in rows)} of {sum(row['count'] for row in rows)} {text}")
    return ", ".join(parts)


def score_table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """How many parts have which score, as text: head, and a row for each range; 1, the threshold, still counts as accepted."""
    names = [f"up to {SCORES[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(SCORES)), f"above {SCORES[-1]:g}"]
    rows = [row for row in report.rows if "error" not in row]
    counts = [Counter(bisect_left(SCORES, row["pred_score"]) for row in rows if row["gt_label"] == label) for label in (0, 1)]
    return ("score", "good parts", "bad parts"), [(name, *(str(count[n]) for count in counts)) for n, name in enumerate(names)]


def type_table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table of kinds as text, good ones first: head and rows, without the columns that nothing is known for."""
    rows = [
        (
            row["defect_type"],
            f"{row['rate']:.1%} {'found' if row['anomalous'] else 'falsely rejected'}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            str(row["rejected"]),
            str(row["count"]),
            *(f"{row[name]:.1%}" if name in row else "" for name in ("image_auroc", "aupimo")),
        )
        for row in report.details["per_type"]
    ]
    columns = [column for column in zip(TYPE_HEAD, *rows, strict=True) if any(column[1:])]
    head, *body = zip(*columns, strict=True)
    return head, body


def markdown(report: Report, title: str) -> str:
    """The report without its images, as tables in Markdown."""
    blocks = [
        f"# {_escaped(title)}",
        f"**{headline(report)}**",
        report.details["guarantee"],
        _table(("metric", "value", "95 % interval"), numbers(report)),
        "## Kinds of parts",
        _table(*type_table(report)),
        "## Images",
        _table(("images", "count"), counted(report)),
        "## Notes",
        "\n".join(f"* {_escaped(note)}" for note in notes(report)),
    ]
    return "\n\n".join(blocks) + "\n"


def notes(report: Report) -> list[str]:
    """What to know when reading the numbers: what is left out, then what each unit means."""
    return [*report.details["notes"], *(f"{name}: {text}" for name, text in report.details["units"].items())]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown takes for text."""
    for sign in "\\|*_`<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
