"""The memory bank, and anomalib's models where anomalib is installed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_part
from transformers import ResNetConfig, ResNetModel

from gladad.core.errors import ConfigError, MissingExtraError, ModelFormatError
from gladad.detector.glad import Glad
from gladad.features.extractor import load_extractor
from gladad.models.baselines.feature_baselines import (
    FeatureBaseline,
    FeatureBaselineConfig,
    FeatureBaselineSettings,
    fit_feature_baseline,
)

SETTINGS = {"image_size": 64, "false_reject_rate": 0.2, "calibration": "held-out"}
HAS_ANOMALIB = find_spec("anomalib") is not None
THEIRS = pytest.mark.skipif(not HAS_ANOMALIB, reason="anomalib is not installed")
BASES = ["memory-bank", "padim", "pca", pytest.param("anomalib-patchcore", marks=THEIRS), pytest.param("anomalib-padim", marks=THEIRS)]


@pytest.mark.parametrize("base", BASES)
def test_a_baseline_is_a_base_like_any_other(base, category: Path, tmp_path: Path):
    detector = Glad.from_base(base, settings=SETTINGS).fit(category)
    good, bad = (detector.inspect(draw_part(500, defective=defective)[0]) for defective in (False, True))
    mask = np.asarray(draw_part(500, defective=True)[1]) > 0
    assert bad.pred_score > good.pred_score and bad.pred_label
    assert bad.anomaly_map[mask].mean() > bad.anomaly_map[~mask].mean() > good.anomaly_map.mean()
    assert bad.reconstruction is None and bad.step == 0
    detector.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    again = Glad.from_base(base, settings=SETTINGS).fit(category)
    for other in (loaded, again):
        found = other.inspect(draw_part(500, defective=True)[0])
        assert found.pred_score == bad.pred_score and np.array_equal(found.anomaly_map, bad.anomaly_map)


def test_what_is_remembered_is_at_distance_zero():
    images = [np.asarray(draw_part(seed)[0]) for seed in range(2)]
    config = FeatureBaselineConfig(image_size=(64, 64), settings=FeatureBaselineSettings(size=10_000))
    bank = fit_feature_baseline(images, config)
    assert len(bank.learnt["rows"]) == 2 * 8 * 8  # all of it fits
    # not quite zero: the square root of what rounding leaves of a sum of 176 squares
    assert bank.inspect(images[0]).map.max() < 0.2
    assert bank.inspect(np.asarray(draw_part(9, defective=True)[0])).map.max() > 2
    assert len(fit_feature_baseline(images, replace(config, settings=FeatureBaselineSettings(size=50))).learnt["rows"]) == 50


def test_a_damaged_bank(category: Path, tmp_path: Path):
    Glad.from_base("memory-bank", settings=SETTINGS).fit(category).save_pretrained(tmp_path / "model")
    (tmp_path / "model/base/baseline.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelFormatError, match="baseline"):
        Glad.from_pretrained(tmp_path / "model")


def put_backbone(folder: Path, seed: int) -> str:
    """A tiny network with weights drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1])).save_pretrained(folder)
    return str(folder)


def test_a_bank_of_other_features_knows_them_again(tmp_path: Path):
    images = [np.asarray(draw_part(seed)[0]) for seed in range(2)]
    config = FeatureBaselineConfig(
        image_size=(64, 64), settings=FeatureBaselineSettings(features=put_backbone(tmp_path / "backbone", seed=0))
    )
    bank = fit_feature_baseline(images, config)
    assert bank.learnt["rows"].shape == (2 * 8 * 8, 16 + 24 + 32)
    assert bank.config.extractor == load_extractor(config.settings.features).identity
    (tmp_path / "bank").mkdir()
    saved = bank.save(tmp_path / "bank")
    found, expected = (x.inspect(images[0]) for x in (FeatureBaseline.load(tmp_path / "bank", saved), bank))
    assert found.score == expected.score and np.array_equal(found.map, expected.map)

    put_backbone(tmp_path / "backbone", seed=1)
    with pytest.raises(ModelFormatError, match=r"was fitted with the features of .*backbone \(SHA-256 .* provide those, or fit again"):
        FeatureBaseline.load(tmp_path / "bank", saved)
    with pytest.raises(ModelFormatError, match="backbone is neither a folder nor"):
        FeatureBaseline.load(tmp_path / "bank", {**saved, "settings": {"features": str(tmp_path / "no-backbone")}})


def test_settings_that_are_not_for_a_baseline(category: Path):
    with pytest.raises(ConfigError, match="preset: unknown setting"):
        Glad.from_base("memory-bank", settings=SETTINGS | {"preset": "visa/pcb1"})
    detector = Glad.from_base("memory-bank", settings=SETTINGS).fit(category)
    with pytest.raises(ConfigError, match="size cannot be changed without another fit"):
        detector.adjust(category, SETTINGS | {"size": 7})
    assert detector.adjust(category, SETTINGS | {"false_reject_rate": 0.5}).calibration_.threshold.false_reject_rate == 0.5


@pytest.mark.skipif(HAS_ANOMALIB, reason="anomalib is installed")
def test_without_anomalib_the_extra_is_named(category: Path):
    with pytest.raises(MissingExtraError, match=r"gladad\[anomalib\]"):
        Glad.from_base("anomalib-padim", settings=SETTINGS).fit(category)
