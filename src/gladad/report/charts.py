"""The charts of a report as SVG for a page: scores, ROC, precision-recall and PRO, drawn by Matplotlib.

Text stays text, nothing refers to anything outside, and colours are CSS variables of the page, so that they follow its light or dark mode.
The same report gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gladad.core.records import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GOOD, BAD = "#010101", "#040404", "#050505"  # what Matplotlib draws in, beside the colours of its style
CSS = {INK: "currentColor", "#020202": "var(--soft)", "#030303": "var(--line)", GOOD: "var(--good)", BAD: "var(--bad)"}
Points = dict[str, list[float]]
SIZE = (5.2, 3.7)  # of a chart in inches of 72 units; the page scales it
LOG_FROM = 8  # ratio of the largest to the smallest score from which on the axis is logarithmic


class Chart(NamedTuple):
    """A drawing ready for a page."""

    name: str  # "scores", "roc", "pr" or "pro"
    title: str
    svg: str  # one <svg> element


def charts(report: Report) -> list[Chart]:
    """The charts that the report has numbers for; the scores always."""
    found = [_drawn("scores", "Scores", partial(_draw_scores, report))]
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


def bin_edges(scores: Sequence[float]) -> tuple[NDArray[np.float64], bool]:
    """Edges of a histogram of scores, one of them the threshold 1, which has room on both sides; and whether they grow by factors."""
    values = np.asarray(scores, np.float64)
    logarithmic = bool(values.min() > 0 and values.max() / values.min() > LOG_FROM)
    places = np.log(values) if logarithmic else values - 1
    low, high = min(0.0, float(places.min())), max(0.0, float(places.max()))
    span = max(high - low, 0.05)
    low, high = min(low, -0.4 * span), max(high, 0.4 * span)
    step = (high - low) / min(40, max(12, round(2 * math.sqrt(len(values)))))
    places = step * np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    edges = np.exp(places) if logarithmic else 1 + places
    return edges.astype(np.float64), logarithmic


def bin_counts(scores: Sequence[float], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Scores above each edge and up to the next, as the decision has it: at the threshold is still accepted."""
    places = np.searchsorted(edges, np.asarray(scores, np.float64), side="left") - 1
    return np.bincount(places.clip(0, len(edges) - 2), minlength=len(edges) - 1)


def _draw_scores(report: Report, figure: Figure) -> str:
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in report.rows if "error" not in row]
    edges, logarithmic = bin_edges([row["pred_score"] for row in rows])
    upper, lower = figure.subplots(2, 1, sharex=True)
    labels = []
    for axes, anomalous, name, colour in ((upper, 0, "good", GOOD), (lower, 1, "bad", BAD)):
        members = [row for row in rows if row["gt_label"] == anomalous]
        rejected = sum(row["pred_label"] for row in members)
        counts = bin_counts([row["pred_score"] for row in members], edges)
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.75)
        axes.axvline(1, color=INK, linewidth=1.5, linestyle=(0, (4, 2)))
        axes.set_ylim(0, max(1, int(counts.max())) * 1.35)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        axes.set_ylabel(f"{name} parts")
        axes.grid(visible=False, axis="x")
        texts = (f"{len(members) - rejected} accepted", f"{rejected} rejected")
        labels.append(f"{name}: {', '.join(texts)}")
        for text, offset, side in zip(texts, (-6, 6), ("right", "left"), strict=True):
            axes.annotate(text, (1, 1), (offset, -4), ha=side, va="top", xycoords=("data", "axes fraction"), textcoords="offset points")
    if logarithmic:
        low, high = lower.dataLim.intervalx
        lower.set_xscale("log")  # with 0.5 and 2 on the axis, not powers of ten
        lower.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
        lower.xaxis.set_minor_locator(NullLocator())
        lower.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lower.set(xlim=(edges[0], edges[-1]), xlabel="score; above 1 is rejected")
    return f"Histogram of scores around the threshold 1. {'; '.join(labels)}."


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
