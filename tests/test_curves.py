"""Corners, areas and the points that are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from gladad.metrics.curves import area_until, corners, curve_points


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_corners_count_what_is_above_each_score_and_with_it(levels, dtype):
    rng = np.random.default_rng(levels)
    normal, anomalous = rng.integers(0, levels, 300).astype(dtype), np.sort(rng.integers(0, levels, 90).astype(dtype))[::-1]
    weights = rng.random(90)
    fp, tp, overlap = corners(normal, anomalous, weights)
    distinct = sorted(set(anomalous.tolist()), reverse=True)
    flags = [flag for score in distinct for flag in ((np.greater, score), (np.greater_equal, score))]
    assert fp.tolist() == [int(flag(normal, score).sum()) for flag, score in flags]
    assert tp.tolist() == [int(flag(anomalous, score).sum()) for flag, score in flags]
    assert overlap == pytest.approx([weights[flag(anomalous, score)].sum() for flag, score in flags])


def test_area_is_interpolated_at_the_limit():
    x, y = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.5, 1.0])
    assert area_until(x, y, 0.5) == pytest.approx(0.5 * (0.5 + 0.75) / 2)
    assert area_until(x, y, 1.0) == pytest.approx(0.75)
    assert area_until(x + 2, y, 1.0) == 0.0


def test_the_points_of_a_curve_keep_its_ends_and_stay_close():
    x = np.linspace(0, 1, 5000)
    y = np.sqrt(x)
    few = curve_points(x, y, 100)
    assert len(few["x"]) == len(few["y"]) <= 100
    assert (few["x"][0], few["x"][-1]) == (0, 1)
    assert np.abs(np.interp(x, few["x"], few["y"]) - y).max() < 2 / 99
    assert curve_points(x[:3], y[:3]) == {"x": [0.0, 0.0002, 0.0004], "y": [0.0, 0.014144, 0.020002]}
