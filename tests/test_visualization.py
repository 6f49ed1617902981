"""Heat maps, overlays, panels and thumbnails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gladad.core.records import Prediction, Region
from gladad.report.pictures import COLOURS, GREEN, RED, decision_text, heatmap, overlay, panel, thumbnail


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
