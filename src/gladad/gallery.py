"""One HTML page with everything a person needs to judge a run: self-contained, works offline and from a mail attachment."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.types import Prediction
from gladad.visualization import overlay, thumbnail

# From what needs a look to what does not.
OUTCOMES = ("missed", "false alarm", "rejected", "accepted", "found", "passed")


@dataclass(frozen=True)
class GalleryItem:
    """One image of the page, ready to be written: the pictures are already small and encoded.

    Attributes:
        name: What to call it, such as its path in the data set.
        pred_score: Anomaly score; above 1 is rejected.
        p_value: As in `Prediction`.
        pred_label: Rejected.
        step: The image's diffusion timestep.
        pictures: ``(title, JPEG bytes)``, in the order of display.
        gt_label: 0 normal, 1 anomalous, None unknown.
    """

    name: str
    pred_score: float
    p_value: float
    pred_label: bool
    step: int
    pictures: tuple[tuple[str, bytes], ...]
    gt_label: int | None = None

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`: a verdict compared with the truth, or the verdict alone where the truth is unknown."""
        if self.gt_label is None:
            return "rejected" if self.pred_label else "accepted"
        if self.gt_label:
            return "found" if self.pred_label else "missed"
        return "false alarm" if self.pred_label else "passed"


def gallery_item(
    prediction: Prediction,
    pixels: NDArray[np.uint8],
    name: str | None = None,
    gt_label: int | None = None,
    gt_mask: NDArray[np.bool_] | None = None,
    side: int = 256,
) -> GalleryItem:
    """Shrink and encode one result for the page, so that large images need not be kept.

    Args:
        prediction: What inspection said.
        pixels: ``[H, W, 3]`` uint8, the inspected image.
        name: What to call it; the image's path by default.
        gt_label: 0 normal, 1 anomalous, None unknown.
        gt_mask: ``[H, W]`` bool; outlined on the map in place of the predicted mask.
        side: Longer side of the pictures in pixels.
    """
    pictures = [("input", pixels)]
    if prediction.reconstruction is not None:
        pictures.append(("reconstruction", prediction.reconstruction))
    outline = prediction.pred_mask if gt_mask is None else gt_mask
    title = "map, predicted outline" if gt_mask is None else "map, true outline"
    pictures.append((title, overlay(pixels, prediction.anomaly_map, outline)))
    return GalleryItem(
        name=str(prediction.image_path or "image") if name is None else name,
        pred_score=prediction.pred_score,
        p_value=prediction.p_value,
        pred_label=prediction.pred_label,
        step=prediction.step,
        pictures=tuple((title, _jpeg(thumbnail(picture, side))) for title, picture in pictures),
        gt_label=gt_label,
    )


def write_gallery(
    path: str | Path,
    title: str,
    tiles: Sequence[tuple[str, object]],
    rows: Sequence[GalleryItem],
    table: Sequence[Sequence[object]] | None = None,
) -> None:
    """Write the page; a file of that name is replaced only once the new one is complete.

    Args:
        path: The HTML file; missing folders are made.
        title: Heading.
        tiles: ``(label, value)`` of the summary.
        rows: The images; wrong decisions come first, then high scores.
        table: Lines of cells, the first one the header.
    """
    path = Path(path)
    ordered = sorted(rows, key=lambda item: (OUTCOMES.index(item.outcome), -item.pred_score, item.name))
    counts = Counter(item.outcome for item in rows)
    buttons = [_button("", f"all {len(rows)}"), *(_button(name, f"{name} {counts[name]}") for name in OUTCOMES if counts[name])]
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<dl class="tiles">' + "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in tiles) + "</dl>",
        _table(table) if table else "",
        f'<nav aria-label="Filter">{"".join(buttons)}</nav>' if rows else "<p>No images.</p>",
        *map(_article, ordered),
    ]
    # The body first: it comes after the place of the title, and so may hold any text.
    page = PAGE.replace("{body}", "\n".join(filter(None, parts)), 1).replace("{title}", escape(title), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Names of files need not be valid Unicode.
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _text(value: object) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _button(outcome: str, text: str) -> str:
    return f'<button type="button" data-show="{outcome}" aria-pressed="{"false" if outcome else "true"}">{text}</button>'


def _table(table: Sequence[Sequence[object]]) -> str:
    head, *body = table
    lines = ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in line) + "</tr>" for line in body]
    header = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _article(item: GalleryItem) -> str:
    name = escape(item.name)
    verdict = "reject" if item.pred_label else "accept"
    facts = [f"score {item.pred_score:.3f}", f"p {item.p_value:.3g}", f"step {item.step}"]
    if item.gt_label is not None:
        facts.append(f"truth {'anomalous' if item.gt_label else 'normal'}: {item.outcome}")
    figures = "".join(
        f'<figure><img loading="lazy" alt="{escape(title)}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, data in item.pictures
    )
    wrong = " wrong" if item.outcome in {"missed", "false alarm"} else ""
    return (
        f'<article class="item{wrong}" data-outcome="{item.outcome}"><header><b class="{verdict}">{verdict}</b>'
        f'<h2>{name}</h2><p>{" &middot; ".join(facts)}</p></header><div class="pictures">{figures}</div></article>'
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --back: #f5f6f8; --card: #fff; --text: #1c1f24; --soft: #5c6470; --line: #d9dde3;
  --good: #167a44; --bad: #ba2228; }
@media (prefers-color-scheme: dark) { :root { --back: #15171b; --card: #1f2228; --text: #e8eaee; --soft: #a0a8b4; --line: #363b44; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; font: 15px/1.45 system-ui, sans-serif;
  background: var(--back); color: var(--text); }
h1 { font-size: 1.5rem; margin: .5rem 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 0 0 1rem; }
.tiles div, .item, table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tiles div { padding: .6rem .8rem; }
dt, figcaption, .item p { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: 1rem; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 1rem; padding: .2rem .8rem;
  cursor: pointer; }
button[aria-pressed=true] { background: var(--text); color: var(--back); }
.item { padding: .8rem; margin-bottom: .8rem; }
.item.wrong { border-left: .35rem solid var(--bad); }
.item[hidden] { display: none; }
.item header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .8rem; margin-bottom: .5rem; }
.item h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.item p { margin: 0; font-variant-numeric: tabular-nums; }
.item b { color: #fff; border-radius: .3rem; padding: .05rem .5rem; background: var(--good); }
.item b.reject { background: var(--bad); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 16rem)); gap: .6rem; }
figure { margin: 0; }
img { width: 100%; border-radius: .3rem; display: block; }
</style>
</head>
<body>
{body}
<script>
const buttons = document.querySelectorAll("button[data-show]");
for (const button of buttons) button.onclick = () => {
  for (const other of buttons) other.setAttribute("aria-pressed", other === button);
  for (const item of document.querySelectorAll(".item"))
    item.hidden = button.dataset.show !== "" && item.dataset.outcome !== button.dataset.show;
};
</script>
</body>
</html>
"""
