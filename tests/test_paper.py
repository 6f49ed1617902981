"""Detectors on a Stable Diffusion base: adapters over a shared base, whole models, several products, going on after a stop."""

from __future__ import annotations

import gc
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_part
from tiny_base import build_base

from gladad.core.errors import ConfigError, DataError, Interrupted, ModelFormatError
from gladad.core.settings import from_json, to_json
from gladad.core.storage import share_files
from gladad.detector.glad import Glad
from gladad.models.registry import make_settings
from gladad.models.stable_diffusion import components
from gladad.models.stable_diffusion.components import find_repository, licence
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.presets import load_preset
from gladad.training.loop import TrainingRun

QUICK = {"batch_size": 2, "precision": "float32", "pool": 4, "learning_rate": 1e-2}
FULL = QUICK | {"method": "full", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("good")
    for index in range(26):
        draw_part(index)[0].save(folder / f"{index:03}.png")
    return sorted(folder.iterdir())


def settings(training: dict[str, object] = QUICK, **changes: object) -> dict[str, object]:
    """A short training, and a short chain, so that an inspection takes no time."""
    steps = {"steps": changes.pop("steps", 2)}
    return {"image_size": 64, "seed": 1, "reconstruction.num_steps": 5, "training": {**training, **steps}, **changes}


def score(detector: Glad, seed: int = 60) -> float:
    return detector.inspect(draw_part(seed)[0], reconstruct=False).pred_score


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def adapted(tiny_base: Path, good: list[Path]) -> Glad:
    """A fitted detector with an adapter; read only."""
    return Glad.from_base(str(tiny_base), settings=settings()).fit(good)


@pytest.fixture(scope="module")
def few(tiny_base: Path, good: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Glad, Path]:
    """A detector of so few images that it was fitted in folds, and what its trainings wrote; read only."""
    folder = tmp_path_factory.mktemp("few")
    quick = settings(calibrate_step=False)  # over all copies, for three trainings, it would take most of the time
    return Glad.from_base(str(tiny_base), settings=quick).fit(good[:8], run=TrainingRun(folder=folder, tracker="none")), folder


def saved_over_a_copy(detector: Glad, tiny_base: Path, folder: Path) -> tuple[Path, Path]:
    """A detector's folder as a fit over a copy of the base would have left it, and that copy."""
    base, model = shutil.copytree(tiny_base, folder / "base"), folder / "model"
    detector.save_pretrained(model)
    origin = model / "base" / "origin.json"
    origin.write_text(origin.read_text().replace(str(tiny_base.resolve()), str(base.resolve())))
    return model, base


# -------------------------------------------------------------------------------------------- adapters over a shared base


def test_models_with_adapters_are_small_and_share_their_base(adapted: Glad, tiny_base: Path, good: list[Path], tmp_path: Path) -> None:
    other = Glad.from_base(str(tiny_base), settings=settings(QUICK | {"layers": "all", "rank": 2})).fit(good)
    fitted = {"one": adapted, "two": other}
    for name, detector in fitted.items():
        detector.save_pretrained(tmp_path / name)
    assert files(tmp_path / "one" / "base") == {"adapter.safetensors", "origin.json", "conditioning/prompt_embeds.safetensors"}
    size = sum(path.stat().st_size for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert size < 0.3 * (tiny_base / "sd" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    loaded = {name: Glad.from_pretrained(tmp_path / name) for name in fitted}
    one, two = (loaded[name].model_.pipeline for name in loaded)
    assert one.unet is two.unet and one.vae is two.vae and one.features is two.features
    scores = {name: score(detector) for name, detector in fitted.items()}
    assert scores["one"] != scores["two"]
    for _ in range(2):  # in turns
        assert {name: score(detector) for name, detector in loaded.items()} == scores
    third = Glad.from_pretrained(tmp_path / "one")
    del loaded["one"]
    gc.collect()
    assert score(loaded["two"]) == scores["two"] and score(third) == scores["one"]
    unet = two.unet
    assert len(unet.peft_config) == 2
    del third
    gc.collect()
    assert len(unet.peft_config) == 1
    assert fitted["one"].model_.config.settings.reconstruction.step_threshold > 0  # calibrated, not the paper's constant


def test_a_base_that_was_moved_or_changed(adapted: Glad, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = saved_over_a_copy(adapted, tiny_base, tmp_path)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelFormatError, match=r"base cannot be found .*set GLADAD_BASE to where it is now"):
        Glad.from_pretrained(model)
    monkeypatch.setenv("GLADAD_BASE", str(tmp_path / "elsewhere"))
    assert score(Glad.from_pretrained(model)) == score(adapted)
    (tmp_path / "elsewhere" / "sd" / "unet" / "weights.fp16.safetensors").write_bytes(b"another variant")
    assert score(Glad.from_pretrained(model)) == score(adapted)
    weights = tmp_path / "elsewhere" / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelFormatError, match="not the one that the model was made with"):
        Glad.from_pretrained(model)


def test_a_merged_model_stands_alone(adapted: Glad, tiny_base: Path, tmp_path: Path) -> None:
    model, base = saved_over_a_copy(adapted, tiny_base, tmp_path)
    merged = Glad.from_pretrained(model).merge()
    merged.save_pretrained(tmp_path / "merged")
    shutil.rmtree(base)
    alone = Glad.from_pretrained(tmp_path / "merged")
    assert score(alone) == score(merged) == pytest.approx(score(adapted), rel=1e-3)
    assert not alone.model_.config.adapted
    with pytest.raises(ConfigError, match="no adapter to merge"):
        alone.merge()


# ------------------------------------------------------------------------------------------------------------ whole models


def test_all_weights_are_saved_in_the_precision_of_the_inspection(tiny_base: Path, good: list[Path], tmp_path: Path) -> None:
    fitted = Glad.from_base(str(tiny_base), settings=settings(FULL | {"precision": "bfloat16"})).fit(good)
    fitted.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    assert {loaded.model_.pipeline.unet.dtype, loaded.model_.pipeline.vae.dtype} == {torch.bfloat16}
    assert score(loaded) == score(fitted)
    description = loaded.describe()
    assert description["kind"] == "diffusers" and description["origin"]["base"]["source"].endswith("sd")
    assert description["origin"]["base"]["licence"] == "unknown"


def test_no_steps_adopt_a_trained_base(tiny_base: Path, good: list[Path], tmp_path: Path) -> None:
    trained = GladPipeline.from_base(tiny_base)
    for parameter in trained.unet.parameters():
        parameter.data += 0.01
    trained.tune_scoring({"vit.layers.0.mlp.fc1.bias": torch.ones(48)})
    trained.save_pretrained(tmp_path / "converted")
    adopted = Glad.from_base(str(tmp_path / "converted"), settings=settings(FULL, steps=0)).fit(good)
    for name, value in trained.unet.state_dict().items():
        assert torch.equal(adopted.model_.pipeline.unet.state_dict()[name], value)
    assert set(adopted.model_.pipeline.tuned_weights()) == {"vit.layers.0.mlp.fc1.bias"}
    assert adopted.model_.pipeline.prompt == "a photo of sks"
    converted = adopted.model_.pipeline.to(torch.bfloat16)
    assert {parameter.dtype for parameter in converted.scoring_features.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="cannot take 'a nut'"):
        Glad.from_base(str(tmp_path / "converted"), settings=settings(FULL, steps=0, prompt="a nut")).fit(good)
    with pytest.raises(ConfigError, match=r"training\.steps: .* greater than or equal to 1"):
        Glad.from_base("lite", settings={"training.steps": 0})


def test_another_autoencoder(tiny_base: Path, good: list[Path], tmp_path: Path) -> None:
    other = build_base(tmp_path / "other") / "sd" / "vae"
    weights = components.load_component(components.AutoencoderKL, other)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(1.1)
    weights.save_pretrained(tmp_path / "vae")
    plain = Glad.from_base(str(tiny_base), settings=settings(steps=0, calibrate_step=False)).fit(good)
    other_vae = settings(steps=0, calibrate_step=False, vae=str(tmp_path / "vae"))
    tuned = Glad.from_base(str(tiny_base), settings=other_vae).fit(good)
    assert score(plain) != score(tuned)
    assert tuned.describe()["origin"]["vae"]["source"] == str((tmp_path / "vae").resolve())


# --------------------------------------------------------------------------------------------------------- several products


@pytest.mark.parametrize("training", [QUICK, FULL], ids=["lora", "full"])
def test_one_denoiser_for_several_products(tiny_base: Path, good: list[Path], tmp_path: Path, training: dict[str, object]) -> None:
    images = {"nut": good[:25], "bolt": good[1:]}
    detectors = Glad.fit_together(images, str(tiny_base), settings(training, calibrate_step=False))
    nut, bolt = (detectors[name].model_.pipeline for name in ("nut", "bolt"))
    assert nut.unet is bolt.unet and (nut.prompt, bolt.prompt) == ("a photo of sks nut", "a photo of sks bolt")
    scores = {}
    for name, detector in detectors.items():
        detector.save_pretrained(tmp_path / name)
        scores[name] = score(detector)
        assert score(Glad.from_pretrained(tmp_path / name)) == scores[name]
    assert scores["nut"] != scores["bolt"]


def test_a_preset_for_several_products(tiny_base: Path, good: list[Path]) -> None:
    images = {"transistor": good, "screw": good}
    tiny = {"batch_size": 2, "pool": 2, "precision": "float32"}
    chosen = settings(tiny, preset="mvtec_ad/multi_class", steps=1)
    del chosen["reconstruction.num_steps"]
    with pytest.raises(ConfigError, match="is for several products together"):
        Glad.from_base(str(tiny_base), settings=chosen).fit(good)
    with pytest.raises(ConfigError, match="is for one product"):
        Glad.fit_together(images, str(tiny_base), chosen | {"preset": "mvtec_ad/screw"})
    detectors = Glad.fit_together(images, str(tiny_base), chosen)
    screw, transistor = (detectors[name].model_ for name in ("screw", "transistor"))
    expected = load_preset("mvtec_ad/multi_class")
    own, other = screw.config.settings, transistor.config.settings
    assert own.reconstruction == expected.reconstruction and own.guidance_scale == 9.0
    assert (own.scoring.symmetric, other.scoring.symmetric) == (False, True)
    assert detectors["screw"].provenance_["foreground"]["foreground"] == load_preset("mvtec_ad/screw").synthesis_foreground
    assert own.scoring_foreground == "dark" and screw.pipeline.prompt.endswith("screw")
    assert detectors["screw"].describe()["preset"]["tuned_on"] == "test"


def test_equal_files_are_on_the_disk_once(tmp_path: Path) -> None:
    for name, content in (("a", b"x" * 100), ("b", b"x" * 100), ("c", b"y" * 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(content)
        (tmp_path / name / "small").write_bytes(b"1")
    for other in ("a", "b", "c"):
        share_files(tmp_path / "a", tmp_path / other, smallest=10)
    assert (tmp_path / "a" / "weights").samefile(tmp_path / "b" / "weights")
    assert not (tmp_path / "a" / "small").samefile(tmp_path / "b" / "small")
    assert (tmp_path / "c" / "weights").read_bytes() == b"y" * 100


# ---------------------------------------------------------------------------------------------------- stops, memory, origin


def test_a_stopped_fit_goes_on(tiny_base: Path, good: list[Path], tmp_path: Path) -> None:
    whole = Glad.from_base(str(tiny_base), settings=settings(steps=6)).fit(good)
    run = TrainingRun(folder=tmp_path / "run", tracker="none")

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("denoiser", 3):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        Glad.from_base(str(tiny_base), settings=settings(steps=6)).fit(good, run=run, progress=stop)
    told: list[str] = []
    resumed = Glad.from_base(str(tiny_base), settings=settings(steps=6)).fit(good, run=replace(run, tell=told.append))
    assert told == ["going on after step 3 of 6"]
    assert resumed.calibration_ == whole.calibration_ and score(resumed) == score(whole)
    with pytest.raises(ConfigError, match=r"another training \(images differ\)"):
        Glad.from_base(str(tiny_base), settings=settings(steps=6)).fit(good[1:], run=run)


def test_a_cross_fitted_fit_keeps_its_folds_apart(few: tuple[Glad, Path]) -> None:
    assert {path.name for path in few[1].iterdir()} == {"all", "fold-1", "fold-2"}


def test_a_training_that_does_not_fit_is_refused_before_it_is_loaded(tiny_base: Path, good: list[Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))  # nothing there to be loaded
    with pytest.raises(ConfigError, match=r"training needs .* of memory, and .* are available; nothing smaller fits"):
        Glad.from_base(str(base), settings=settings(FULL)).fit(good, run=TrainingRun(memory_limit=100_000))
    with pytest.raises(ModelFormatError, match="cannot be read as AutoencoderKL"):
        Glad.from_base(str(base), settings=settings(FULL)).fit(good, run=TrainingRun(memory_limit=2**30))


def test_thresholds_can_be_made_anew(adapted: Glad, few: tuple[Glad, Path], good: list[Path], tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path / "model")
    fitted, before = Glad.from_pretrained(tmp_path / "model"), adapted.calibration_
    assert fitted.calibrate(good).calibration_ == before  # those of the fit: the same are held out
    new = []
    for number in range(10):
        draw_part(500 + number)[0].save(tmp_path / f"{number}.png")
        new.append(tmp_path / f"{number}.png")
    fitted.calibrate(new)
    assert fitted.calibration_ != before and fitted.calibration_.threshold.n == 10 == fitted.provenance_["held_out"]
    with pytest.raises(DataError, match="at least 4"):
        fitted.calibrate(new[:3])
    with pytest.raises(DataError, match="8 of the 8 given were trained on"):
        few[0].calibrate(good[:8])


@pytest.mark.parametrize(
    ("card", "name", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: []\n---\n# A model", "some/one", "apache-2.0"),
        ("---\ntags: [a]\nlicense: 'mit'\n---\n", "CompVis/stable-diffusion-v1-4", "mit"),
        ("no front matter, license: gpl", "CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
        (None, "facebook/dino-vitb8", "apache-2.0"),
        (None, "some/one", "unknown"),
    ],
)
def test_licences(tmp_path: Path, card: str | None, name: str, expected: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path, name) == expected


def test_the_hub_is_asked_for_the_revision_and_no_pickles(tmp_path: Path) -> None:
    asked: dict[str, object] = {}
    snapshot = tmp_path / "snapshots" / ("ab" * 20)
    (snapshot / "unet").mkdir(parents=True)

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    _, part = find_repository("sd14", ("unet",), "fp16", True, download=download)
    assert asked["name"] == "CompVis/stable-diffusion-v1-4" and asked["revision"] == "fp16" and asked["local_files_only"] is True
    assert all(not str(pattern).endswith((".bin", ".ckpt", ".pth")) for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]
    assert (part.source, part.revision, part.licence) == ("CompVis/stable-diffusion-v1-4", "ab" * 20, "creativeml-openrail-m")


def test_nothing_within_reach_is_one_clear_error() -> None:
    with pytest.raises(ModelFormatError, match=r"CompVis/stable-diffusion-v1-4 at revision v2 is neither a folder nor in the local cache"):
        find_repository("sd14", (), "v2", True)


def test_settings_survive_json() -> None:
    chosen = make_settings("sd14", settings(QUICK, revision="v1", offline=True))
    assert from_json(type(chosen), json.loads(json.dumps(to_json(chosen)))) == chosen
    assert from_json(type(chosen), {"training": {}}) == make_settings("sd14")
    with pytest.raises(ConfigError, match=r"^training\.rang: unknown setting; near are rank"):
        make_settings("sd14", {"training": {"rang": 3}})
    with pytest.raises(ConfigError, match=r"^training: input should be an object"):
        make_settings("sd14", {"training": 3})


def test_scores_do_not_depend_on_batch_mates(adapted: Glad) -> None:
    images = [draw_part(60 + n)[0] for n in range(3)]
    together = [prediction.pred_score for prediction in adapted.predict(images, reconstruct=False)]
    assert together == [adapted.inspect(image).pred_score for image in images]
    assert np.unique(together).size == 3
