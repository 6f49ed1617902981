"""Tables of a benchmark: one per metric in the field's format, the shifts, and time and memory; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gladad.benchmark.plan import CONTAMINATION, CORRUPTION, PLAIN, Outcome
from gladad.core.storage import write_json, write_text

METRICS = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1max": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1max": "Pixel F1-max",
    "pixel_aupro": "AUPRO (to a false-positive rate of 0.3)",
    "pixel_aupro_05": "AUPRO (to 0.05)",
    "pixel_aupimo": "AUPIMO",
    "recall": "Recall at the calibrated threshold",
    "false_reject_rate": "False rejects at the calibrated threshold",
    "image_pg2": "PG2: good passed while 2 % of the bad are missed",
    "image_pb2": "PB2: bad found while 2 % of the good are rejected",
}
"""Metric -> heading, in the order of the tables."""
SHIFTED = ("image_auroc", "false_reject_rate", "recall")
LOWER_IS_BETTER = frozenset({"false_reject_rate"})

DASH = "\N{EN DASH}"

Values = dict[tuple[str, str], dict[int, float]]
"""``(row, column)`` -> seed -> value."""


def write_tables(folder: str | Path, title: str, outcome: Outcome) -> Path:
    """Write ``results.md``, ``results.csv`` and ``results.json`` of the cells that are finished.

    Returns:
        The Markdown file.
    """
    folder = Path(folder)
    write_json(folder / "results.json", {"title": title, "cells": outcome.finished, "notes": outcome.notes})
    write_text(folder / "results.csv", to_csv(outcome.finished))
    page = folder / "results.md"
    write_text(page, to_markdown(title, outcome))
    return page


def to_csv(records: Iterable[dict[str, Any]]) -> str:
    """One line for every result of every cell."""
    names = ("dataset", "category", "configuration", "seed", "kind", "corruption", "severity", "share", "defective")
    costs = ("fit_seconds", "fit_threads", "fitted", "seconds_per_image", "peak_memory_gib")
    text = io.StringIO()
    writer = csv.DictWriter(text, (*names, *METRICS, *costs), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        for result in record["results"]:
            facts = {name: value for name, value in result.items() if name not in ("metrics", "counts", "per_type")}
            writer.writerow(record | record["cell"] | facts | result["metrics"])
    return text.getvalue()


def to_markdown(title: str, outcome: Outcome) -> str:
    """All tables. Values are per cent, mean ± standard deviation over the seeds; the best of a row is bold."""
    records = [record for record in outcome.finished if record["kind"] == PLAIN]
    seeds = sorted({record["cell"]["seed"] for record in outcome.finished})
    lines = [
        f"# {title}",
        "",
        f"Values are per cent{_over(seeds)}. The best mean of each row is bold. A dash: not defined, or not run.",
        "",
    ]
    notes = [*outcome.notes, *(note for record in outcome.finished for note in record["notes"])]
    if len(versions := sorted({record["version"] for record in outcome.finished})) > 1:
        notes.append(f"cells of several versions of gladad: {', '.join(versions)}")
    if len(threads := sorted({record["threads"] for record in outcome.finished})) > 1:
        notes.append(
            f"cells were run with {' and '.join(map(str, threads))} threads; a training's last digits depend on that, and the times do"
        )
    lines += [f"* {note}" for note in _unique(notes)]
    lines += [f"* FAILED: {cell.label}: {problem}" for cell, problem in outcome.failed]
    for dataset in _unique(record["cell"]["dataset"] for record in outcome.finished):
        here = [record for record in records if record["cell"]["dataset"] == dataset]
        columns = _unique(record["cell"]["configuration"] for record in here)
        lines += ["", f"## {dataset}", *_seed_counts(here, columns)]
        for metric, heading in METRICS.items():
            values = _values(here, lambda record, result: record["cell"]["configuration"], metric)
            if values:
                lines += ["", f"### {heading}", "", *_table(values, columns, best=min if metric in LOWER_IS_BETTER else max)]
        if here:
            lines += ["", "### Time and memory", "", *_costs(here)]
        shifted = [record for record in outcome.finished if record["cell"]["dataset"] == dataset and record["kind"] != PLAIN]
        lines += _shift_tables(shifted, here)
    return "\n".join(lines) + "\n"


def _seed_counts(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """A line on the seeds of each configuration, where they are not the same number."""
    seeds = {name: {record["cell"]["seed"] for record in records if record["cell"]["configuration"] == name} for name in columns}
    if len({len(found) for found in seeds.values()}) < 2:
        return []
    return ["", f"Not all have the same number of seeds: {', '.join(f'{name} {len(found)}' for name, found in seeds.items())}."]


def _shift_tables(shifted: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> list[str]:
    """For every configuration: categories against corruptions, and against shares of defective images."""
    lines: list[str] = []
    for configuration in _unique(record["cell"]["configuration"] for record in shifted):
        own = [record for record in shifted if record["cell"]["configuration"] == configuration]
        clean = [record for record in plain if record["cell"] in [other["cell"] for other in own]]
        for kind, heading in ((CORRUPTION, "shifted test images"), (CONTAMINATION, "defective images among the training images")):
            records = [record for record in own if record["kind"] == kind]
            if not records:
                continue
            lines += ["", f"### {configuration}: {heading}"]
            for metric in SHIFTED:
                values = _values(records, _shift_name, metric, transposed=True)
                if kind == CORRUPTION:
                    values = _values(clean, lambda record, result: "none", metric, transposed=True) | values
                if values:
                    lines += ["", f"#### {METRICS[metric]}", "", *_table(values, _unique(column for _, column in values), first="shift")]
    return lines


def _shift_name(record: dict[str, Any], result: dict[str, Any]) -> str:
    if record["kind"] == CORRUPTION:
        return f"{record['corruption'].replace('_', ' ')} {result['severity']}"
    return f"{result['share']:.0%} defective"


def _values(
    records: Iterable[dict[str, Any]], name: Callable[[dict[str, Any], dict[str, Any]], str], metric: str, *, transposed: bool = False
) -> Values:
    values: Values = defaultdict(dict)
    for record in records:
        for result in record["results"]:
            if metric in result["metrics"]:
                pair = (record["cell"]["category"], name(record, result))
                values[pair[::-1] if transposed else pair][record["cell"]["seed"]] = result["metrics"][metric]
    return dict(values)


def _table(
    values: Values, columns: Sequence[str], *, first: str = "category", best: Callable[[Iterable[float]], float] | None = None
) -> list[str]:
    """Rows in the order in which they came, the mean of the complete columns last."""
    rows = _unique(row for row, _ in values)
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    means: dict[str, dict[int, float]] = {}
    for column in columns:
        per_row = [values.get((row, column), {}) for row in rows]
        common = set.intersection(*map(set, per_row))  # seeds that every category has
        means[column] = {seed: fmean(row[seed] for row in per_row) for seed in sorted(common)}
    for row in rows:
        lines.append(_line(row, [values.get((row, column), {}) for column in columns], best))
    if len(rows) > 1 and first == "category":
        lines.append(_line("**mean**", [means[column] for column in columns], best))
    return lines


def _line(name: str, cells: Sequence[dict[int, float]], best: Callable[[Iterable[float]], float] | None) -> str:
    present = [round(100 * fmean(cell.values()), 1) for cell in cells if cell]
    winner = best(present) if best and len(present) > 1 else math.nan
    return f"| {name} | {' | '.join(_cell(cell, winner) for cell in cells)} |"


def _cell(seeds: dict[int, float], winner: float) -> str:
    if not seeds:
        return DASH
    percent = [100 * value for value in seeds.values()]
    text = f"{fmean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")
    return f"**{text}**" if round(fmean(percent), 1) == winner else text


def _costs(records: Sequence[dict[str, Any]]) -> list[str]:
    """Means over categories and seeds. Peak memory is of cells that trained; a training for several categories counts evenly for each."""
    lines = ["| configuration | training, s | inspection, ms per image | peak memory, GiB | cells |", "|---|---|---|---|---|"]
    for configuration in _unique(record["cell"]["configuration"] for record in records):
        own = [record for record in records if record["cell"]["configuration"] == configuration]
        results = [result for record in own for result in record["results"]]
        peaks = [record["peak_memory_gib"] for record in own if record["results"][0]["fitted"] and record["peak_memory_gib"]]
        milliseconds = 1000 * fmean(result["metrics"]["seconds_per_image"] for result in results)
        memory = f"{max(peaks):.1f}" if peaks else "shared training"
        lines.append(f"| {configuration} | {fmean(r['fit_seconds'] for r in results):.0f} | {milliseconds:.0f} | {memory} | {len(own)} |")
    return lines


def _over(seeds: Sequence[int]) -> str:
    if len(seeds) < 2:
        return f", seed {seeds[0]}" if seeds else ""
    return f", mean ± standard deviation over the seeds {', '.join(map(str, seeds))}"


def _unique(names: Iterable[str]) -> list[str]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(names))
