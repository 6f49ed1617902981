"""Metrics of images against slow direct references, those of pixels against scikit-learn as well."""

from __future__ import annotations

import numpy as np
import pytest
from reference.slow_metrics import (
    regions_of,
    slow_aupimo,
    slow_aupro,
    slow_auroc,
    slow_average_precision,
    slow_f1_max,
    slow_pb2,
    slow_pg2,
)
from sklearn.metrics import average_precision_score, roc_auc_score

from gladad.metrics.image import (
    aupimo,
    aupro,
    auroc,
    average_precision,
    decisions,
    f1_max,
    image_curves,
    image_metrics,
    pb2,
    pg2,
    wilson_interval,
)
from gladad.metrics.pixel import PixelMetrics

CASES = [(seed, levels) for seed in range(6) for levels in (2, 5, 10_000)]


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_image_metrics_agree_with_their_definition_with_and_without_ties(seed, levels):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, 2, 60), [0, 1])
    scores = rng.integers(0, levels, 62) + labels * levels * 0.2
    assert auroc(scores, labels) == pytest.approx(slow_auroc(scores, labels), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(slow_average_precision(scores, labels), abs=1e-12)
    assert f1_max(scores, labels) == pytest.approx(slow_f1_max(scores, labels), abs=1e-12)
    assert image_metrics(scores, labels) == {
        "image_auroc": auroc(scores, labels),
        "image_ap": average_precision(scores, labels),
        "image_f1max": f1_max(scores, labels),
        "image_pg2": pg2(scores, labels),
        "image_pb2": pb2(scores, labels),
    }


def test_perfect_inverted_and_constant_scores():
    labels = [0, 0, 0, 1]
    assert set(image_metrics([1, 2, 3, 4], labels).values()) == {1.0}
    assert auroc([4, 3, 2, 1], labels) == 0.0
    constant = image_metrics([7, 7, 7, 7], labels)
    assert constant == pytest.approx({"image_auroc": 0.5, "image_ap": 0.25, "image_f1max": 0.4, "image_pg2": 0.0, "image_pb2": 0.0})


def test_f1_max_considers_flagging_everything():
    assert f1_max([0, 1], [1, 0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max, image_metrics])
def test_one_class_only_is_refused(metric, labels):
    with pytest.raises(ValueError, match="one class only"):
        metric([0.1, 0.2, 0.3], labels)


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max, pg2, pb2, image_curves])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0, 1, 2], [0, 1], "differ in shape"),
        ([0, np.nan], [0, 1], "finite"),
        ([0, np.inf], [0, 1], "finite"),
        ([0, 1], [-1, 1], "must be 0"),
        ([], [], "one class"),
    ],
)
def test_bad_input_is_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)


def collected(maps, masks) -> PixelMetrics:
    pixels = PixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        pixels.add(one, mask)
    return pixels


def pixel_metrics(maps, masks) -> dict[str, float]:
    return collected(maps, masks).compute().metrics


def random_maps(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 11)) > 0.75
    masks[1] = False
    return (rng.integers(0, levels, masks.shape) + masks * levels * 0.3).astype(np.float32), masks


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_aupro_agrees_with_the_slow_reference(seed, levels, max_fpr):
    maps, masks = random_maps(seed, levels)
    assert aupro(maps, masks, max_fpr) == pytest.approx(slow_aupro(maps, masks, max_fpr), abs=1e-12)


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_pixel_metrics_agree_with_the_single_ones(seed, levels):
    maps, masks = random_maps(seed, levels)
    got = pixel_metrics(maps, masks.astype(np.uint8))
    assert got["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert got["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)
    assert got["pixel_f1max"] == pytest.approx(slow_f1_max(maps.ravel(), masks.ravel().astype(int)), abs=1e-12)
    assert got["pixel_aupro"] == pytest.approx(aupro(maps, masks), abs=1e-12)
    assert got["pixel_aupro_05"] == pytest.approx(aupro(maps, masks, 0.05), abs=1e-12)
    assert got["pixel_aupimo"] == aupimo(maps, masks)


def test_flood_fill_joins_diagonals():
    assert sorted(map(len, regions_of(np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]])))) == [1, 1, 2]


def test_perfect_map_scores_one():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 1:3, 1:4] = masks[1, 5:, 5:] = True
    assert pixel_metrics(masks.astype(float), masks) == pytest.approx(
        dict.fromkeys(("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro", "pixel_aupro_05"), 1.0)
    )


def test_constant_map_is_chance():
    masks = np.zeros((2, 10, 10), bool)
    masks[0, :2, :5] = True
    got = pixel_metrics(np.full(masks.shape, 0.7, np.float32), masks)
    assert got["pixel_auroc"] == 0.5
    assert got["pixel_ap"] == pytest.approx(0.05)
    assert got["pixel_aupro"] == pytest.approx(0.15)  # the diagonal up to 0.3: 0.3 ** 2 / 2 / 0.3


def test_regions_count_the_same_whatever_their_area():
    masks = np.zeros((1, 10, 10), bool)
    masks[0, 0, 0] = masks[0, 5:, 5:] = True
    maps = np.zeros(masks.shape)
    maps[0, 0, 0] = 1  # found: the small region, and nothing else
    diagonal = 0.5 + 0.5 * 0.3 / 2
    assert aupro(maps, masks) == pytest.approx(diagonal)


def test_regions_do_not_connect_across_images():
    masks = np.zeros((2, 6, 6), bool)
    masks[:, 2:4, 2:4] = True
    maps = np.zeros(masks.shape)
    maps[0, 2:4, 2:4] = 2.0
    maps[1, 2, 2] = 2.0
    assert aupro(maps, masks) == pytest.approx(slow_aupro(maps, masks, 0.3))


@pytest.mark.parametrize(("seed", "levels"), CASES)
def test_aupimo_agrees_with_the_slow_reference(seed, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((6, 8, 9)) > 0.8
    masks[[1, 4, 5]] = False
    maps = (rng.integers(0, levels, masks.shape) + masks * levels * 0.6).astype(np.float32)
    for bounds in ((1e-5, 1e-4), (1e-3, 2e-2), (0.05, 1.0)):
        assert collected(maps, masks).aupimo(bounds) == pytest.approx(slow_aupimo(maps, masks, bounds), abs=1e-10)
        assert aupimo(maps, masks, bounds) == pytest.approx(np.mean(slow_aupimo(maps, masks, bounds)), abs=1e-10)


def test_aupimo_of_known_cases():
    masks = np.zeros((3, 10, 10), bool)
    masks[0, :2], masks[1, 3:] = True, True
    assert aupimo(masks.astype(float), masks) == 1.0
    assert aupimo(1 - masks.astype(float), masks) == 0.0
    half = masks.astype(float)
    half[0, 1] = -1  # half of the first defect is below everything normal
    assert collected(half, masks).aupimo() == (0.5, 1.0)


def test_aupimo_needs_normal_and_anomalous_images():
    maps, masks = np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool)
    with pytest.raises(ValueError, match="at least one normal and one anomalous"):
        aupimo(maps, masks)
    with pytest.raises(ValueError, match="at least one normal and one anomalous"):
        aupimo(maps, masks | np.eye(4, dtype=bool))
    masks[0, 0, 0] = True
    with pytest.raises(ValueError, match="fpr_bounds"):
        aupimo(maps, masks, (0.1, 0.1))


@pytest.mark.parametrize(("normal", "anomalous", "levels"), [(7, 60, 1000), (130, 9, 1000), (101, 149, 12), (50, 50, 3)])
def test_pg2_and_pb2_agree_with_trying_every_threshold(normal, anomalous, levels):
    rng = np.random.default_rng(normal)
    labels = np.repeat([0, 1], [normal, anomalous])
    scores = rng.integers(0, levels, len(labels)) + labels * levels * 0.3
    assert pg2(scores, labels) == slow_pg2(scores, labels)
    assert pb2(scores, labels) == slow_pb2(scores, labels)


def test_image_curves_end_where_they_must_and_carry_the_area():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    scores = rng.normal(size=3000) + labels
    curves = image_curves(scores, labels)
    x, y = curves["roc"]["x"], curves["roc"]["y"]
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert len(x) <= 200
    assert np.trapezoid(y, x) == pytest.approx(auroc(scores, labels), abs=0.01)
    assert curves["pr"]["x"][-1] == 1
    assert curves["pr"]["y"][-1] == pytest.approx(labels.mean(), abs=1e-6)


def test_decisions_per_defect_type():
    rows = decisions([1, 0, 1, 1, 0], [True, False, False, True, True], ["scratch", "good", "scratch", "dent", "good"])
    assert [tuple(row.values())[:5] for row in rows] == [
        ("good", False, 2, 1, 0.5),
        ("dent", True, 1, 1, 1.0),
        ("scratch", True, 2, 1, 0.5),
    ]
    assert list(rows[0]) == ["defect_type", "anomalous", "count", "rejected", "rate", "low", "high"]
    assert (rows[0]["low"], rows[0]["high"]) == wilson_interval(1, 2)


def test_undefined_pixel_metrics_are_refused():
    maps = np.zeros((1, 4, 4))
    for masks in (np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool)):
        with pytest.raises(ValueError, match="one class only"):
            pixel_metrics(maps, masks)
    some = np.eye(4, dtype=bool)
    with pytest.raises(ValueError, match=r"must be \[N, H, W\]"):
        aupro(maps[0], some)
    with pytest.raises(ValueError, match="differ in shape"):
        aupro(maps, some)
    with pytest.raises(ValueError, match="max_fpr"):
        aupro(maps, some[None], 0.0)


def test_wilson_interval_of_known_values():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    for successes, trials in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(successes, trials)
