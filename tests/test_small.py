"""The base that starts from random weights, through the program that Stable Diffusion goes through."""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import gladad
from gladad.cli.main import main
from gladad.core.errors import ConfigError, Interrupted, ModelFormatError
from gladad.core.images import load_image, resize_pixels
from gladad.core.inference import FLOAT32, fast_dtype
from gladad.core.settings import to_json
from gladad.core.tensors import to_tensor
from gladad.core.threads import CancelToken
from gladad.detector.glad import Glad
from gladad.features.pyramid import PyramidFeatures
from gladad.models.family import Training
from gladad.models.registry import make_settings
from gladad.models.stable_diffusion import family, small
from gladad.models.stable_diffusion.model import StableDiffusion
from gladad.training.loop import DTYPES, TrainingRun

QUICK = {
    "image_size": 64,
    "training.precision": "float32",  # the same everywhere
    "autoencoder.precision": "float32",
    "training.steps": 2,
    "training.pool": 4,
    "training.batch_size": 2,
    "autoencoder.steps": 2,
    "autoencoder.batch_size": 2,
    "reconstruction.num_steps": 5,
    "calibration": "held-out",
    "false_reject_rate": 0.2,
}
TIMESTEPS = [601, 451, 301]  # at which QUICK compares


@pytest.fixture(scope="module", autouse=True)
def little() -> object:
    """Fewer anomalies and narrower networks: the same code in less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "WITH_ANOMALIES", 4)
        patch.setattr(small, "VAE", small.VAE | {"block_out_channels": (16, 16, 32, 32)})
        patch.setattr(small, "UNET", small.UNET | {"block_out_channels": (32, 32, 64)})
        yield


@pytest.fixture(scope="module")
def fitted(category: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Glad, Path]:
    folder = tmp_path_factory.mktemp("small")
    detector = Glad.from_base("small", settings=QUICK).fit(category, run=TrainingRun(folder=folder / "run", tracker="none"))
    detector.save_pretrained(folder / "model")
    return detector, folder


def test_a_fit_goes_through_autoencoder_and_denoiser_and_is_saved_whole(fitted, category):
    detector, folder = fitted
    assert {path.name for path in (folder / "run" / "all").iterdir()} == {"autoencoder", "denoiser"}
    defect = sorted((category / "test" / "hole").iterdir())[0]
    found = detector.inspect(defect)
    assert found.anomaly_map.shape == found.reconstruction.shape[:2] == (72, 72)
    loaded = Glad.from_pretrained(folder / "model")
    assert loaded.inspect(defect).pred_score == found.pred_score
    assert loaded.model_id == detector.model_id


def test_the_same_seed_gives_the_same_model_and_finished_trainings_are_not_repeated(fitted, category, tmp_path):
    detector, folder = fitted
    stages: list[str] = []
    again = Glad.from_base("small", settings=QUICK).fit(
        category,
        run=TrainingRun(folder=folder / "run", tracker="none"),
        progress=lambda stage, done, total: stages.append(stage) if done < total else None,
    )
    assert again.model_id == detector.model_id
    assert "autoencoder" not in stages and "denoiser" not in stages
    fresh = Glad.from_base("small", settings=QUICK).fit(category)
    assert fresh.model_id == detector.model_id


def test_a_fit_stopped_in_either_training_goes_on_to_the_same_model(fitted, category, tmp_path):
    detector, _ = fitted
    for part in ("autoencoder", "denoiser"):
        token = CancelToken()

        def stop(stage: str, done: int, total: int, part: str = part, token: CancelToken = token) -> None:
            if (stage, done) == (part, 1):
                token.cancel()

        run = TrainingRun(folder=tmp_path, tracker="none", cancel=token)
        with pytest.raises(Interrupted, match="stopped after step 1 of 2"):
            Glad.from_base("small", settings=QUICK).fit(category, run=run, progress=stop)
    resumed = Glad.from_base("small", settings=QUICK).fit(category, run=TrainingRun(folder=tmp_path, tracker="none"))
    assert resumed.model_id == detector.model_id


def test_two_processes_decide_as_one_image_at_a_time_does(fitted, category, tmp_path):
    detector, folder = fitted
    command = [*("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gladad", "predict"), folder / "model"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gladad.__file__).parents[1])}
    process = [sys.executable, *map(str, [*command, category / "test", "-o", tmp_path / "found"])]
    done = subprocess.run(process, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in rows:
            alone = detector.inspect(row["image_path"])
            assert (alone.pred_score, alone.pred_label, alone.step) == (row["pred_score"], bool(row["pred_label"]), row["step"])
    finally:
        torch.set_num_threads(threads)


def test_latents_of_the_trained_autoencoder_have_unit_variance(fitted, category):
    detector, _ = fitted
    pipeline = detector.model_.pipeline
    images = torch.stack([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])
    assert pipeline.vae.config.scaling_factor != 0.18215  # that of Stable Diffusion
    assert pipeline.encode(images).isfinite().all()


def test_delta_and_a_calibrated_mask_follow_from_the_good_images(fitted, category):
    detector, _ = fitted
    resolved = detector.model_.config.settings.reconstruction
    assert resolved.step_threshold != 0.35 and resolved.fusion_center == 0
    calibrated = Glad.from_base("small", settings=QUICK | {"reconstruction.fusion": "calibrated"}).fit(category)
    resolved = calibrated.model_.config.settings.reconstruction
    assert resolved.fusion_center == resolved.step_threshold > 0 and resolved.fusion_width == resolved.step_threshold / 4


@pytest.mark.parametrize(("values", "apart"), [({}, 8), ({"training.apart": 0.0}, 0)])
def test_delta_is_set_by_images_that_no_training_has_seen(values, apart):
    products = {
        name: [np.full((64, 64, 3), first + 8 * number, dtype=np.uint8) for number in range(24)] for name, first in (("a", 0), ("b", 4))
    }
    settings = make_settings("small", QUICK | values)
    totals: dict[str, int] = {}
    training = Training(
        "small", settings, (64, 64), dict.fromkeys(products, "all"), progress=lambda stage, _, total: totals.update({stage: total})
    )
    models = family.train(products, training)
    assert totals["latents"] == 2 * (24 - apart)
    for name, images in products.items():
        learnt, usual = family._divided(images, settings.training, None)
        assert totals[f"{name}: step search"] == len(usual) == (apart or 24)
        if apart and name == "a":
            resolved = models[name].config.settings.reconstruction
            assert resolved.step_threshold == family.usual_gap(models[name], usual, "", lambda *_: None)
            assert resolved.step_threshold != family.usual_gap(models[name], learnt, "", lambda *_: None)
            again = family.adjust(models[name], images, models[name].config.settings, lambda *_: None)
            assert again.config == models[name].config


def divided(count: int, photographs: list[int] | None = None, **values: object) -> tuple[list[int], list[int]]:
    """Numbers of the images that are trained on, and of those that delta is set by."""
    images = [np.full((1, 1, 3), number, dtype=np.uint8) for number in range(count)]
    sides = family._divided(images, make_settings("small", QUICK | values).training, photographs)
    return tuple([int(image[0, 0, 0]) for image in side] for side in sides)


def test_how_images_are_divided():
    learnt, usual = divided(40)
    assert len(usual) == 8 and sorted(learnt + usual) == list(range(40))
    learnt, usual = divided(48, [number // 2 for number in range(48)])  # a photograph and its copies stay together
    assert len(usual) == 16 and not {number // 2 for number in learnt} & {number // 2 for number in usual}
    for count, values in ((23, {}), (40, {"training.apart": 0.0})):  # too few, or not wanted
        assert divided(count, **values) == (list(range(count)),) * 2
    assert len(divided(100, **{"training.apart": 0.9})[1]) == 33  # most are trained on, whatever is asked for


def test_of_one_photograph_all_is_trained_on(category):
    totals: dict[str, int] = {}
    only = sorted((category / "train" / "good").iterdir())[:1]
    Glad.from_base("small", settings=QUICK | {"calibration": "auto", "shots": 1}).fit(
        only, progress=lambda stage, _, total: totals.update({stage: total})
    )
    assert totals["latents"] == totals["step search"] >= 24


def test_an_adjusted_model_is_that_of_a_fit_and_the_first_one_stays(fitted, category):
    detector, folder = fitted
    settings = QUICK | {"reconstruction.adaptive": False, "reconstruction.max_step": 500, "guidance_scale": 2.0}
    adjusted = Glad.from_pretrained(folder / "model").adjust(category, settings)
    whole = Glad.from_base("small", settings=settings).fit(category)
    defect = sorted((category / "test" / "hole").iterdir())[0]
    assert adjusted.inspect(defect).pred_score == whole.inspect(defect).pred_score != detector.inspect(defect).pred_score
    assert detector.model_.pipeline.guidance_scale == 1
    with pytest.raises(ConfigError, match="training cannot be changed without another fit"):
        detector.adjust(category, QUICK | {"training.steps": 3})


def test_reconstructions_are_compared_with_the_input_or_what_the_autoencoder_makes_of_it(fitted, category):
    detector, folder = fitted
    model = detector.model_
    pixels = load_image(sorted((category / "test" / "hole").iterdir())[0])
    maps = {way: model.adjusted(replace(model.config.settings, reference=way)).inspect(pixels).map for way in ("input", "decoded", "both")}
    np.testing.assert_allclose(maps["both"], maps["input"] + maps["decoded"], rtol=1e-6)
    resized = resize_pixels(pixels, model.image_size)
    own = model.pipeline.decode(model.pipeline.encode(to_tensor(resized)[None]))
    rebuilt = model.pipeline.decode(model.rebuild(to_tensor(resized)[None], model.config.chain).latent)
    wanted = model.pipeline.score_maps(own, rebuilt, model.config.settings.scoring, model.config.feature_size)
    np.testing.assert_array_equal(maps["decoded"], wanted[0, 0].numpy())
    adjusted = Glad.from_pretrained(folder / "model").adjust(category, QUICK | {"reference": "both"})
    assert adjusted.calibration_.threshold.value > detector.calibration_.threshold.value


def test_a_fit_takes_the_autoencoder_of_another_model(fitted, category, tmp_path):
    detector, folder = fitted
    stages: set[str] = set()
    settings = QUICK | {"vae": str(folder / "model"), "seed": 1}
    taken = Glad.from_base("small", settings=settings).fit(category, progress=lambda stage, done, total: stages.add(stage))
    weights = [model.model_.pipeline.vae.state_dict() for model in (detector, taken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) and "autoencoder" not in stages
    assert taken.model_id != detector.model_id
    AutoencoderKL().save_pretrained(tmp_path / "coarse")
    with pytest.raises(ConfigError, match="coarse has no latents of 4 channels and 8 pixels per cell"):
        Glad.from_base("small", settings=QUICK | {"vae": str(tmp_path / "coarse")}).fit(category)
    with pytest.raises(ModelFormatError, match="is neither a folder nor"):
        Glad.from_base("small", settings=QUICK | {"vae": "not/there", "offline": True}).fit(category)


def test_minutes_end_both_trainings_and_are_kept_to_after_a_stop(category, tmp_path):
    settings = QUICK | {"training.minutes": 1e-6, "training.steps": 50, "autoencoder.steps": 50}
    steps: dict[str, int] = {}

    def count(stage: str, done: int, total: int) -> None:
        if stage in ("autoencoder", "denoiser"):
            steps[stage] = steps.get(stage, 0) + 1
            assert done == total == 1  # the first step is the last one

    run = TrainingRun(folder=tmp_path, tracker="none")
    first = Glad.from_base("small", settings=settings).fit(category, run=run, progress=count)
    assert steps == {"autoencoder": 1, "denoiser": 1}
    again = Glad.from_base("small", settings=settings).fit(category, run=run, progress=count)
    assert steps == {"autoencoder": 1, "denoiser": 1} and again.model_id == first.model_id


def test_figures_of_search_and_fusion_are_drawn(fitted, category, tmp_path, capsys):
    _, folder = fitted
    script = runpy.run_path(str(Path(gladad.__file__).parents[2] / "scripts" / "image_space_figures.py"))
    script["main"]([str(folder / "model"), str(category), "-o", str(tmp_path), "--steps", "350", "750"])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("gaps.png", "steps.png", "sizes.png", "reconstructions.jpg", "numbers.md", "records.json")
    }
    records = json.loads((tmp_path / "records.json").read_text())
    detector = Glad.from_pretrained(folder / "model")
    delta = detector.model_.config.chain.step_threshold
    for each in records:
        reached = [t for t, gap in zip(TIMESTEPS, each["trace"], strict=True) if gap > delta]
        assert each["step"] == (reached[0] if reached else TIMESTEPS[-1])  # that of the first gap above delta, or the last one compared
        assert ("area" in each) == bool(each["gt_label"])
    assert "delta reached by" in capsys.readouterr().out


def test_its_extractor_is_tuned(fitted, category, tmp_path):
    _, folder = fitted
    options = ["-o", str(tmp_path / "tuned"), "--steps", "2", "--batch-size", "4", "--tracker", "none"]
    assert main(["tune-features", str(folder / "model"), str(category), *options]) == 0
    before, tuned = Glad.from_pretrained(folder / "model"), Glad.from_pretrained(tmp_path / "tuned")
    assert set(tuned.model_.pipeline.tuned_weights()) == {name for name, _ in before.model_.pipeline.features.mlp_parameters((1, 2, 3))}
    image = sorted((category / "test" / "hole").iterdir())[0]
    one, other = before.inspect(image), tuned.inspect(image)
    assert one.step == other.step and one.pred_score != other.pred_score


def test_prompts_tell_products_apart():
    one, other = small.prompt_embeds("a photo of one"), small.prompt_embeds("a photo of another")
    assert one.shape == (2, 1, small.PROMPT_WIDTH) and not one[1].any()
    assert torch.equal(one, small.prompt_embeds("a photo of one")) and not torch.equal(one, other)


def test_there_is_nothing_to_adopt(category):
    with pytest.raises(ConfigError, match=r"training\.steps: small starts from random weights"):
        Glad.from_base("small", settings=QUICK | {"training.steps": 0}).fit(category)


@pytest.mark.parametrize(
    ("values", "key"),
    [({"training.method": "lora"}, r"training\.method"), ({"revision": "main"}, "revision"), ({"preset": "mvtec_ad/bottle"}, "preset")],
)
def test_what_it_cannot_take_is_refused(category, values, key):
    with pytest.raises(ConfigError, match=f"^{key}: small starts from random weights"):
        Glad.from_base("small", settings=values).fit(category)


def test_its_defaults_are_its_own():
    settings = make_settings("small", {"training.steps": 10})
    assert settings.image_size == 256 and settings.training.method == "full" and settings.autoencoder.steps == 2000
    assert make_settings("sd14").autoencoder is None


def test_precision_is_the_machines_and_models_of_bfloat16_inspect_in_float32_where_it_is_emulated(fitted, category, tmp_path, monkeypatch):
    native = fast_dtype(torch.device("cpu"))
    settings = make_settings("small", {})
    assert DTYPES[settings.training.precision] == DTYPES[settings.autoencoder.precision] == native
    detector, _ = fitted
    defect = sorted((category / "test" / "hole").iterdir())[0]
    model = detector.model_
    stored = replace(model.config.settings, training=replace(model.config.settings.training, precision="bfloat16"))
    model.adjusted(stored).save(tmp_path)
    config = to_json(replace(model.config, settings=stored))
    monkeypatch.setenv(FLOAT32, "1")
    assert make_settings("small", {}).training.precision == "float32"
    loaded = StableDiffusion.load(tmp_path, config)
    assert {network.dtype for network in (loaded.pipeline.unet, loaded.pipeline.vae)} == {torch.float32}
    assert loaded.inspect(load_image(defect)).score == pytest.approx(model.inspect(load_image(defect)).score, rel=0.1)


def test_the_extractor_is_saved_and_read_back(tmp_path):
    features = PyramidFeatures.pretrained()
    image = torch.rand(1, 3, 64, 96)
    maps = features(image)
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 24), (8, 12), (4, 6)]
    assert torch.equal(features(image, layers=(3,))[0], maps[2])
    assert features.nearest_size((70, 100)) == (64, 96)
    features.save_pretrained(tmp_path / "features")
    again = PyramidFeatures.from_pretrained(tmp_path / "features")
    assert all(torch.equal(a, b) for a, b in zip(again(image), maps, strict=True))
    (tmp_path / "features" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelFormatError, match="is no folder of efficientnet-lite0"):
        PyramidFeatures.from_pretrained(tmp_path / "features")
    names = [name for name, _ in features.mlp_parameters([3, 1])]
    trained = [f"network.blocks.{block}.{part}.conv" for block in (2, 10) for part in ("expand", "project")]
    assert names == [f"{name}.{kind}" for name in trained for kind in ("weight", "bias")]
    with pytest.raises(ConfigError, match="maps 1 to 3, not 4"):
        features.mlp_parameters([4])


def test_an_adjusted_model_keeps_the_adapter_of_the_one_it_was_loaded_as(tiny_base, category, tmp_path):
    settings = {name: value for name, value in QUICK.items() if not name.startswith("autoencoder")}
    Glad.from_base(str(tiny_base), settings=settings).fit(category).save_pretrained(tmp_path / "model")
    adjusted = Glad.from_pretrained(tmp_path / "model").adjust(category, settings | {"reconstruction.adaptive": False})
    gc.collect()  # nothing but the adjusted detector is left of the loaded one
    defect = sorted((category / "test" / "hole").iterdir())[0]
    found = adjusted.inspect(defect).pred_score
    adjusted.save_pretrained(tmp_path / "adjusted")
    assert Glad.from_pretrained(tmp_path / "adjusted").inspect(defect).pred_score == found
