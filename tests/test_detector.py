"""The detector: fit, calibrate, predict, save, load; on the lite base and on a tiny base in the paper's form."""

from __future__ import annotations

import json
import re
import shutil
import threading
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_part
from PIL import Image
from tiny_base import build_base

from gladad import __version__
from gladad.core.errors import ConfigError, DataError, Interrupted, ModelFormatError, NotFiniteError, NotFittedError
from gladad.core.settings import with_values
from gladad.core.storage import WriteError
from gladad.core.threads import CancelToken
from gladad.data.few_shot import moved_copies, with_copies
from gladad.data.samples import file_digest
from gladad.decision.regions import find_regions
from gladad.detector.glad import Glad
from gladad.models.feature_diffusion import family
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.settings import FeatureDiffusionSettings
from gladad.models.registry import make_settings

QUICK = {
    "image_size": 64,
    "seed": 1,
    "latent.dimensions": 8,
    "widths": [32, 32],
    "training": {"steps": 4, "batch_size": 4, "pool": 16, "decoder_steps": 2},
}
"""A ``lite`` model that trains in a second; everything else as shipped."""


def quick_settings(**changes: object) -> FeatureDiffusionSettings:
    """`QUICK` with other settings; a double underscore stands for a dot."""
    settings = make_settings("lite", QUICK)
    assert isinstance(settings, FeatureDiffusionSettings)
    return with_values(settings, {name.replace("__", "."): value for name, value in changes.items()})


def draw_good(folder: Path) -> Path:
    folder.mkdir()
    for index in range(30):
        draw_part(index)[0].save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return draw_good(tmp_path / "good")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Glad:
    """Fitted on images as `good` has them; read only, but a deep copy may be changed."""
    return Glad.from_base("lite", settings=quick_settings()).fit(draw_good(tmp_path_factory.mktemp("quick") / "good"))


def test_fit_predict_save_load(quick: Glad, good: Path, tmp_path: Path) -> None:
    assert quick.provenance_["images"] == 30 and quick.provenance_["held_out"] == 6
    quick.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    defect = np.asarray(draw_part(99)[0]).copy()
    defect[8:20, 30:44] = (255, 0, 255)
    for image in (good / "003.png", defect, draw_part(5)[0]):
        one, two = quick.inspect(image), loaded.inspect(image)
        assert one.pred_score == two.pred_score and one.step == two.step
        assert np.array_equal(one.anomaly_map, two.anomaly_map)
    found = loaded.inspect(defect)
    assert found.anomaly_map.shape == found.pred_mask.shape == found.image_size == defect.shape[:2]
    assert found.reconstruction is not None and found.reconstruction.shape == defect.shape
    assert 0 < found.p_value <= 1
    assert found.pred_label == (found.pred_score > 1)
    assert np.array_equal(found.pred_mask, found.anomaly_map > 1)
    assert loaded.describe() == quick.describe()


def test_two_fits_write_the_same_bytes(quick: Glad, good: Path, tmp_path: Path) -> None:
    quick.save_pretrained(tmp_path / "one")
    Glad.from_base("lite", settings=quick_settings()).fit(good).save_pretrained(tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_order_and_company_do_not_matter(quick: Glad, good: Path) -> None:
    paths = sorted(good.iterdir())[:7]
    together = {p.image_path: p.pred_score for p in quick.predict(paths[::-1], reconstruct=False)}
    assert together == {path: quick.inspect(path, reconstruct=False).pred_score for path in paths}


class Seen:
    """What every training and every calibration of a fit is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained: list[set[bytes]] = []
        self.judged: list[bytes] = []
        monkeypatch.setattr(family, "train_models", partial(self.train, family.train_models))
        inspect = FeatureDiffusion.inspect
        monkeypatch.setattr(
            FeatureDiffusion, "inspect", lambda model, pixels: (self.judged.append(pixels.tobytes()), inspect(model, pixels))[1]
        )

    def train(self, function, images, *args, **kwargs):
        self.trained.append({image.tobytes() for own in images.values() for image in own})
        return function(images, *args, **kwargs)


def test_held_out_images_are_not_trained_on(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    detector = Glad.from_base("lite", settings=quick_settings()).fit(good)
    (trained,) = seen.trained
    assert len(trained) == 24 and len(seen.judged) == len(detector.calibration_.scores) == 6
    assert trained.isdisjoint(seen.judged)
    assert detector.calibration_.threshold.statement.startswith("at most 14.29% of good parts like the 6")


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


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Glad, Seen]:
    """Fitted on the first of such images as `good` has, too few to hold any out, and what it was shown; read only."""
    few = sorted(draw_good(tmp_path_factory.mktemp("crossed") / "good").iterdir())[:12]
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        return Glad.from_base("lite", settings=quick_settings(false_reject_rate=0.2)).fit(few), seen


def test_a_cross_fitted_threshold_is_called_an_approximation(crossed: tuple[Glad, Seen], good: Path) -> None:
    fitted, _ = crossed
    assert fitted.calibration_.threshold.method == "cross-fitted"
    assert "approximation, no guarantee" in fitted.calibration_.threshold.statement
    with pytest.raises(DataError, match="holding out 4 good images needs 8, there are 7"):
        Glad.from_base("lite", settings=quick_settings(calibration="held-out")).fit(sorted(good.iterdir())[:7])


def test_few_images_are_cross_fitted(crossed: tuple[Glad, Seen]) -> None:
    detector, seen = crossed
    assert [len(part) for part in seen.trained] == [12, 6, 6]
    assert len(detector.calibration_.scores) == 12 and detector.calibration_.cross_fitted


def test_another_false_reject_rate_moves_the_threshold_only(quick: Glad) -> None:
    detector = deepcopy(quick)
    detector.set_false_reject_rate(0.5)
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
    ("bad", "key"),
    [
        ({"training.steps": 0}, "training.steps"),
        ({"training.minutes": -1.0}, "training.minutes"),
        ({"training.steps": 3, "training.minutes": 1.0}, "training.steps"),
        ({"false_reject_rate": 0}, "false_reject_rate"),
        ({"image_size": 10}, "image_size"),
        ({"max_images": 1}, "max_images"),
        ({"shots": 0}, "shots"),
        ({"reconstruction.timesteps": [400, 600]}, "timesteps"),
        ({"reconstruction.timesteps": [1000]}, "timesteps"),
        ({"reconstruction.method": "magic"}, "reconstruction"),
        ({"widths": [16, 16]}, "widths"),
        ({"widths": [24, 64]}, "widths"),
        ({"widths": []}, "widths"),
        ({"colour": 1}, "colour"),
        ({"training.colour": 1}, "training.colour"),
    ],
)
def test_impossible_settings(bad: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}") as caught:
        make_settings("lite", bad)
    assert "\n" not in str(caught.value)


def test_unfitted(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        Glad().inspect(draw_part(0)[0])
    with pytest.raises(NotFittedError):
        Glad().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_damaged_model_is_named(quick: Glad, good: Path, tmp_path: Path) -> None:
    quick.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "calibration.json").unlink()
    with pytest.raises(ModelFormatError, match=r"calibration\.json"):
        Glad.from_pretrained(tmp_path / "model")
    with pytest.raises(ModelFormatError, match="no such folder"):
        Glad.from_pretrained(tmp_path / "absent")
    with pytest.raises(ModelFormatError, match="not a gladad model"):
        Glad.from_pretrained(good)


def test_a_foreign_folder_is_not_overwritten(quick: Glad, good: Path) -> None:
    before = sorted(good.iterdir())
    with pytest.raises(WriteError, match="will not be overwritten"):
        quick.save_pretrained(good)
    assert sorted(good.iterdir()) == before


def test_regions() -> None:
    maps = np.zeros((12, 20), np.float32)
    maps[2:4, 3:8] = 1.5
    maps[8, 10], maps[9, 11] = 3.0, 2.0  # touch at a corner: one region
    first, second = find_regions(maps > 1, maps)
    assert (first.box, first.area, first.peak) == ((10, 8, 12, 10), 2, 3.0)
    assert (second.box, second.area, second.peak) == ((3, 2, 8, 4), 10, 1.5)
    assert find_regions(maps > 9, maps) == ()


def test_a_model_in_the_papers_form(good: Path, tmp_path: Path) -> None:
    folder = build_base(tmp_path / "tiny")
    settings = {"training": {"steps": 2, "batch_size": 2, "pool": 4}, "image_size": 64, "seed": 1, "reconstruction.num_steps": 5}
    detector = Glad.from_base(str(folder), settings=settings).fit(sorted(good.iterdir())[:26])
    detector.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    one, two = detector.inspect(draw_part(60)[0]), loaded.inspect(draw_part(60)[0])
    assert one.pred_score == two.pred_score and one.step == two.step > 0
    assert loaded.describe()["kind"] == "diffusers"
    resolved = detector.model_.config.settings
    assert resolved.reconstruction.step_threshold > 0  # calibrated, not the paper's constant
    assert resolved.guidance_scale == 1.0


# ---------------------------------------------------------------------------------------- several products, few images


def test_one_denoiser_for_several_products(good: Path, tmp_path: Path) -> None:
    images = {"a": sorted(good.iterdir())[:25], "b": sorted(good.iterdir())[5:]}
    detectors = Glad.fit_together(images, settings=quick_settings())
    assert detectors["a"].model_.scales[0].denoiser is detectors["b"].model_.scales[0].denoiser
    one, two = (detectors[name].inspect(draw_part(50)[0]) for name in ("a", "b"))
    assert one.pred_score != two.pred_score
    detectors["b"].save_pretrained(tmp_path / "b")
    loaded = Glad.from_pretrained(tmp_path / "b")
    assert loaded.inspect(draw_part(50)[0]).pred_score == two.pred_score
    assert Glad.fit_together(images, settings=quick_settings())["b"].inspect(draw_part(50)[0]).pred_score == two.pred_score
    # The denoiser is told which product it sees.
    scale = loaded.model_.scales[0]
    latent = torch.zeros(1, 2 * loaded.model_.config.settings.latent.dimensions, 8, 8)
    told = scale.predict_noise(latent, torch.tensor([300]))
    loaded.model_.config = replace(loaded.model_.config, category="a")
    assert not torch.equal(told, scale.predict_noise(latent, torch.tensor([300])))


def test_what_cannot_be_fitted_together(good: Path) -> None:
    with pytest.raises(DataError, match="b: at least 24 good images"):
        Glad.fit_together({"a": sorted(good.iterdir()), "b": sorted(good.iterdir())[:9]}, settings=quick_settings())
    with pytest.raises(ConfigError, match="memory-bank has no denoiser"):
        Glad.fit_together({"a": sorted(good.iterdir())}, "memory-bank", {"image_size": 64})


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


def test_an_adjusted_detector_is_that_of_a_fit_with_these_settings(quick: Glad, good: Path) -> None:
    changes = ({"adaptive": False}, {"fusion": "calibrated"}, {"timesteps": [500]})
    for change in (*({f"reconstruction__{key}": value for key, value in own.items()} for own in changes), {"false_reject_rate": 0.3}):
        wanted = quick_settings(**change)
        adjusted = deepcopy(quick).adjust(good, wanted)
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
    fixed = Glad.fit_together(images, settings=with_values(settings, {"reconstruction.adaptive": False}))["wide"]
    adjusted = Glad.fit_together(images, settings=settings)["wide"].adjust(
        images["wide"], with_values(settings, {"reconstruction.adaptive": False})
    )
    assert adjusted.calibration_ == fixed.calibration_


def test_a_failed_adjustment_changes_nothing(quick: Glad, good: Path) -> None:
    fitted = deepcopy(quick)
    before = (fitted.settings, fitted.calibration_)
    with pytest.raises(DataError):
        fitted.adjust(sorted(good.iterdir())[1:], quick_settings(reconstruction__timesteps=(500,)))
    assert (fitted.settings, fitted.calibration_) == before


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux tells what is mapped")
def test_a_loaded_detector_has_no_file_open(quick: Glad, tmp_path: Path) -> None:
    """A disk with models could not be taken away, and reading from one that has gone ends the process."""
    quick.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert loaded.model_id == quick.model_id


def test_what_cannot_be_adjusted(quick: Glad, crossed: tuple[Glad, Seen], good: Path) -> None:
    fitted = deepcopy(quick)
    with pytest.raises(ConfigError, match="seed cannot be changed"):
        fitted.adjust(good, quick_settings(seed=2))
    with pytest.raises(DataError, match="not the images"):
        fitted.adjust(sorted(good.iterdir())[1:], quick_settings(reconstruction__timesteps=(500,)))
    wanted = quick_settings(reconstruction__timesteps=(500,), false_reject_rate=0.2)
    with pytest.raises(ConfigError, match="cross-fitted"):
        crossed[0].adjust(sorted(good.iterdir())[:12], wanted)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lite", {"preset": "visa/pcb1"}, "preset: unknown setting"),
        ("memory-bank", {"training.steps": 3}, "training: unknown setting"),
        ("some/diffusers", {"reconstruction.timesteps": [500]}, r"reconstruction\.timesteps: unknown setting"),
        ("some/diffusers", {"preset": "visa/multi_class"}, "several products together"),
    ],
)
def test_settings_of_other_models_are_refused_at_once(good: Path, name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Glad.from_base(name, settings=changes).fit(good)
    if name != "lite":
        with pytest.raises(ConfigError, match=r"needs \w+Settings, not FeatureDiffusionSettings"):
            Glad.from_base(name, settings=quick_settings()).fit(good)


def test_a_preset_sets_the_papers_constants(good: Path, tmp_path: Path) -> None:
    values = {
        "preset": "mvtec_ad/transistor",
        "training": {"steps": 1, "batch_size": 2, "pool": 4},
        "image_size": 64,
        "features": str(build_base(tmp_path / "tiny") / "dino"),
        "calibration": "held-out",
    }
    fitted = Glad.from_base(str(tmp_path / "tiny" / "sd"), settings=values).fit(sorted(good.iterdir())[:8])
    resolved = fitted.model_.config.settings
    assert (resolved.reconstruction.max_step, resolved.reconstruction.step_threshold, resolved.guidance_scale) == (850, 0.5, 9.0)
    assert resolved.scoring.symmetric and resolved.training.method == "full"
    assert fitted.describe()["preset"]["tuned_on"] == "test"


# ------------------------------------------------------------------------------------------------ promises that must hold


def test_images_that_were_trained_on_never_stand_behind_a_promise(good: Path) -> None:
    """Neither one photo more in the folder nor a choice among its images hides which ones the training saw."""
    paths = sorted(good.iterdir())
    fitted = Glad.from_base("lite", settings=quick_settings(max_images=24, false_reject_rate=0.2)).fit(paths)
    seen = fitted._require_fit().seen
    assert seen is not None and len(seen.trained) == 19 and len(seen.held_out) == 5
    with Image.open(paths[0]) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(good / "one_more.png")
    fitted.calibrate(good)
    unseen = [path for path in good.iterdir() if file_digest(path) not in seen.trained]
    assert fitted.calibration_.threshold.n == len(unseen) == 12 and fitted.provenance_["left_out"] == 19
    with pytest.raises(DataError, match="there are 0; 19 of the 19 given were trained on"):
        fitted.calibrate([path for path in good.iterdir() if file_digest(path) in seen.trained])


def test_a_renamed_copy_of_a_training_image_is_known_again(quick: Glad, good: Path, tmp_path: Path) -> None:
    quick.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    copies = tmp_path / "copies"
    copies.mkdir()
    for number, path in enumerate(sorted(good.iterdir())):
        (copies / f"new_{number}.png").write_bytes(path.read_bytes())
    loaded.calibrate(copies)
    assert loaded.calibration_ == quick.calibration_  # what is left are those that were held out


def test_copies_of_an_image_count_once(good: Path) -> None:
    """They are on one side of every split, and no promise is made by their number."""
    paths = sorted(good.iterdir())
    for path in paths[:10]:
        for copy in range(3):
            (good / f"{path.stem}_copy{copy}.png").write_bytes(path.read_bytes())
    fitted = Glad.from_base("lite", settings=quick_settings(seed=0)).fit(good)
    seen = fitted._require_fit().seen
    assert seen is not None and not seen.trained & seen.held_out
    assert fitted.calibration_.threshold.n == len(seen.held_out) == 6
    few = [*paths[:12], *(good / f"{path.stem}_copy0.png" for path in paths[:10])]
    crossed = Glad.from_base("lite", settings=quick_settings()).fit(few)
    assert len(crossed.calibration_.scores) == crossed.calibration_.threshold.n == crossed.provenance_["images"] == 12


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_score_is_never_accepted(self, detector: Glad, category: Path, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
        inspect = type(detector.model_).inspect
        monkeypatch.setattr(type(detector.model_), "inspect", lambda self, pixels: replace(inspect(self, pixels), score=bad))
        with pytest.raises(NotFiniteError, match="score"):
            detector.inspect(draw_part(0)[0])

    def test_statistics_of_a_damaged_model_do_not_pass(self, model: Path, tmp_path: Path) -> None:
        loaded = Glad.from_pretrained(model)
        loaded.model_.scales[0].usual_energy.fill_(float("nan"))
        with pytest.raises(NotFiniteError):
            loaded.inspect(draw_part(0)[0])

    def test_a_threshold_does_not_load(self, model: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(model, tmp_path / "model")
        calibration = json.loads((folder / "calibration.json").read_text())
        calibration["threshold"]["value"] = float("nan")
        (folder / "calibration.json").write_text(json.dumps(calibration))
        with pytest.raises(ModelFormatError, match="not finite"):
            Glad.from_pretrained(folder)


def test_an_interrupted_adjustment_changes_nothing(quick: Glad, good: Path) -> None:
    """Neither the model nor its thresholds, wherever it is stopped."""
    fitted = deepcopy(quick)
    before = fitted.inspect(draw_part(50)[0], reconstruct=False), fitted.calibration_, fitted.model_id

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "calibration":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted.adjust(good, quick_settings(reconstruction__timesteps=[500]), progress=stop)
    after = fitted.inspect(draw_part(50)[0], reconstruct=False)
    assert (after.pred_score, fitted.calibration_, fitted.model_id) == (before[0].pred_score, *before[1:])


def test_steps_that_were_asked_for_are_taken_by_every_training(good: Path) -> None:
    steps: list[tuple[str, int]] = []
    Glad.from_base("lite", settings=quick_settings(training__steps=9)).fit(
        sorted(good.iterdir())[:12], progress=lambda stage, done, total: steps.append((stage, total))
    )
    assert {total for stage, total in steps if stage.endswith("denoiser")} == {9}
    assert len({stage for stage, _ in steps if stage.endswith("denoiser")}) == 3 * 2  # two scales


def test_one_shot_has_the_whole_budget(good: Path) -> None:
    """No fold is trained beside it, so nothing is divided."""
    steps = set()
    settings = quick_settings(training__steps=None, training__minutes=0.02, shots=1)

    def told(stage: str, done: int, total: int) -> None:
        if stage == "scale 1: denoiser":
            steps.add(total)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Glad.from_base("lite", settings=settings).fit(good, progress=told)
    assert steps == {400}


# ------------------------------------------------------------------------------------------- what goes in and comes out


def test_all_forms_of_an_image_give_the_same_score(detector: Glad, category: Path) -> None:
    path = category / "test" / "good" / "000.png"
    pixels = np.asarray(Image.open(path))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    forms = [path, str(path), path.read_bytes(), Image.open(path), pixels, tensor]
    assert len({detector.inspect(form, reconstruct=False).pred_score for form in forms}) == 1
    single = detector.inspect(path, reconstruct=False).pred_score
    for batch in (np.stack([pixels] * 2), torch.stack([tensor] * 2), [pixels, path]):
        assert [found.pred_score for found in detector.predict(batch, reconstruct=False)] == [single, single]


def test_a_result_names_what_made_it(detector: Glad, model: Path) -> None:
    found = Glad.from_pretrained(model).inspect(draw_part(0)[0])
    assert found.model_id == detector.model_id and len(found.model_id) == 16
    assert found.calibration_id == detector.calibration_id and found.model_version == __version__
    other = Glad.from_pretrained(model)
    other.set_false_reject_rate(0.4)
    assert other.model_id == found.model_id and other.calibration_id != found.calibration_id


def test_work_can_be_cancelled_from_another_thread(good: Path, detector: Glad) -> None:
    token = CancelToken()
    begun = threading.Event()

    def told(stage: str, done: int, total: int) -> None:
        begun.set()

    def fit() -> None:
        with pytest.raises(Interrupted):
            Glad.from_base("lite", settings=quick_settings(training__steps=100_000)).fit(good, progress=told, cancel=token)

    thread = threading.Thread(target=fit)
    thread.start()
    begun.wait(60)
    token.cancel()
    thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(Interrupted):
        detector.predict([draw_part(0)[0]] * 3, cancel=token)
