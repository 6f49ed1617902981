"""Counting above thresholds, areas and thinning."""

from __future__ import annotations

import numpy as np
import pytest

from gladad.metrics import curves
from gladad.metrics.curves import area_until, counts_above, thinned


@pytest.mark.parametrize("worth", [0, 10**9])
@pytest.mark.parametrize("bins", [2**4, 2**22])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("scale", [3, 1000, 1e-3])
def test_counts_are_exact_binned_or_not(monkeypatch, worth, bins, dtype, scale):
    monkeypatch.setattr(curves, "WORTH_BINNING", worth)
    monkeypatch.setattr(curves, "BINS", bins)
    rng = np.random.default_rng(0)
    values = (rng.normal(size=3000) * scale).astype(dtype)
    thresholds = np.unique(np.concatenate([values[::50], (rng.normal(size=30) * scale).astype(dtype)]))[::-1]
    above, at = counts_above(values, thresholds)
    assert above.tolist() == [int((values > t).sum()) for t in thresholds]
    assert at.tolist() == [int((values >= t).sum()) for t in thresholds]


@pytest.mark.parametrize("thresholds", [[0.5], [3e38, -3e38], [1e-45, 0.0], [2.0, 1.0]])
def test_counts_at_awkward_thresholds(monkeypatch, thresholds):
    monkeypatch.setattr(curves, "WORTH_BINNING", 0)
    values = np.array([0.5, 0.5, -3e38, 0.0, 1e-45, 3e38, 1.0, 7.0], np.float32)
    limits = np.array(thresholds, np.float32)
    above, at = counts_above(values, limits)
    assert above.tolist() == [int((values > t).sum()) for t in limits]
    assert at.tolist() == [int((values >= t).sum()) for t in limits]


def test_area_is_interpolated_at_the_limit():
    x, y = np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.5, 1.0])
    assert area_until(x, y, 0.5) == pytest.approx(0.5 * (0.5 + 0.75) / 2)
    assert area_until(x, y, 1.0) == pytest.approx(0.75)
    assert area_until(x + 2, y, 1.0) == 0.0


def test_thinning_keeps_the_ends_and_stays_close():
    x = np.linspace(0, 1, 5000)
    y = np.sqrt(x)
    few_x, few_y = thinned(x, y, 100)
    assert len(few_x) <= 100
    assert (few_x[0], few_x[-1]) == (0, 1)
    assert np.abs(np.interp(x, few_x, few_y) - y).max() < 2 / 99
    same = thinned(x[:50], y[:50], 100)
    assert len(same[0]) == 50
