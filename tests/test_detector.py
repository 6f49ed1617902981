"""The detector: fit, calibrate, predict, save, load; on the lite base and on a tiny base in the paper's form."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_part
from PIL import Image
from tiny_base import build_base

from gladad.core.errors import ConfigError, DataError, ModelFormatError, NotFittedError
from gladad.core.storage import WriteError
from gladad.data.few_shot import moved_copies, with_copies
from gladad.decision.regions import find_regions
from gladad.detector.glad import Glad
from gladad.models import registry as bases
from gladad.models.feature_diffusion.model import LiteBase, LiteConfig
from gladad.models.feature_diffusion.training import LiteTrainingConfig
from gladad.models.registry import FitSettings
from gladad.models.stable_diffusion.model import PaperConfig
from gladad.models.stable_diffusion.training import PAPER, FinetuneConfig


def quick_settings(**changes: object) -> FitSettings:
    return replace(FitSettings(steps=4, image_size=64, seed=1), **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_lite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lite base that trains in a second; everything else as shipped."""
    monkeypatch.setattr(bases, "LiteTrainingConfig", lambda: LiteTrainingConfig(batch_size=4, pool=16, decoder_steps=2, statistics=6))
    monkeypatch.setattr(bases, "LiteConfig", lambda **given: LiteConfig(**{"dimensions": 8, "widths": (32, 32)} | given))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(30):
        draw_part(index)[0].save(folder / f"{index:03d}.png")
    return folder


def test_fit_predict_save_load(good: Path, tmp_path: Path) -> None:
    fitted = Glad.from_base("lite", settings=quick_settings()).fit(good)
    assert fitted.provenance_["images"] == 30 and fitted.provenance_["held_out"] == 6
    fitted.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    defect = np.asarray(draw_part(99)[0]).copy()
    defect[8:20, 30:44] = (255, 0, 255)
    for image in (good / "003.png", defect, draw_part(5)[0]):
        one, two = fitted.inspect(image), loaded.inspect(image)
        assert one.pred_score == two.pred_score and one.step == two.step
        assert np.array_equal(one.anomaly_map, two.anomaly_map)
    found = loaded.inspect(defect)
    assert found.anomaly_map.shape == found.pred_mask.shape == found.image_size == defect.shape[:2]
    assert found.reconstruction is not None and found.reconstruction.shape == defect.shape
    assert 0 < found.p_value <= 1
    assert found.pred_label == (found.pred_score > 1)
    assert np.array_equal(found.pred_mask, found.anomaly_map > 1)
    assert loaded.describe() == fitted.describe()


def test_two_fits_write_the_same_bytes(good: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        Glad.from_base("lite", settings=quick_settings()).fit(good).save_pretrained(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_order_and_company_do_not_matter(good: Path) -> None:
    detector = Glad.from_base("lite", settings=quick_settings()).fit(good)
    paths = sorted(good.iterdir())[:7]
    together = {p.image_path: p.pred_score for p in detector.predict(paths[::-1], reconstruct=False)}
    assert together == {path: detector.inspect(path, reconstruct=False).pred_score for path in paths}


class Seen:
    """What every training and every calibration of a fit is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained: list[set[bytes]] = []
        self.judged: list[bytes] = []
        for name in ("fit_lite", "fit_lite_multi_class"):
            monkeypatch.setattr(bases, name, partial(self.train, getattr(bases, name)))
        inspect = LiteBase.inspect
        monkeypatch.setattr(LiteBase, "inspect", lambda base, pixels: (self.judged.append(pixels.tobytes()), inspect(base, pixels))[1])

    def train(self, function, images, *args, **kwargs):
        everything = [image for own in images.values() for image in own] if isinstance(images, dict) else images
        self.trained.append({image.tobytes() for image in everything})
        return function(images, *args, **kwargs)


def test_held_out_images_are_not_trained_on(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    detector = Glad.from_base("lite", settings=quick_settings()).fit(good)
    (trained,) = seen.trained
    assert len(trained) == 24 and len(seen.judged) == len(detector.calibration_.scores) == 6
    assert trained.isdisjoint(seen.judged)
    assert detector.calibration_.threshold.statement.startswith("no guarantee: 1.00% false rejects need 99")


def test_held_out_images_of_products_fitted_together_are_not_trained_on(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    Glad.fit_together({"a": sorted(good.iterdir())[:24]}, settings=quick_settings())
    assert len(seen.judged) == 5 and seen.trained[0].isdisjoint(seen.judged)


@pytest.mark.parametrize("count", [12, 4])
def test_cross_fitted_images_are_judged_by_models_that_did_not_see_them(good: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    seen = Seen(monkeypatch)
    Glad.from_base("lite", settings=quick_settings(shots=count)).fit(good)
    _, *folds = seen.trained
    half = len(seen.judged) // 2
    assert [fold.isdisjoint(judged) for fold, judged in zip(folds, (seen.judged[:half], seen.judged[half:]), strict=True)] == [True, True]


def test_a_cross_fitted_threshold_is_called_an_approximation(good: Path) -> None:
    fitted = Glad.from_base("lite", settings=quick_settings(false_reject_rate=0.2)).fit(sorted(good.iterdir())[:12])
    assert fitted.calibration_.threshold.method == "cross-fitted"
    assert "approximation, no guarantee" in fitted.calibration_.threshold.statement
    with pytest.raises(DataError, match="holding out 4 good images needs 8, there are 7"):
        Glad.from_base("lite", settings=quick_settings(calibration="held-out")).fit(sorted(good.iterdir())[:7])


def test_few_images_are_cross_fitted(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    train = bases.fit_lite
    monkeypatch.setattr(bases, "fit_lite", lambda images, *a, **k: (seen.append(len(images)), train(images, *a, **k))[1])
    detector = Glad.from_base("lite", settings=quick_settings()).fit(sorted(good.iterdir())[:12])
    assert seen == [12, 6, 6]
    assert len(detector.calibration_.scores) == 12 and detector.calibration_.cross_fitted


def test_another_false_reject_rate_moves_the_threshold_only(good: Path) -> None:
    detector = Glad.from_base("lite", settings=quick_settings(false_reject_rate=0.5)).fit(good)
    loose = detector.inspect(draw_part(50)[0], reconstruct=False)
    detector.set_false_reject_rate(0.2)
    strict = detector.inspect(draw_part(50)[0], reconstruct=False)
    assert strict.pred_score < loose.pred_score and strict.p_value == loose.p_value


def test_too_few_images(good: Path) -> None:
    with pytest.raises(DataError, match="at least 6 good images"):
        Glad.from_base("lite", settings=quick_settings()).fit(sorted(good.iterdir())[:5])


def test_an_unreadable_image_is_named(good: Path) -> None:
    (good / "011.png").write_bytes((good / "011.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"011\.png"):
        Glad.from_base("lite", settings=quick_settings()).fit(good)


def test_max_images_is_a_seeded_choice(good: Path) -> None:
    counts = [Glad.from_base("lite", settings=quick_settings(max_images=26)).fit(good).provenance_ for _ in range(2)]
    assert counts[0] == counts[1] and counts[0]["images"] == 26


def test_textures_are_used(good: Path, tmp_path: Path) -> None:
    textures = tmp_path / "textures"
    textures.mkdir()
    with pytest.raises(DataError, match="textures"):
        Glad.from_base("lite", settings=quick_settings(textures=str(textures))).fit(good)
    Image.effect_noise((80, 80), 90).convert("RGB").save(textures / "noise.png")
    Glad.from_base("lite", settings=quick_settings(textures=str(textures))).fit(good)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"minutes": -1.0},
        {"steps": 3, "minutes": 1.0},
        {"false_reject_rate": 0},
        {"image_size": 10},
        {"max_images": 1},
        {"shots": 0},
        {"timesteps": (400, 600)},
        {"timesteps": (1000,)},
        {"timesteps": ()},
    ],
)
def test_impossible_settings(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        FitSettings(**bad)  # type: ignore[arg-type]


def test_unfitted(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        Glad().inspect(draw_part(0)[0])
    with pytest.raises(NotFittedError):
        Glad().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_damaged_model_is_named(good: Path, tmp_path: Path) -> None:
    Glad.from_base("lite", settings=quick_settings()).fit(good).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "calibration.json").unlink()
    with pytest.raises(ModelFormatError, match=r"calibration\.json"):
        Glad.from_pretrained(tmp_path / "model")
    with pytest.raises(ModelFormatError, match="no such folder"):
        Glad.from_pretrained(tmp_path / "absent")
    with pytest.raises(ModelFormatError, match="not a gladad model"):
        Glad.from_pretrained(good)


def test_a_foreign_folder_is_not_overwritten(good: Path) -> None:
    detector = Glad.from_base("lite", settings=quick_settings()).fit(good)
    before = sorted(good.iterdir())
    with pytest.raises(WriteError, match="will not be overwritten"):
        detector.save_pretrained(good)
    assert sorted(good.iterdir()) == before


def test_regions() -> None:
    maps = np.zeros((12, 20), np.float32)
    maps[2:4, 3:8] = 1.5
    maps[8, 10], maps[9, 11] = 3.0, 2.0  # touch at a corner: one region
    first, second = find_regions(maps > 1, maps)
    assert (first.box, first.area, first.peak) == ((10, 8, 12, 10), 2, 3.0)
    assert (second.box, second.area, second.peak) == ((3, 2, 8, 4), 10, 1.5)
    assert find_regions(maps > 9, maps) == ()


def test_a_base_in_the_papers_form(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_base(tmp_path / "tiny")
    short = replace(PaperConfig().reconstruction, num_steps=5)
    monkeypatch.setattr(bases, "PaperConfig", lambda **given: PaperConfig(**{"reconstruction": short} | given))
    settings = quick_settings(steps=2, denoiser=FinetuneConfig(pool=4))
    detector = Glad.from_base(str(folder), settings=settings).fit(sorted(good.iterdir())[:26])
    detector.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    one, two = detector.inspect(draw_part(60)[0]), loaded.inspect(draw_part(60)[0])
    assert one.pred_score == two.pred_score and one.step == two.step > 0
    assert loaded.describe()["base"] == "diffusers"
    assert detector.base_.config.reconstruction.step_threshold > 0  # calibrated, not the paper's constant
    assert detector.base_.config.guidance_scale == 1.0


# ---------------------------------------------------------------------------------------- several products, few images


def test_one_denoiser_for_several_products(good: Path, tmp_path: Path) -> None:
    images = {"a": sorted(good.iterdir())[:25], "b": sorted(good.iterdir())[5:]}
    detectors = Glad.fit_together(images, settings=quick_settings())
    assert detectors["a"].base_.denoiser is detectors["b"].base_.denoiser
    one, two = (detectors[name].inspect(draw_part(50)[0]) for name in ("a", "b"))
    assert one.pred_score != two.pred_score
    detectors["b"].save_pretrained(tmp_path / "b")
    loaded = Glad.from_pretrained(tmp_path / "b")
    assert loaded.inspect(draw_part(50)[0]).pred_score == two.pred_score
    assert Glad.fit_together(images, settings=quick_settings())["b"].inspect(draw_part(50)[0]).pred_score == two.pred_score
    # The denoiser is told which product it sees.
    latent = torch.zeros(1, loaded.base_.config.dimensions, 8, 8)
    told = loaded.base_.predict_noise(latent, torch.tensor([300]))
    loaded.base_.config = replace(loaded.base_.config, category="a")
    assert not torch.equal(told, loaded.base_.predict_noise(latent, torch.tensor([300])))


def test_what_cannot_be_fitted_together(good: Path) -> None:
    with pytest.raises(DataError, match="b: at least 24 good images"):
        Glad.fit_together({"a": sorted(good.iterdir()), "b": sorted(good.iterdir())[:9]}, settings=quick_settings())
    with pytest.raises(ConfigError, match="memory-bank has no denoiser"):
        Glad.fit_together({"a": sorted(good.iterdir())}, "memory-bank", FitSettings(image_size=64))


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_few_shots_promise_nothing(good: Path, shots: int) -> None:
    fitted = Glad.from_base("lite", settings=quick_settings(shots=shots, false_reject_rate=0.1)).fit(good)
    threshold = fitted.calibration_.threshold
    # with copies there are 4 scores per image, and more than the 9 that a guarantee for 10 % would need
    assert len(fitted.calibration_.scores) == 4 * shots and threshold.n == fitted.provenance_["images"] == shots
    assert (
        threshold.method == "copies"
        and threshold.statement.startswith("no guarantee")
        and f"copies of {shots} image" in threshold.statement
    )
    assert fitted.calibration_.cross_fitted == (shots > 1)
    assert fitted.inspect(draw_part(60, defective=True)[0]).p_value >= 1 / (shots + 1)
    fitted.set_false_reject_rate(0.2)
    assert fitted.calibration_.threshold.method == "copies"


def test_copies_are_close_to_their_image_and_never_the_same() -> None:
    image = np.asarray(draw_part(3)[0])
    copies = with_copies([image], seed=0)
    assert len(copies) == 24 and copies[0] is image and all(copy.shape == image.shape for copy in copies)
    everything = [*copies, *moved_copies([image], seed=0)[1:]]
    assert len({copy.tobytes() for copy in everything}) == 24 + 3
    assert all(np.abs(copy.astype(float) - image).mean() < 30 for copy in everything)
    assert [copy.tobytes() for copy in with_copies([image], seed=0)] == [copy.tobytes() for copy in copies]
    assert len(with_copies([image] * 30, seed=0)) == 30


def test_more_shots_than_images(good: Path) -> None:
    with pytest.raises(DataError, match="ask for fewer shots"):
        Glad.from_base("lite", settings=quick_settings(shots=8)).fit(sorted(good.iterdir())[:7])


def test_the_foreground_is_chosen_and_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(8):
        pixels = rng.normal(30, 3, (72, 72, 3))
        pixels[20:50, 18:54] += 150 + rng.normal(0, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    fitted = Glad.from_base("lite", settings=quick_settings(foreground="auto")).fit(folder)
    assert fitted.provenance_["foreground"]["foreground"] == "bright" and "dark ground" in fitted.provenance_["foreground"]["reason"]


def test_an_adjusted_detector_is_that_of_a_fit_with_these_settings(good: Path) -> None:
    for change in ({"adaptive": False}, {"fusion": True}, {"timesteps": (500,)}, {"false_reject_rate": 0.3}):
        wanted = quick_settings(**change)
        adjusted = Glad.from_base("lite", settings=quick_settings()).fit(good).adjust(good, wanted)
        fresh = Glad.from_base("lite", settings=wanted).fit(good)
        assert adjusted.calibration_ == fresh.calibration_ and adjusted.settings == wanted
        assert adjusted.inspect(draw_part(50)[0]).pred_score == fresh.inspect(draw_part(50)[0]).pred_score


def test_products_of_other_proportions_are_adjusted_at_the_size_of_their_fit(good: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for index in range(26):
        draw_part(index)[0].resize((200, 72)).save(wide / f"{index}.png")
    images = {"square": sorted(good.iterdir())[:26], "wide": sorted(wide.iterdir())}
    settings = quick_settings(image_size=96)
    fixed = Glad.fit_together(images, settings=replace(settings, adaptive=False))["wide"]
    adjusted = Glad.fit_together(images, settings=settings)["wide"].adjust(images["wide"], replace(settings, adaptive=False))
    assert adjusted.calibration_ == fixed.calibration_


def test_a_failed_adjustment_changes_nothing(good: Path) -> None:
    fitted = Glad.from_base("lite", settings=quick_settings()).fit(good)
    before = (fitted.settings, fitted.calibration_)
    with pytest.raises(DataError):
        fitted.adjust(sorted(good.iterdir())[1:], quick_settings(adaptive=False))
    assert (fitted.settings, fitted.calibration_) == before


def test_what_cannot_be_adjusted(good: Path) -> None:
    fitted = Glad.from_base("lite", settings=quick_settings()).fit(good)
    with pytest.raises(ConfigError, match="seed cannot be changed"):
        fitted.adjust(good, quick_settings(seed=2))
    with pytest.raises(DataError, match="not the images"):
        fitted.adjust(sorted(good.iterdir())[1:], quick_settings(adaptive=False))
    few = Glad.from_base("lite", settings=quick_settings()).fit(sorted(good.iterdir())[:12])
    with pytest.raises(ConfigError, match="cross-fitted"):
        few.adjust(sorted(good.iterdir())[:12], quick_settings(adaptive=False))


@pytest.mark.parametrize(
    ("base", "changes"),
    [("lite", {"preset": "visa/pcb1"}), ("memory-bank", {"steps": 3}), ("some/diffusers", {"timesteps": (500,)}),
     ("some/diffusers", {"preset": "visa/multi_class"}), ("some/diffusers", {"preset": "visa/pcb1", "prompt": "a board"}),
     ("some/diffusers", {"preset": "visa/pcb1", "foreground": "dark"})],
)  # fmt: skip
def test_settings_of_other_bases_are_refused_at_once(good: Path, base: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"is not a setting of the base|several products together|is set by the preset"):
        Glad.from_base(base, settings=FitSettings(**changes)).fit(good)  # type: ignore[arg-type]


def test_a_preset_sets_the_papers_constants(good: Path, tmp_path: Path) -> None:
    features, training = str(build_base(tmp_path / "tiny") / "dino"), replace(PAPER, batch_size=2, pool=4)
    settings = FitSettings(
        steps=1, image_size=64, features=features, preset="mvtec_ad/transistor", denoiser=training, calibration="held-out"
    )
    fitted = Glad.from_base(str(tmp_path / "tiny" / "sd"), settings=settings).fit(sorted(good.iterdir())[:8])
    config = fitted.base_.config
    assert (config.reconstruction.max_step, config.reconstruction.step_threshold, config.guidance_scale) == (850, 0.5, 9.0)
    assert config.scoring.symmetric
    assert fitted.describe()["preset"]["tuned_on"] == "test"
