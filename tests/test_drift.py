"""The promises of drift detection, by simulation; the delay of its alarm; and that a restart changes nothing."""

from __future__ import annotations

import json
import math
from itertools import islice, pairwise

import numpy as np
import pytest
from scipy import ndimage, stats

from gladad.core.errors import ConfigError, DataError, GladError, ModelFormatError, NotFiniteError
from gladad.decision.conformal import calibrate, conformal_threshold
from gladad.decision.drift import MAX_WAITING, Drift, appearance

LAWS = {
    "lognormal": lambda rng, count: rng.lognormal(size=count),
    "cauchy": lambda rng, count: rng.standard_cauchy(size=count),
    "ties": lambda rng, count: rng.integers(0, 4, size=count).astype(float),
}


def behind_threshold(law, n, rng, rate=0.1, **options):
    """The test of a new calibration whose threshold rejects good parts too."""
    scores = LAWS[law](rng, n)
    return Drift(scores.tolist(), conformal_threshold(scores.tolist(), rate).value, seed=int(rng.integers(1 << 30)), **options)


def feed(drift, scores, most=None):
    """Ranks of those that have one, of the first so many of them."""
    return list(islice((rank for score in scores if (rank := drift.update(score)) is not None), most))


def continued(drift, score):
    """The rank that a score would have now."""
    return Drift.from_json(json.loads(json.dumps(drift.to_json()))).update(score)


@pytest.mark.parametrize(("law", "n"), [("lognormal", 5), ("lognormal", 60), ("cauchy", 20), ("ties", 20)])
def test_ranks_are_independent_and_uniform_without_drift(law, n):
    rng = np.random.default_rng(7)
    rows = [feed(behind_threshold(law, n, rng, parts_per_false_alarm=1e9), LAWS[law](rng, 100), 20) for _ in range(400)]
    rows = [row for row in rows if len(row) == 20]
    assert len(rows) > 380
    ranks = np.array(rows)
    for column in (ranks[:, 0], ranks[:, 1], ranks[:, -1]):
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    # Ranks in a fixed reference would be uniform one by one, and vary together: the variance of a stream's mean tells.
    assert ranks.mean(axis=1).var() * 12 * 20 == pytest.approx(1, abs=4 * math.sqrt(2 / len(rows)))
    for left, right in ((0, 1), (0, -1), (9, 10)):
        assert abs(np.corrcoef(ranks[:, left], ranks[:, right])[0, 1]) < 4 / math.sqrt(len(rows))


@pytest.mark.parametrize(("law", "n"), [("lognormal", 4), ("lognormal", 100), ("ties", 30)])
def test_false_alarms_are_no_more_frequent_than_promised(law, n):
    rng = np.random.default_rng(11)
    streams, level, early = 200, 50, 20
    runs = []
    for _ in range(streams):
        drift = behind_threshold(law, n, rng, parts_per_false_alarm=level)
        while not drift.alarm and drift.count < 40 * level:
            feed(drift, LAWS[law](rng, 20))
        runs.append(drift.count)
    rate = early / level
    assert np.mean(np.array(runs) <= early) <= rate + 4 * math.sqrt(rate * (1 - rate) / streams)
    error = np.std(runs) / math.sqrt(streams)
    assert np.mean(runs) >= level - 4 * error
    assert np.mean(runs) <= 5 * level  # the promise is not kept by never raising an alarm


def test_no_alarm_comes_of_a_small_reference_in_a_long_run():
    rng = np.random.default_rng(3)
    drifts = [behind_threshold("lognormal", 30, rng) for _ in range(8)]
    for drift in drifts:
        feed(drift, rng.lognormal(size=6000))
    assert sum(drift.alarm for drift in drifts) <= 1  # at most 6 % each
    assert all(len(json.dumps(drift.to_json())) < 50_000 for drift in drifts)


@pytest.mark.parametrize(
    ("n", "before", "shift", "within"), [(100, 0, 1, 300), (100, 0, -1, 300), (20, 500, 1, 150), (20, 500, -1, 150), (400, 0, -2, 30)]
)
def test_a_shift_is_found_and_where_it_went(n, before, shift, within):
    rng = np.random.default_rng(5)
    for _ in range(10):
        drift = behind_threshold("lognormal", n, rng, rate=0.01)
        feed(drift, rng.lognormal(size=before))
        assert not drift.alarm
        feed(drift, rng.lognormal(mean=shift, size=within))
        assert drift.alarm and drift.evidence >= 1
        assert drift.direction == ("up" if shift > 0 else "down")


def test_a_long_normal_run_does_not_hide_a_later_shift_and_helps_a_small_reference():
    def delay(before):
        rng = np.random.default_rng(9)
        drift = behind_threshold("lognormal", 20, rng, rate=0.01)
        feed(drift, rng.lognormal(size=before))
        assert not drift.alarm
        start = drift.count
        feed(drift, rng.lognormal(mean=-1, size=1000))
        return drift.count - start if drift.alarm else math.inf

    assert delay(20_000) < 60 and delay(20_000) < delay(0)


def test_slow_drift_is_found():
    rng = np.random.default_rng(2)
    drift = behind_threshold("lognormal", 100, rng, rate=0.01)
    feed(drift, np.exp(rng.normal(size=4000) - np.linspace(0, 2, 4000)))
    assert drift.alarm and drift.direction == "down"


@pytest.mark.parametrize("learn", [0, 30])
@pytest.mark.parametrize("stop", [0, 10, 45, 200, 290])
def test_a_restart_changes_nothing(stop, learn):
    rng = np.random.default_rng(1)
    reference, scores = LAWS["ties"](rng, 25).tolist(), [*LAWS["ties"](rng, 200), *LAWS["ties"](rng, 100) // 2]
    whole = Drift(reference, 3.0, parts_per_false_alarm=1000, learn=learn, seed=5)
    ranks = feed(whole, scores)
    first = Drift(reference, 3.0, parts_per_false_alarm=1000, learn=learn, seed=5)
    before = feed(first, scores[:stop])
    second = Drift.from_json(json.loads(json.dumps(first.to_json())))
    assert second.to_json() == first.to_json() and second.direction == first.direction
    assert before + feed(second, scores[stop:]) == ranks and len(ranks) > 100
    assert second.to_json() == whole.to_json() and second.alarm is whole.alarm


def test_an_alarm_stays_and_nothing_changes_after_it():
    rng = np.random.default_rng(0)
    drift = behind_threshold("lognormal", 100, rng)
    feed(drift, rng.lognormal(mean=-2, size=100))
    state = drift.to_json()
    assert drift.alarm and drift.count < 100
    assert feed(drift, rng.lognormal(size=500)) == [] and drift.to_json() == state
    assert Drift.from_json(state).alarm


def test_ties_are_broken_at_random_and_nothing_else_is():
    drift = Drift([2.0] * 20 + [5.0] * 20, math.inf, parts_per_false_alarm=1e9)
    below, above = continued(drift, 1.9), continued(drift, 5.1)
    assert below < 1 / 20 and above > 19 / 20  # the end bins
    assert 0.4 < continued(drift, 3.0) < 0.6
    tied = feed(drift, [2.0, 5.0] * 400)
    low, high = np.array(tied[::2]), np.array(tied[1::2])
    assert low.max() < high.min() + 0.1
    assert stats.kstest(low, "uniform", args=(0, 0.5)).statistic < 0.1  # spread over all of their half
    assert stats.kstest(high, "uniform", args=(0.5, 0.5)).statistic < 0.1
    state = Drift(np.random.default_rng(0).normal(size=50).tolist())
    ranks = [continued(state, score) for score in np.linspace(-3, 3, 40)]
    assert all(first <= second + 1 / 20 for first, second in pairwise(ranks)) and ranks[-1] - ranks[0] > 0.9


def test_the_randomness_belongs_to_the_seed():
    scores = np.random.default_rng(4).lognormal(size=40).tolist()
    runs = [feed(Drift(scores[:20], seed=seed), scores[20:]) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_and_change_nothing(score):
    drift = Drift([1.0, 2.0, 3.0], 9.0)
    drift.update(1.5)
    state = drift.to_json()
    with pytest.raises(NotFiniteError, match="not finite"):
        drift.update(score)
    assert drift.to_json() == state


def test_scores_at_or_above_the_threshold_are_passed_over():
    drift = Drift([1.0, 2.0, 3.0, 4.0], 4.0)
    state = drift.to_json()
    assert drift.update(4.0) is None and drift.update(50.0) is None and drift.to_json() == state
    assert len(drift.to_json()["edges"]) == 3  # the threshold's own score is none of the reference
    assert drift.update(3.9) is not None and drift.count == 1


def test_the_first_parts_can_be_the_reference():
    rng = np.random.default_rng(8)
    scores = rng.lognormal(size=60)
    cross_fitted = calibrate(scores.tolist(), scores.tolist(), 0.05, cross_fitted=True)
    drift = Drift.for_calibration(cross_fitted, learn=150)
    assert drift.learning == 150
    feed(drift, 0.3 * rng.lognormal(size=1000))  # other models' scores have another scale, which is no drift
    assert drift.learning == 0 and not drift.alarm
    feed(drift, 0.1 * rng.lognormal(size=100))
    assert drift.alarm and drift.direction == "down"

    held_out = Drift.for_calibration(calibrate(scores.tolist(), scores.tolist(), 0.05))
    assert held_out.learning == 0
    feed(held_out, 0.3 * rng.lognormal(size=200))
    assert held_out.alarm


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (([1.0, 2.0],), {}, DataError),
        (([5.0] * 30, 5.0), {}, DataError),
        (([1.0, math.nan, 2.0, 3.0],), {}, DataError),
        (([1.0, 2.0, 3.0], math.nan), {}, ConfigError),
        (([1.0, 2.0, 3.0],), {"parts_per_false_alarm": 1}, ConfigError),
        (([1.0, 2.0, 3.0],), {"parts_per_false_alarm": math.inf}, ConfigError),
        (([1.0, 2.0, 3.0],), {"learn": -1}, ConfigError),
        (([1.0, 2.0, 3.0],), {"learn": MAX_WAITING}, ConfigError),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error):
    with pytest.raises(error):
        Drift(*arguments, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": "high"},
        {"edges": [[1.0, 0.5]]},
        {"edges": [[3.0, 0.5], [2.0, 0.5], [1.0, 0.5]]},
        {"weights": [0, 1, 1, 1]},
        {"before": [[9, 1, 1, 1]] * 6},
        {"worth": [math.nan] * 6},
        {"sums": [-1.0] * 6},
        {"count": -1},
        {"evidence": math.inf},
    ],
)
def test_states_that_were_not_written_are_refused(change):
    state = Drift([1.0, 2.0, 3.0]).to_json()
    assert Drift.from_json(state).to_json() == state
    with pytest.raises(ModelFormatError, match="drift"):
        Drift.from_json(state | change)
    for key in change:
        with pytest.raises(ModelFormatError, match=key):
            Drift.from_json({name: value for name, value in state.items() if name != key})


def scene(size=300):
    """A picture of smooth blobs with some grain."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.normal(size=(size, size, 3)), (3, 3, 0)) * 400 + rng.normal(size=(size, size, 3)) * 4
    return np.clip(110 + field, 0, 255).astype(np.uint8)


def test_appearance_tells_blur_from_light():
    pixels = scene()
    brightness, sharpness = appearance(pixels)
    assert brightness == pytest.approx(pixels.mean() / 255, abs=0.01)
    blurred = ndimage.gaussian_filter(pixels, (1.5, 1.5, 0))
    assert appearance(blurred)[1] < 0.5 * sharpness and appearance(blurred)[0] == pytest.approx(brightness, rel=0.02)
    darker = np.round(pixels * 0.7).astype(np.uint8)
    assert appearance(darker)[0] == pytest.approx(0.7 * brightness, rel=0.02)
    assert appearance(darker)[1] == pytest.approx(sharpness, rel=0.1)
    large = np.tile(pixels, (4, 5, 1))  # looked at in places only
    assert appearance(large) == pytest.approx((brightness, sharpness), rel=0.05)


def test_appearance_by_hand_and_at_the_ends():
    pixels = np.zeros((3, 4, 3), np.uint8)
    assert appearance(pixels) == (0, 0)
    pixels[1, 1] = 200
    # The two inner pixels: 200 less a mean of 0, and 0 less a mean of 50; their mean level is 100.
    assert appearance(pixels) == (pytest.approx(200 / 12 / 255), pytest.approx((200 + 50) / 2 / 100))
    assert appearance(np.full((9, 9, 3), 255, np.uint8)) == (1, 0)
    checks = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2).astype(np.uint8) % 2 * 255
    assert appearance(checks)[1] == pytest.approx(2)
    for wrong in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((2, 9, 3), np.uint8)):
        with pytest.raises(GladError, match="uint8"):
            appearance(wrong)
