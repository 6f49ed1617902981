"""Models that version 0.1 saved, before settings had classes of their own, still load and give the same scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import draw_part, write_category
from safetensors.torch import load_file, save_file

from gladad.core.settings import from_json
from gladad.detector.glad import Glad
from gladad.detector.old_format import new_names, upgraded
from gladad.features.efficientnet import pretrained
from gladad.models.feature_diffusion.networks import LatentDecoder
from gladad.models.registry import make_settings
from gladad.models.stable_diffusion.settings import StableDiffusionConfig

OLD = Path(__file__).parent / "models_0_1"
EXPECTED = {  # score, p-value and step that version 0.1 printed for `draw_part` of these seeds, without and with a defect
    (60, False): (0.9235248645807274, 0.3333333333333333, 300),
    (60, True): (1.750154838504143, 0.16666666666666666, 500),
    (61, False): (0.971401960756755, 0.3333333333333333, 300),
    (61, True): (1.5921747758941045, 0.16666666666666666, 500),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder as it was written: with the extractor's weights, which are those of its package, and a decoder, which scores nothing."""
    folder = shutil.copytree(OLD / "lite", tmp_path / "model")
    weights = load_file(folder / "base" / "lite.safetensors")
    weights |= {f"trunk.{name}": value for name, value in pretrained().state_dict().items()}
    weights |= {f"decoder.{name}": torch.zeros_like(value) for name, value in LatentDecoder(4).state_dict().items()}
    save_file(weights, folder / "base" / "lite.safetensors")
    return folder


def test_scores_are_the_same(saved: Path, tmp_path: Path) -> None:
    detector = Glad.from_pretrained(saved)
    for (seed, defective), expected in EXPECTED.items():
        found = detector.inspect(draw_part(seed, defective)[0], reconstruct=False)
        # bfloat16 products differ between processors
        assert (found.pred_score, found.p_value) == (pytest.approx(expected[0], rel=1e-2), expected[1]) and found.step == expected[2]
    detector.save_pretrained(tmp_path / "again")
    again = Glad.from_pretrained(tmp_path / "again")
    assert again.model_id == detector.model_id
    assert json.loads((tmp_path / "again" / "model.json").read_text())["format_version"] == 2
    assert again.inspect(draw_part(60)[0]).pred_score == detector.inspect(draw_part(60)[0]).pred_score


def test_settings_get_their_new_names(saved: Path) -> None:
    detector = Glad.from_pretrained(saved)
    assert detector.settings == make_settings("lite", {"training.steps": 4, "image_size": 64, "seed": 1, "false_reject_rate": 0.2})
    resolved = detector.model_.config.settings  # type: ignore[attr-defined]
    assert resolved.product == "texture" and resolved.latent.dimensions == 4 and len(resolved.reconstruction.step_thresholds) == 2


def test_what_is_not_known_of_its_images_is_said(saved: Path, tmp_path: Path) -> None:
    """Version 0.1 did not record the files, so nothing can be promised of others without a word."""
    detector = Glad.from_pretrained(saved)
    detector.calibrate(write_category(tmp_path / "new", train=12) / "train" / "good")
    assert any("did not record which images" in note for note in detector.provenance_["notes"])


def test_a_stable_diffusion_of_version_0_1() -> None:
    old = json.loads((OLD / "diffusers.json").read_text())
    new = upgraded(old)
    config = from_json(StableDiffusionConfig, new["config"])
    assert config.adapted and config.image_size == config.feature_size == (64, 64)
    assert config.settings.training.rank == 2 and config.settings.training.precision == "float32"
    assert config.settings.reconstruction.step_threshold == old["config"]["reconstruction"]["step_threshold"]
    assert make_settings(new["name"], new["settings"]) == make_settings(
        "some/base", {"image_size": 64, "seed": 1, "training": {"steps": 2, "pool": 4, "batch_size": 2, "rank": 2, "precision": "float32"}}
    )


def test_flat_names() -> None:
    values = {"steps": 9, "minutes": None, "adaptive": False, "timesteps": [500], "fusion": True, "denoiser": {"rank": 3}, "shots": 2}
    assert new_names("lite", values) == {
        "training.steps": 9,
        "reconstruction.adaptive": False,
        "reconstruction.timesteps": [500],
        "reconstruction.fusion": "calibrated",
        "training.rank": 3,
        "shots": 2,
    }
