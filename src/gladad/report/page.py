"""The page of a report: everything a person needs to judge a run in one HTML file, which works offline and from a mail attachment."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from gladad.core.records import Report
from gladad.core.storage import write_text
from gladad.report.charts import Chart, charts
from gladad.report.gallery import GalleryItem, chosen, gallery_html
from gladad.report.text import LABELS, cell, headline, interval, notes, summary, type_table

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
    shown = chosen(items)
    some = (
        ""
        if len(shown) == len(items)
        else f'<p class="soft">{len(shown)} of {len(items)} images are shown; all are in predictions.csv.</p>'
    )
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(headline(report))}</p><p>{escape(report.details["guarantee"])}</p></header>',
        _tiles(report),
        *(f'<p class="note">{escape(note)}</p>' for note in report.details["notes"]),
        f'<section><h2>Charts</h2><div class="charts">{"".join(map(_chart, charts(report)))}</div></section>',
        f"<section><h2>Kinds of parts</h2>{_types(report)}</section>",
        some,
        gallery_html(shown) if shown else "<p>No images.</p>",
        _everything(report),
    ]
    # The body first: it comes after the place of the title, and so may hold any text.
    page = PAGE.replace("{body}", "\n".join(filter(None, parts)), 1).replace("{title}", escape(title), 1)
    write_text(path, page.encode("utf-8", errors="replace").decode())  # names of files need not be valid Unicode


def _tiles(report: Report) -> str:
    numbers = [(LABELS[name], cell(name, report.metrics[name]), interval(report, name)) for name in TILES if name in report.metrics]
    counts = report.counts
    images = ("images", str(counts["normal"] + counts["anomalous"]), f"{counts['normal']} good, {counts['anomalous']} bad")
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd class=soft>{more}</dd></div>" for name, value, more in [*numbers, images])
        + "</dl>"
    )


def _chart(chart: Chart) -> str:
    return f'<figure class="chart" id="chart-{chart.name}"><figcaption>{escape(chart.title)}</figcaption>{chart.svg}</figure>'


def _types(report: Report) -> str:
    """The table of kinds; a bar shows each rate in its interval."""
    titles, lines = type_table(report)
    rows = []
    for row, texts in zip(report.details["per_type"], lines, strict=True):
        low, high, rate = (100 * row[name] for name in ("low", "high", "rate"))
        colour = "bad" if row["anomalous"] else "good"
        bar = f'<span class="bar {colour}"><i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{rate:.1f}%"></b></span>'
        cells = [f"<td>{escape(text)}</td>" for text in texts]
        rows.append(f"<tr>{cells[0]}<td>{bar}</td>{''.join(cells[1:])}</tr>")
    head = "".join(f'<th scope="col">{text}</th>' for text in (titles[0], "0 to 100 %", *titles[1:]))
    return _scrolled(f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>")


def _everything(report: Report) -> str:
    metrics = [(LABELS[name], cell(name, value), interval(report, name)) for name, value in summary(report)]
    counts = [(name.replace("_", " "), str(count), "") for name, count in report.counts.items()]
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in [*metrics, *counts])
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(report))
    table = _scrolled(
        f'<thead><tr><th scope="col">number</th><th scope="col">value</th><th scope="col">95 % interval</th></tr></thead>{body}'
    )
    return f"<details><summary>All numbers, and what they mean</summary>{table}<ul>{listed}</ul></details>"


def _scrolled(table: str) -> str:
    return f'<div class="scroll" tabindex="0"><table>{table}</table></div>'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --back: #f5f6f8; --card: #fff; --text: #1c1f24; --soft: #565e69; --line: #d9dde3;
  --good: #16713f; --bad: #b4232a; }
@media (prefers-color-scheme: dark) { :root { --back: #15171b; --card: #1f2228; --text: #e8eaee; --soft: #a3abb7; --line: #3a404a;
  --good: #4cc38a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; font: 15px/1.45 system-ui, sans-serif; background: var(--back);
  color: var(--text); }
h1 { font-size: 1.4rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.6rem 0 .6rem; }
header p { margin: .2rem 0; }
.lead { font-size: 1.25rem; font-weight: 600; }
.soft, dt, figcaption, .item p { color: var(--soft); font-size: .85rem; }
.note { margin: .4rem 0; padding: .5rem .8rem; border-left: .3rem solid var(--soft); background: var(--card); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div, .item, table, .chart { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tiles div { padding: .6rem .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
dd:nth-child(2) { font-size: 1.35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: .8rem; }
.charts:has(> :nth-child(3):last-child) { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.chart { padding: .6rem .8rem; margin: 0; }
.chart svg { display: block; width: 100%; height: auto; max-height: 27rem; font-family: inherit; }
.chart figcaption { font-size: 1rem; color: inherit; font-weight: 600; margin: 0 0 .3rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
.bar { display: block; position: relative; width: clamp(4.5rem, 18vw, 10rem); height: .8rem; background: var(--line);
  border-radius: .2rem; }
.bar i, .bar b { position: absolute; top: 0; height: 100%; background: currentColor; }
.bar i { opacity: .45; min-width: 2px; }
.bar b { width: 3px; margin-left: -1.5px; }
.bar.good { color: var(--good); }
.bar.bad { color: var(--bad); }
.group { display: flex; flex-wrap: wrap; gap: .4rem .5rem; align-items: center; margin: 0 0 .6rem; }
label { display: flex; align-items: center; gap: .4rem; margin-right: .6rem; }
button, input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 1rem;
  padding: .2rem .8rem; max-width: 100%; }
input { width: 11rem; }
button { cursor: pointer; overflow-wrap: anywhere; }
button span { color: var(--soft); font-variant-numeric: tabular-nums; }
button[aria-pressed=true], button[aria-pressed=true] span { background: var(--text); color: var(--back); }
#items { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(33rem, 100%), 1fr)); gap: .8rem; align-items: start; }
.item { padding: .7rem; min-width: 0; }
.item.wrong { border-left: .35rem solid var(--bad); }
.item[hidden] { display: none; }
.item header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem .6rem; margin-bottom: .4rem; }
.item h3 { font-size: .95rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.item p { margin: 0; font-variant-numeric: tabular-nums; }
.item b { color: #fff; border-radius: .3rem; padding: 0 .45rem; font-size: .85rem; background: #16713f; }
.item.wrong b { background: #b4232a; }
.pictures { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .4rem; }
@media (max-width: 36rem) { .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.pictures figure { margin: 0; }
.pictures img { width: 100%; height: auto; display: block; border-radius: .3rem; }
.none { display: grid; place-items: center; min-height: 5rem; padding: .4rem; text-align: center; color: var(--soft); font-size: .85rem;
  border: 1px dashed var(--line); border-radius: .3rem; }
dialog { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); color: inherit; max-width: 96vw; padding: .8rem; }
dialog::backdrop { background: #000b; }
dialog img { display: block; max-width: 100%; max-height: 80vh; min-width: min(20rem, 80vw); margin: .5rem auto; object-fit: contain; }
dialog p { margin: 0; overflow-wrap: anywhere; }
details { margin: 1.6rem 0; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin-bottom: .6rem; }
li { overflow-wrap: anywhere; }
</style>
</head>
<body>
{body}
<script>
"use strict";
const list = document.getElementById("items");
if (list) {
  const items = [...list.children], buttons = [...document.querySelectorAll("button[data-group]")];
  const search = document.getElementById("search"), order = document.getElementById("order"), status = document.getElementById("shown");
  const picked = {outcome: "", type: ""};
  const names = new Map(items.map(item => [item, item.querySelector("h3").textContent.toLowerCase()]));
  const matches = (item, wanted) => names.get(item).includes(search.value.trim().toLowerCase()) &&
    Object.entries(wanted).every(([group, value]) => value === "" || item.dataset[group] === value);
  const show = () => {
    for (const item of items) item.hidden = !matches(item, picked);
    for (const button of buttons) {
      const {group, show: value} = button.dataset;
      button.setAttribute("aria-pressed", picked[group] === value);
      button.lastElementChild.textContent = items.filter(item => matches(item, {...picked, [group]: value})).length;
    }
    status.textContent = items.filter(item => !item.hidden).length + " of " + items.length + " images";
  };
  for (const button of buttons) button.onclick = () => { picked[button.dataset.group] = button.dataset.show; show(); };
  search.oninput = show;
  order.onchange = () => {
    const sign = {up: 1, down: -1}[order.value];
    list.append(...(sign ? [...items].sort((a, b) => sign * (a.dataset.score - b.dataset.score)) : items));
  };
  search.value = order.value = "";  // browsers keep what was typed before a reload
  const dialog = document.getElementById("large"), [large, caption] = [dialog.querySelector("img"), dialog.querySelector("p")];
  list.onclick = event => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const small = link.firstElementChild;
    caption.textContent = small.alt;
    large.alt = small.alt;
    large.onerror = () => {
      large.onerror = null;
      large.src = small.src;
      caption.textContent = small.alt + ": the full size is not beside this page";
    };
    large.src = link.href;
    dialog.showModal();
  };
  dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
}
</script>
</body>
</html>
"""
