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

from scipy.stats import rankdata  # type: ignore[import-untyped, unused-ignore]

from gladad.benchmark.plan import CONTAMINATION, CORRUPTION, PLAIN, Cell
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

Values = dict[tuple[str, str], dict[int, float]]  # (row, column) -> seed -> value
Records = Sequence[dict[str, Any]]  # contents of cells' files


def write_tables(folder: Path, title: str, records: Records, failed: Sequence[tuple[Cell, str]], notes: Sequence[str]) -> Path:
    """Write ``results.md``, ``results.csv`` and ``results.json``; returns the first.

    Args:
        folder: Where they go.
        title: Heading.
        records: Of the cells that are finished, in the order of the plan.
        failed: ``(cell, reason)`` of those that are not.
        notes: What was left out, and why.
    """
    write_json(folder / "results.json", {"title": title, "cells": records, "notes": notes})
    write_text(folder / "results.csv", to_csv(records))
    write_text(folder / "results.md", to_markdown(title, records, failed, notes))
    return folder / "results.md"


def to_csv(records: Records) -> str:
    """One line for every result of every cell."""
    names = ("dataset", "category", "configuration", "seed", "kind", "corruption", "severity", "share", "defective")
    costs = ("fit_seconds", "fit_threads", "fitted", "seconds_per_image", "peak_memory_gib")
    text = io.StringIO()
    writer = csv.DictWriter(text, (*names, *METRICS, *costs), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerows(record | record["cell"] | result | result["metrics"] for result in record["results"])
    return text.getvalue()


def to_markdown(title: str, records: Records, failed: Sequence[tuple[Cell, str]] = (), notes: Sequence[str] = ()) -> str:
    """All tables, see `write_tables`. Values are per cent, mean ± standard deviation over the seeds; the best of a row is bold."""
    seeds = _sorted(record["cell"]["seed"] for record in records)
    over = f", mean ± standard deviation over the seeds {', '.join(seeds)}" if len(seeds) > 1 else "".join(f", seed {s}" for s in seeds)
    lines = [f"# {title}", "", f"Values are per cent{over}. The best mean of each row is bold. A dash: not defined, or not run.", ""]
    notes = [*notes, *(note for record in records for note in record["notes"])]
    if len(versions := _sorted(record["version"] for record in records)) > 1:
        notes.append(f"cells of several versions of gladad: {', '.join(versions)}")
    if len(threads := _sorted(record["threads"] for record in records)) > 1:
        notes.append(f"cells were run with {' and '.join(threads)} threads; a training's last digits depend on that, and the times do")
    lines += [f"* {note}" for note in _unique(notes)]
    lines += [f"* FAILED: {cell.label}: {problem}" for cell, problem in failed]
    lines += _ranks([record for record in records if record["kind"] == PLAIN])
    for dataset, here in _groups(records, "dataset").items():
        plain = [record for record in here if record["kind"] == PLAIN]
        columns = _groups(plain, "configuration")
        counts = {name: len({record["cell"]["seed"] for record in own}) for name, own in columns.items()}
        lines += ["", f"## {dataset}"]
        if len(set(counts.values())) > 1:
            lines += ["", f"Not all have the same number of seeds: {', '.join(f'{name} {count}' for name, count in counts.items())}."]
        for metric, heading in METRICS.items():
            if values := _values(plain, lambda record, result: record["cell"]["configuration"], metric):
                lines += ["", f"### {heading}", "", *_table(values, list(columns), best=min if metric in LOWER_IS_BETTER else max)]
        if plain:
            lines += ["", "### Time and memory", "", *_costs(plain)]
        lines += _shift_tables([record for record in here if record["kind"] != PLAIN], plain)
    return "\n".join(lines) + "\n"


def _ranks(plain: Records) -> list[str]:
    """How configurations rank over the products of all data sets that every one of them was run on: how a default is chosen."""
    columns = list(_groups(plain, "configuration"))
    lines = ["| metric | products | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for metric in ("image_auroc", "pixel_auroc"):
        values = _values(plain, lambda record, result: record["cell"]["configuration"], metric)
        means = {pair: fmean(seeds.values()) for pair, seeds in values.items()}
        rows = [row for row in _unique(row for row, _ in means) if all((row, column) in means for column in columns)]
        if len(rows) < 3 or len(columns) < 2:
            continue
        ranks = [rankdata([-round(means[row, column], 4) for column in columns]) for row in rows]
        best = {row: max(means[row, column] for column in columns) for row in rows}
        cells = []
        for place, column in enumerate(columns):
            own, behind = [rank[place] for rank in ranks], [best[row] - means[row, column] for row in rows]
            cells.append(f"{fmean(own):.2f}, {max(own):g}, {100 * max(behind):.1f}")
        lines.append(f"| {METRICS[metric]} | {len(rows)} | {' | '.join(cells)} |")
    return (
        ["", "## Ranks", "", "Mean rank, worst rank, and most points behind the best, over the products.", "", *lines]
        if len(lines) > 2
        else []
    )


def _shift_tables(shifted: Records, plain: Records) -> list[str]:
    """For every configuration: categories against corruptions, and against shares of defective images."""
    lines: list[str] = []
    for configuration, own in _groups(shifted, "configuration").items():
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


def _values(records: Records, name: Callable[[dict[str, Any], dict[str, Any]], str], metric: str, *, transposed: bool = False) -> Values:
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
    rows = {row: [values.get((row, column), {}) for column in columns] for row in _unique(row for row, _ in values)}
    if len(rows) > 1 and first == "category":
        rows["**mean**"] = [_mean(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        present = [round(100 * fmean(seeds.values()), 1) for seeds in cells if seeds]
        winner = best(present) if best and len(present) > 1 else math.nan
        lines.append(f"| {name} | {' | '.join(_cell(seeds, winner) for seeds in cells)} |")
    return lines


def _mean(column: Sequence[dict[int, float]]) -> dict[int, float]:
    """For the seeds that every category has."""
    return {seed: fmean(row[seed] for row in column) for seed in sorted(set.intersection(*map(set, column)))}


def _cell(seeds: dict[int, float], winner: float) -> str:
    if not seeds:
        return DASH
    percent = [100 * value for value in seeds.values()]
    text = f"{fmean(percent):.1f}" + (f" ± {stdev(percent):.1f}" if len(percent) > 1 else "")
    return f"**{text}**" if round(fmean(percent), 1) == winner else text


def _costs(records: Records) -> list[str]:
    """Means over categories and seeds. Peak memory is of cells that trained; a training for several categories counts evenly for each."""
    lines = ["| configuration | training, s | inspection, ms per image | peak memory, GiB | cells |", "|---|---|---|---|---|"]
    for configuration, own in _groups(records, "configuration").items():
        results = [result for record in own for result in record["results"]]
        peaks = [record["peak_memory_gib"] for record in own if record["results"][0]["fitted"] and record["peak_memory_gib"]]
        milliseconds = 1000 * fmean(result["metrics"]["seconds_per_image"] for result in results)
        memory = f"{max(peaks):.1f}" if peaks else "shared training"
        lines.append(f"| {configuration} | {fmean(r['fit_seconds'] for r in results):.0f} | {milliseconds:.0f} | {memory} | {len(own)} |")
    return lines


def _groups(records: Records, name: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["cell"][name], []).append(record)
    return groups


def _sorted(values: Iterable[Any]) -> list[str]:
    """Different values as text, in their own order."""
    return [str(value) for value in sorted(set(values))]


def _unique(names: Iterable[str]) -> list[str]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(names))
