"""Pictures and the gallery page."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gladad.gallery import GalleryItem, gallery_item, write_gallery
from gladad.types import Prediction, Region
from gladad.visualization import COLOURS, GREEN, RED, decision_text, heatmap, overlay, panel, thumbnail

VOID = {"meta", "img", "br", "link", "input"}


def predicted(size: tuple[int, int] = (40, 60), score: float = 1.5, rebuilt: bool = True) -> Prediction:
    anomaly_map = np.zeros(size, np.float32)
    anomaly_map[5:12, 8:20] = score
    return Prediction(
        pred_score=score,
        p_value=0.0123,
        pred_label=score > 1,
        step=350,
        anomaly_map=anomaly_map,
        pred_mask=anomaly_map > 1,
        regions=(Region((8, 5, 20, 12), 84, score),) if score > 1 else (),
        image_size=size,
        reconstruction=np.full((*size, 3), 90, np.uint8) if rebuilt else None,
        image_path=Path("parts/a.png"),
    )


def grey(size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.full((*size, 3), 128, np.uint8)


def test_colours_grow_lighter_evenly():
    luminance = COLOURS @ np.array([0.2126, 0.7152, 0.0722])
    assert COLOURS.shape == (256, 3)
    assert (np.diff(luminance) > -0.5).all()
    assert luminance[0] < 5
    assert luminance[-1] > 230


def test_heatmap_ends():
    colours = heatmap(np.array([[-1.0, 0.0, 1.0, 2.0, 9.0, np.nan, np.inf]]))
    assert (colours.shape, colours.dtype) == ((1, 7, 3), np.uint8)
    assert colours[0, 0].tolist() == colours[0, 1].tolist() == colours[0, 5].tolist() == COLOURS[0].tolist()
    assert colours[0, 3].tolist() == colours[0, 4].tolist() == colours[0, 6].tolist() == COLOURS[255].tolist()
    np.testing.assert_array_equal(heatmap(np.array([[3.0]]), vmax=6.0), heatmap(np.array([[1.0]])))


def test_overlay_shows_the_plain_image_where_nothing_is_wrong():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    before = pixels.copy()
    np.testing.assert_array_equal(overlay(pixels, np.full((30, 20), 0.5)), pixels)
    shown = overlay(pixels, np.linspace(0, 2, 600).reshape(30, 20))
    np.testing.assert_array_equal(shown[:7], pixels[:7])
    assert (shown[-5:] != pixels[-5:]).any()
    np.testing.assert_array_equal(pixels, before)


def test_overlay_draws_outlines_and_boxes():
    mask = np.zeros((30, 30), bool)
    mask[10:20, 10:20] = True
    mask[0:3, 0:30] = True
    shown = overlay(grey((30, 30)), np.zeros((30, 30)), mask, [Region((22, 22, 30, 30), 64, 2.0)])
    changed = (shown != 128).any(axis=2)
    assert changed[10, 10:20].all()
    assert changed[10:20, 19].all()
    assert changed[0, :].all()  # a mask that touches the border is closed there
    assert not changed[11:19, 11:19].any()
    assert changed[22, 22:].all()
    assert changed[29, 22:].all()
    assert not changed[23:29, 23:29].any()


def test_overlay_of_other_sizes_is_refused():
    for arrays in ((np.zeros((4, 5)),), (np.zeros((40, 60)), np.zeros((4, 5), bool))):
        with pytest.raises(ValueError, match="sizes differ"):
            overlay(grey(), *arrays)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((40, 60), 30, (20, 30)), ((60, 40), 30, (30, 20)), ((40, 60), 100, (40, 60)), ((10, 4000), 100, (1, 100))],
)
def test_thumbnail_sizes(size, side, expected):
    assert thumbnail(grey(size), side).shape == (*expected, 3)


@pytest.mark.parametrize("size", [(40, 60), (600, 500), (8, 400), (400, 8), (8, 8)])
@pytest.mark.parametrize("score", [0.4, 1.5])
@pytest.mark.parametrize("rebuilt", [True, False])
def test_panel(size, score, rebuilt):
    picture = panel(predicted(size, score, rebuilt), grey(size), "a very long caption / with 日本語 and ü\nand a line " * 9)
    assert picture.mode == "RGB"
    assert 400 <= picture.width <= 3 * 320 + 4 * 8
    assert picture.height <= 320 + 120
    assert picture.getpixel((picture.width - 2, picture.height - 3)) == (RED if score > 1 else GREEN)


def test_decision_text():
    assert decision_text(predicted(score=1.5)) == "REJECT   score 1.50 (limit 1.00)   p = 0.0123   step 350"
    assert decision_text(predicted(score=0.25)).startswith("ACCEPT   score 0.25")


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

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def items() -> list[GalleryItem]:
    found, fine = predicted(score=1.5), predicted(score=0.4)
    return [
        gallery_item(fine, grey(), "passed.png", 0),
        gallery_item(found, grey(), "found.png", 1, found.pred_mask),
        gallery_item(predicted(score=3.0, rebuilt=False), grey(), "alarm.png", 0),
        gallery_item(fine, grey(), "missed.png", 1),
        gallery_item(found, grey()),
    ]


def test_gallery_is_one_self_contained_page(tmp_path):
    path = tmp_path / "deep/er/report.html"
    write_gallery(path, "Bottle", [("image AUROC", 0.98765), ("images", 5)], items(), [("kind", "n"), ("broken", 3), ("good", 2)])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in {"src", "href"}]
    assert len(links) == 4 * 3 + 2
    for link in links:
        assert link is not None
        head, data = link.split(",", 1)
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (60, 40)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object"}
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    for expected in ("Bottle", "0.9877", "broken", "reject", "accept", "score 1.500", "p 0.0123", "step 350", "false alarm 1", "all 5"):
        assert any(expected in piece for piece in page.texts), expected
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_gallery_shows_wrong_decisions_first(tmp_path):
    write_gallery(tmp_path / "a.html", "t", [], items())
    page = Page((tmp_path / "a.html").read_text())
    outcomes = [attrs["data-outcome"] for tag, attrs in page.tags if tag == "article"]
    assert outcomes == ["missed", "false alarm", "rejected", "found", "passed"]
    shown = [attrs["data-show"] for tag, attrs in page.tags if tag == "button"]
    assert shown == ["", *outcomes]


def test_gallery_escapes_everything(tmp_path):
    nasty = "<script>alert('x')</script>&\"{body}{title}"
    item = gallery_item(predicted(), grey(), nasty)
    write_gallery(tmp_path / "a.html", nasty, [(nasty, nasty)], [item], [(nasty,), (nasty,)])
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "alert('x')" not in text
    assert sum(piece == nasty for piece in page.texts) == 7  # title, heading, tile twice, table twice, image
    assert [tag for tag, _ in page.tags].count("article") == 1


def test_gallery_without_images_and_with_odd_names(tmp_path):
    write_gallery(tmp_path / "a.html", "Nothing", [], [])
    assert "No images." in Page((tmp_path / "a.html").read_text()).texts
    write_gallery(tmp_path / "a.html", "Odd", [], [gallery_item(predicted(), grey(), "bad\udcff.png")])
    assert "bad?.png" in Page((tmp_path / "a.html").read_text()).texts


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_gallery(path, "t", [], [])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_thumbnails_of_the_page_are_small():
    item = gallery_item(predicted((900, 1200)), grey((900, 1200)), side=128)
    for _, data in item.pictures:
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (128, 96)
