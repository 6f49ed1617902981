"""Heat maps, overlays and thumbnails."""

from __future__ import annotations

import numpy as np
import pytest

from gladad.core.records import Region
from gladad.report.pictures import COLOURS, heatmap, overlay, thumbnail


def grey(size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.full((*size, 3), 128, np.uint8)


def test_colours_grow_lighter_evenly():
    luminance = COLOURS @ np.array([0.2126, 0.7152, 0.0722])
    assert COLOURS.shape == (256, 3)
    assert (np.diff(luminance) > -0.5).all()
    assert luminance[0] < 5
    assert luminance[-1] > 230


def test_heatmap_ends():
    colours = heatmap(np.array([[-1.0, 0.0, 1.0, 2.0, 9.0, np.inf]]))
    assert (colours.shape, colours.dtype) == ((1, 6, 3), np.uint8)
    assert colours[0, 0].tolist() == colours[0, 1].tolist() == COLOURS[0].tolist()
    assert colours[0, 3].tolist() == colours[0, 4].tolist() == colours[0, 5].tolist() == COLOURS[255].tolist()
    assert colours[0, 2].tolist() == COLOURS[128].tolist()


def test_what_is_no_number_does_not_look_normal():
    values = np.zeros((40, 60))
    values[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        overlay(grey(), values)


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
