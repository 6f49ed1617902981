"""The collector of pixel metrics: slices, files, order, types."""

from __future__ import annotations

import numpy as np
import pytest
from reference.slow_metrics import slow_aupimo, slow_aupro, slow_f1_max
from sklearn.metrics import average_precision_score, roc_auc_score

from gladad.metrics.pixel import NAMES, SLICE, PixelMetrics


def some(seed: int, count: int = 7, levels: int = 40, dtype: type = np.float32) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps and masks of several sizes, with ties."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for index in range(count):
        shape = (10 + index % 3, 14)
        mask = rng.random(shape) > (0.85 if index % 3 else 1)
        maps.append((rng.integers(0, levels, shape) + mask * levels * 0.4).astype(dtype))
        masks.append(mask)
    return maps, masks


def collect(maps, masks, slice_size=SLICE) -> PixelMetrics:
    collected = PixelMetrics(slice_size)
    for one, mask in zip(maps, masks, strict=True):
        collected.add(one, mask)
    return collected


@pytest.mark.parametrize("levels", [1, 3, 40, 10_000])
@pytest.mark.parametrize("size", [10, 97, SLICE])
def test_slices_of_any_size_give_the_metrics_by_definition(size, levels):
    maps, masks = some(levels, 6, levels)
    maps, masks = [one[:10] for one in maps], [one[:10] for one in masks]
    result = collect(maps, masks, size).compute()
    values, truth = np.stack(maps), np.stack(masks)
    assert set(result.metrics) == set(NAMES)
    assert result.metrics["pixel_auroc"] == pytest.approx(roc_auc_score(truth.ravel(), values.ravel()), abs=1e-12)
    assert result.metrics["pixel_ap"] == pytest.approx(average_precision_score(truth.ravel(), values.ravel()), abs=1e-12)
    assert result.metrics["pixel_f1max"] == pytest.approx(slow_f1_max(values.ravel(), truth.ravel().astype(int)), abs=1e-12)
    assert result.metrics["pixel_aupro"] == pytest.approx(slow_aupro(values, truth, 0.3), abs=1e-12)
    assert result.metrics["pixel_aupro_05"] == pytest.approx(slow_aupro(values, truth, 0.05), abs=1e-12)
    assert result.aupimo == pytest.approx(slow_aupimo(values, truth, (1e-5, 1e-4)), abs=1e-12)
    assert result.metrics["pixel_aupimo"] == pytest.approx(np.mean(result.aupimo))


def test_the_order_of_images_does_not_change_a_bit():
    maps, masks = some(1)
    forth, back = collect(maps, masks, 150).compute(), collect(maps[::-1], masks[::-1], 150).compute()
    assert forth.metrics.keys() == back.metrics.keys() and forth.pro == back.pro
    assert all(forth.metrics[name] == back.metrics[name] for name in NAMES if name != "pixel_aupimo")
    assert forth.metrics == pytest.approx(back.metrics, abs=1e-12)


def test_more_can_be_added_after_computing():
    maps, masks = some(3, 6)
    collected = collect(maps[:3], masks[:3])
    collected.compute()
    for one, mask in zip(maps[3:], masks[3:], strict=True):
        collected.add(one, mask)
    assert collected.compute() == collect(maps, masks).compute()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.uint8, np.int64])
def test_types_of_maps(dtype):
    maps, masks = some(4, levels=90, dtype=dtype)
    values = np.concatenate([one.ravel() for one in maps]).astype(np.float64)
    truth = np.concatenate([mask.ravel() for mask in masks])
    assert collect(maps, masks).compute().metrics["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)


def test_double_precision_is_kept():
    collected = PixelMetrics()
    collected.add(np.array([[1.0, 1.0 + 1e-12]]), np.array([[0, 1]]))
    collected.add(np.zeros((1, 2), np.float32), np.zeros((1, 2)))
    assert collected.compute().metrics["pixel_auroc"] == 1.0


def test_the_curve_carries_the_area():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 60, 60), bool)
    masks[:2, 10:20, 10:30] = True
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    result = collect(maps, masks).compute()
    x, y = result.pro["x"], result.pro["y"]
    assert len(x) == len(y) <= 200
    assert x == sorted(x) and x[-1] == 0.3
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(result.metrics["pixel_aupro"], abs=0.02)


def test_what_is_refused():
    collected = PixelMetrics()
    with pytest.raises(ValueError, match=r"\[H, W\]"):
        collected.add(np.zeros(3), np.zeros(3))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            collected.add(np.full((2, 2), value), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="labels must be 0"):
        collected.add(np.zeros((2, 2)), np.full((2, 2), 255))
    with pytest.raises(ValueError, match="one class only"):
        collected.compute()


def test_the_file_goes_when_the_block_ends():
    with PixelMetrics() as collected:
        collected.add(np.zeros((2, 2)), np.eye(2))
        file = collected._file
    assert file.closed
