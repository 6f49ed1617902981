"""The promise of the threshold, by simulation, and the arithmetic behind it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.decision.conformal import Calibration, Threshold, calibrate, conformal_threshold, images_to_hold_out, required_images


@pytest.mark.parametrize("draw", ["lognormal", "standard_cauchy", "integers"])
@pytest.mark.parametrize(("rate", "count"), [(0.1, 9), (0.1, 40), (0.05, 19), (0.2, 7)])
def test_good_parts_are_rejected_no_more_often_than_asked_for(draw, rate, count):
    rng = np.random.default_rng(7)
    trials = 4000
    make = {
        "lognormal": lambda: rng.lognormal(size=(trials, count + 1)),
        "standard_cauchy": lambda: rng.standard_cauchy(size=(trials, count + 1)),
        "integers": lambda: rng.integers(0, 5, size=(trials, count + 1)).astype(float),  # ties
    }[draw]()
    thresholds = [conformal_threshold(row[:-1], rate) for row in make]
    assert {threshold.method for threshold in thresholds} == {"conformal"}
    rejected = np.mean([row[-1] > threshold.value for row, threshold in zip(make, thresholds, strict=True)])
    assert rejected <= rate + 4 * math.sqrt(rate * (1 - rate) / trials)
    if draw != "integers":  # without ties the rate is known, and the threshold wastes no more than it must
        exact = 1 - math.ceil((count + 1) * (1 - rate) - 1e-9) / (count + 1)
        assert rejected == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / trials))


@pytest.mark.parametrize(
    ("count", "rate", "rank"),
    [(99, 0.01, 99), (100, 0.01, 100), (199, 0.01, 198), (9, 0.1, 9), (19, 0.1, 18), (120, 0.05, 115), (10, 0.5, 6)],
)
def test_the_threshold_is_the_score_of_the_conformal_rank(count, rate, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    threshold = conformal_threshold(scores, rate)
    assert (threshold.value, threshold.method, threshold.n) == (rank, "conformal", count)


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.2, 4), (0.5, 1), (0.001, 999), (0.03, 33)])
def test_needed_images(rate, needed):
    assert required_images(rate) == needed
    enough = max(needed, 4)
    assert conformal_threshold(np.arange(1.0, enough + 1), rate).method == "conformal"
    threshold = conformal_threshold(np.arange(1.0, enough + 1), rate)
    assert threshold.promised_rate == pytest.approx(rate) and "would need" not in threshold.statement


@pytest.mark.parametrize(
    ("images", "rate", "held_out"),
    [
        (54, 0.01, 11),  # a fifth, with the best promise it allows
        (298, 0.01, 98),  # what leaves 200 to learn from
        (299, 0.01, 99),
        (520, 0.01, 99),  # a fifth is 104, of which one is rejected as of 99
        (599, 0.01, 199),  # two of 200, where 400 are left
        (1000, 0.01, 199),
        (5000, 0.01, 299),
        (520, 0.05, 99),  # so that another rate needs no other fit
        (100, 0.05, 20),
        (16, 0.5, 3),
        (398, 0.005, 198),
        (700, 0.005, 199),
    ],
)
def test_as_many_are_held_out_as_the_rate_uses(images: int, rate: float, held_out: int) -> None:
    assert images_to_hold_out(images, rate) == held_out
    if held_out >= 99:  # then the rate is all used: of n + 1 images, a whole number is rejected
        scores = list(map(float, range(1, held_out + 1)))
        above = 1 + sum(score > conformal_threshold(scores, rate).value for score in scores)
        assert above == pytest.approx(max(1, rate * (held_out + 1)))


def test_too_few_images_give_the_best_promise_that_they_can():
    rng = np.random.default_rng(7)
    thresholds = []
    rows = rng.lognormal(size=(4000, 42))
    for row in rows:
        thresholds.append(conformal_threshold(row[:-1], 0.01))
    threshold = thresholds[0]
    assert (threshold.method, threshold.n, threshold.needed) == ("conformal", 41, 99)
    assert threshold.promised_rate == pytest.approx(1 / 42)
    assert threshold.statement.startswith("at most 2.38% of good parts like the 41") and "1.00% would need 99" in threshold.statement
    rejected = np.mean([row[-1] > found.value for row, found in zip(rows, thresholds, strict=True)])
    assert rejected == pytest.approx(1 / 42, abs=4 * math.sqrt(1 / 42 / 4000))  # kept, and no more careful than it must be


@pytest.mark.parametrize(("count", "rate"), [(11, 0.01), (99, 0.01), (199, 0.01), (60, 0.2), (299, 0.5), (2300, 0.1)])
def test_the_rate_of_one_draw_of_held_out_images_lies_where_it_says_nine_times_of_ten(count, rate):
    rows = np.random.default_rng(1).uniform(size=(4000, count))  # the share of good parts above a score is 1 - score
    rates = 1 - np.array([conformal_threshold(row, rate).value for row in rows])
    low, high = conformal_threshold(rows[0], rate).likely_rates
    assert np.mean(rates < low) == pytest.approx(0.05, abs=0.015) and np.mean(rates > high) == pytest.approx(0.05, abs=0.015)
    assert f"with nine draws of ten the rate lies between {low:.2%} and {high:.2%}" in conformal_threshold(rows[0], rate).statement


def test_scores_that_do_not_vary():
    assert conformal_threshold([2.0] * 10, 0.01).value == pytest.approx(2.0)


def test_a_lower_rate_never_lowers_the_threshold():
    scores = np.random.default_rng(3).lognormal(size=150)
    values = [conformal_threshold(scores, rate).value for rate in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001)]
    assert values == sorted(values)


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.51, 1.0, math.nan])
def test_rates_that_make_no_sense(rate):
    with pytest.raises(ConfigError, match="false_reject_rate"):
        conformal_threshold([1.0, 2.0, 3.0, 4.0], rate)


def test_too_few_scores():
    with pytest.raises(DataError, match="at least 4 held-out"):
        conformal_threshold([1.0, 2.0, 3.0], 0.1)


def test_p_values():
    calibration = calibrate([3.0, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0], 0.2)
    assert calibration.scores == (1.0, 2.0, 2.0, 3.0)
    for score, expected in [(0.0, 1.0), (1.0, 1.0), (1.5, 4 / 5), (2.0, 4 / 5), (2.1, 2 / 5), (3.0, 2 / 5), (3.1, 1 / 5)]:
        assert calibration.p_value(score) == pytest.approx(expected)


def test_p_values_are_in_range_and_valid():
    rng = np.random.default_rng(11)
    scores = rng.lognormal(size=(3000, 31))
    values = np.array([calibrate(row[:-1], row[:-1], 0.1).p_value(row[-1]) for row in scores])
    assert values.min() > 0 and values.max() <= 1
    for level in (0.05, 0.1, 0.3, 0.7):
        assert np.mean(values <= level) <= level + 4 * math.sqrt(level * (1 - level) / len(values))


def test_threshold_and_p_value_agree():
    scores = np.random.default_rng(5).lognormal(size=199)
    calibration = calibrate(scores, scores, 0.01)
    for score in [*scores, calibration.threshold.value + 1e-9]:
        assert (score > calibration.threshold.value) == (calibration.p_value(score) <= 0.01)


def test_json_round_trip():
    calibration = calibrate([1.0, 2.0, 3.0, 5.0, 4.0], [2.0, 3.0, 1.0, 4.0, 6.0], 0.25, cross_fitted=True)
    stored = json.loads(json.dumps(calibration.to_json()))
    assert Calibration.from_json(stored) == calibration
    assert stored["statement"] == calibration.threshold.statement
    assert calibration.pixel_threshold == 6.0


@pytest.mark.parametrize(
    "damage",
    [{"scores": None}, {"threshold": {"value": 1.0}}, {"pixel_threshold": "high"}, {"scores": ["a"]}, {"threshold": 3}],
)
def test_damaged_json(damage):
    stored = calibrate([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], 0.2).to_json() | damage
    with pytest.raises(ModelFormatError, match=r"calibration\.json"):
        Calibration.from_json(stored)


def test_missing_key():
    stored = calibrate([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], 0.2).to_json()
    del stored["scores"]
    with pytest.raises(ModelFormatError, match="scores"):
        Calibration.from_json(stored)


def test_thresholds_are_values():
    assert Threshold(1.0, 0.1, 9, "conformal", 9) == conformal_threshold([1.0] * 9, 0.1)
