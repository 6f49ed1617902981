"""The curves of a report as SVG for a page: ROC, precision-recall and PRO, drawn by Matplotlib.

Text stays text, nothing refers to anything outside, and colours are CSS variables of the page, so that they follow its light or dark mode.
The same report gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, NamedTuple

from gladad.core.records import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, BAD = "#010101", "#040404"  # what Matplotlib draws in, beside the colours of its style
CSS = {INK: "currentColor", "#020202": "var(--soft)", "#030303": "var(--line)", BAD: "var(--reject)"}
Points = dict[str, list[float]]
SIZE = (5.2, 3.7)  # of a chart in inches of 72 units; the page scales it


class Chart(NamedTuple):
    """A drawing ready for a page."""

    name: str  # "roc", "pr" or "pro"
    title: str
    svg: str  # one <svg> element


def charts(report: Report) -> list[Chart]:
    """The curves that the report has numbers for."""
    found: list[Chart] = []
    curves, metrics = report.details["curves"], report.metrics
    if "roc" in curves:
        label, point = f"AUROC {metrics['image_auroc']:.3f}", (metrics["false_reject_rate"], metrics["recall"])
        found.append(_curve("roc", "ROC of images", curves["roc"], label, ("good parts rejected", "bad parts found"), point))
    if "pr" in curves:
        label, names = f"AP {metrics['image_ap']:.3f}", ("bad parts found", "share of rejects that are bad")
        rejected = [row["gt_label"] for row in report.rows if row.get("pred_label")]
        precision = (metrics["recall"], sum(rejected) / len(rejected)) if rejected else None
        found.append(_curve("pr", "Precision and recall", curves["pr"], label, names, precision))
    if "pro" in curves:
        limit, names = report.details["max_fpr"], ("false-positive rate of pixels", "mean overlap with regions")
        title, label = f"PRO of pixels, up to {limit:g}", f"AUPRO {metrics['pixel_aupro']:.3f}"
        found.append(_curve("pro", title, curves["pro"], label, names, limit=limit))
    return found


def _curve(
    name: str, title: str, curve: Points, label: str, names: Sequence[str], point: Sequence[float] | None = None, limit: float = 1.0
) -> Chart:
    def draw(figure: Figure) -> str:
        axes = figure.add_subplot()
        axes.plot(curve["x"], curve["y"], color=INK, label=label)
        described = f"{title}: {label}."
        if point is not None:
            place = f"{point[0]:.1%}, {point[1]:.1%}"
            axes.plot(*point, "o", color=BAD, markersize=9, label=f"threshold: {place}", clip_on=False, zorder=5)
            described += f" At the threshold: {names[0]}, {names[1]}: {place}."
        axes.set(xlim=(-0.015 * limit, 1.015 * limit), ylim=(-0.015, 1.015), xlabel=names[0], ylabel=names[1])
        axes.legend(loc="lower left" if name == "pr" else "lower right")
        return described

    return _drawn(name, title, draw)


def _drawn(name: str, title: str, draw: Callable[[Figure], str]) -> Chart:
    """A chart from a function that draws it and returns a description for who cannot see it; without pyplot, which asks for a display."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that its font cache is made is nobody's business
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with as_file(files("gladad.report") / "charts.mplstyle") as style, rc_context({"svg.hashsalt": name}, style):
        figure, buffer = Figure(SIZE, layout="constrained"), io.StringIO()
        label = draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    start = f'<svg role="img" aria-label="{escape(label)}"'
    text = re.sub(r'(?s).*?<svg[^>]*( viewBox="[^"]*")[^>]*>', lambda match: f"{start}{match[1]}>", buffer.getvalue(), count=1)
    text = re.sub(r"(?s)<style.*?</style>", "", text)  # would apply to the whole page
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    used = set(re.findall(r"#([\w.]+)[\")]", text))  # names are those of this chart alone, and only where they are needed
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text).replace("xlink:href", "href")
    for drawn, shown in CSS.items():
        text = text.replace(drawn, shown)
    return Chart(name, title, re.sub(r"\s*\n\s*", "\n", text).strip())
