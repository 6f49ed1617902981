"""Harmless changes that a fit is told to tolerate."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, draw_part

from gladad.algorithm import top_k_mean
from gladad.core.errors import ConfigError
from gladad.data.corruptions import SHIFTS
from gladad.data.tolerance import GROUPS, VARIANTS, variant, variants, versions
from gladad.decision.drift import Drift
from gladad.detector.glad import Glad
from gladad.models.feature_diffusion.training import _usual_level
from gladad.models.registry import make_settings

PIXELS = np.asarray(draw_part(3)[0])
NARROW = TINY | {"training.steps": 15, "training.batch_size": 8, "widths": [32, 32]}


def test_every_group_is_of_shifts_that_exist_and_none_is_in_two():
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(SHIFTS)


@pytest.mark.parametrize("group", GROUPS)
def test_a_variant_is_milder_than_severity_one(group):
    for seed in range(12):
        found = variant(PIXELS, [group], np.random.default_rng(seed))
        assert found.shape == PIXELS.shape and found.dtype == np.uint8
        assert np.array_equal(found, variant(PIXELS, [group], np.random.default_rng(seed)))
    changes = [np.abs(variant(PIXELS, [group], np.random.default_rng(seed)).astype(float) - PIXELS).mean() for seed in range(40)]
    worst = max(
        np.abs(SHIFTS[name][0](PIXELS, SHIFTS[name][1][0], np.random.default_rng(seed)).astype(float) - PIXELS).mean()
        for name in GROUPS[group]
        for seed in range(8)
    )
    assert 0 < np.mean(changes) < max(changes) < 1.3 * worst


def test_every_image_is_varied_by_every_group_where_there_are_few():
    groups = ["light", "noise", "focus"]
    found = list(variants([PIXELS] * 4, groups, 0))
    assert [number for _, number in found] == [0, 1, 2, 3] * 3
    assert len({pixels.tobytes() for pixels, _ in found}) > 8  # the mildest blur leaves so small a picture as it is
    many = [PIXELS[:2, :2]] * (VARIANTS // 2 + 1)
    assert len(list(variants(many, groups, 0))) == len(many)
    assert len(list(variants(many[:-1], groups, 0))) == VARIANTS


def test_versions_are_the_image_and_every_change_in_severity_one():
    found = list(versions(PIXELS, ["noise", "light"], (0, 2, 3)))
    assert len(found) == 1 + 1 + 3 and found[0] is PIXELS
    assert np.array_equal(found[1], SHIFTS["gaussian_noise"][0](PIXELS, 0.08, np.random.default_rng((0, 2, 3, 0))))
    assert np.array_equal(found[4], SHIFTS["contrast"][0](PIXELS, 0.4, np.random.default_rng(0)))
    assert list(versions(PIXELS, [], (0,))) == [PIXELS]


@pytest.fixture(scope="module")
def fits(category: Path) -> list[Glad]:
    """Without and with tolerance."""
    changes = [{"calibration": "held-out"}, {"calibration": "held-out", "tolerate": ["noise"]}]
    return [Glad.from_base("lite", settings=NARROW | {"false_reject_rate": 0.1} | each).fit(category) for each in changes]


def test_a_fit_that_tolerates_noise_rejects_less_of_it(fits: list[Glad]):
    noisy = [SHIFTS["gaussian_noise"][0](np.asarray(draw_part(seed)[0]), 0.05, np.random.default_rng(seed)) for seed in range(700, 712)]
    rejected = [sum(each.inspect(pixels, reconstruct=False).pred_label for pixels in noisy) for each in fits]
    assert rejected[1] < rejected[0]


def test_the_promise_names_what_is_tolerated(fits: list[Glad], tmp_path: Path):
    said = "as they are or under any one change of noise of severity 1,"
    assert [said in each.calibration_.threshold.statement for each in fits] == [False, True]
    assert "tolerated" not in fits[0].calibration_.to_json()["threshold"]
    fits[1].save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    assert loaded.calibration_ == fits[1].calibration_ and loaded.calibration_id == fits[1].calibration_id
    loaded.set_false_reject_rate(0.3)
    assert said in loaded.calibration_.threshold.statement


def test_what_is_usual_is_measured_on_variants_too(fits: list[Glad]):
    strict, tolerant = ([scale for scale in each.model_.all_scales()] for each in fits)
    for one, other in zip(strict, tolerant, strict=True):
        assert not one.usual_level.any() and 0 < float(other.usual_level[4]) <= 2
        assert float(other.usual_scores[1, 1]) > 1.5 * float(one.usual_scores[1, 1])  # the mean of all cells varies with the noise
    scale = tolerant[0]
    lowest, highest, least, most, slope = scale.usual_level.tolist()
    assert least <= lowest < highest < most
    levels = (
        ((lowest + highest) / 2, 0.0),
        ((highest + most) / 2, (most - highest) / 2),
        (most + 5, most - highest),  # no change beyond is known
    )
    for level, beyond in levels:
        evidence = torch.full((2, 1, *scale.grid), math.exp(level))
        evidence[..., :4, :4] *= 3
        largest, mean = scale.scores(evidence)
        torch.testing.assert_close(largest, top_k_mean(evidence, 16) * math.exp(-slope * beyond))
        torch.testing.assert_close(mean, evidence.mean((1, 2, 3)))
    nothing = scale.scores(0 * evidence, torch.zeros(1, 1, *scale.grid))
    assert torch.equal(nothing, torch.zeros(2, 2))
    counted = torch.ones(1, 1, *scale.grid)
    counted[..., 5:, :] = 0
    torch.testing.assert_close(scale.level(evidence * counted, int(counted.sum())), scale.level(evidence[..., :5, :]))


def test_a_few_images_hardly_beyond_the_usual_do_not_decide_how_scores_grow(fits: list[Glad]):
    scale = fits[1].model_.all_scales()[0]
    before = scale.usual_level.clone()
    scale.usual_level.zero_()
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        level, own = (0.05 * torch.randn(40, 1, 1, 1, generator=random) for _ in range(2))
        evidence = level.exp().expand(-1, 1, *scale.grid).clone()
        evidence[..., :4, :4] = (1 + own).exp()  # the largest cells vary by themselves
        assert 0 <= float(_usual_level(scale, evidence, torch.arange(40) >= 20)[4]) < 1
    scale.usual_level.copy_(before)


def test_scores_that_are_the_worst_of_changes_are_no_reference_for_drift(fits: list[Glad]):
    plain, tolerant = (Drift.for_calibration(each.calibration_, learn=30) for each in fits)
    assert (plain.learning, tolerant.learning) == (0, 30)


def test_an_adjusted_tolerant_detector_measures_as_its_fit_did(fits: list[Glad], category: Path, tmp_path: Path):
    fits[1].save_pretrained(tmp_path / "model")
    adjusted = Glad.from_pretrained(tmp_path / "model")
    adjusted.adjust(
        category, {**NARROW, "false_reject_rate": 0.1, "calibration": "held-out", "tolerate": ["noise"], "reconstruction.timesteps": [300]}
    )
    assert not torch.equal(adjusted.model_.all_scales()[0].usual_scores, fits[1].model_.all_scales()[0].usual_scores)
    adjusted.adjust(category, fits[1].settings)
    for one, other in zip(adjusted.model_.all_scales(), fits[1].model_.all_scales(), strict=True):
        for name in ("usual_level", "usual_scores", "usual_energy", "residual_scale"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_what_cannot_be_tolerated():
    with pytest.raises(ConfigError, match=r"tolerate.*scratches|tolerate"):
        make_settings("lite", {"tolerate": ["scratches"]})
