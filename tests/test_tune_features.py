"""Fine-tuning of the extractor that scores, on a tiny base of real classes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_part
from numpy.typing import NDArray
from torch import Tensor

from gladad.algorithm import ReconstructionConfig, ScoringConfig, image_noise, reconstruct
from gladad.core.errors import ConfigError, DataError
from gladad.core.images import resize_pixels
from gladad.core.tensors import to_tensor
from gladad.models.family import Training
from gladad.models.stable_diffusion import family
from gladad.models.stable_diffusion.extractor_tuning import FeatureTask, FeatureTuningConfig, features_distance, tune_features
from gladad.models.stable_diffusion.model import StableDiffusion
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.settings import DenoiserSettings, StableDiffusionConfig, StableDiffusionSettings
from gladad.models.stable_diffusion.training_inputs import image_of_sample
from gladad.training.loop import TrainingRun, train

SIDE = 32
IMAGES = [resize_pixels(np.asarray(draw_part(seed)[0]), (SIDE, SIDE)) for seed in range(5)]
QUICK = FeatureTuningConfig(steps=6, batch_size=4, learning_rate=3e-3, feature_size=(SIDE, SIDE))


def make_base(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    settings = StableDiffusionSettings(
        reconstruction=ReconstructionConfig(max_step=600, noise_step=599, num_steps=10, min_step=300, top_k=2),
        scoring=ScoringConfig(top_k=20, blur_sigma=2.0, blur_kernel=9),
        training=DenoiserSettings(precision="float32" if dtype == torch.float32 else "bfloat16", rank=2, batch_size=2, pool=2),
        calibrate_step=False,
    )
    config = StableDiffusionConfig(settings=settings, image_size=(SIDE, SIDE))
    return StableDiffusion(config, GladPipeline.from_base(folder, torch_dtype=dtype))


@pytest.fixture
def base(tiny_base: Path) -> StableDiffusion:
    return make_base(tiny_base)


def stack(images: list[NDArray[np.uint8]]) -> Tensor:
    return torch.stack([to_tensor(image) for image in images])


# ------------------------------------------------------------------------------------------------------- what it does


def test_losses_fall_scores_change_and_the_search_does_not(base: StableDiffusion) -> None:
    latent = image_noise((4, 4, 4), 0)
    frozen = copy.deepcopy(base.pipeline.features.state_dict())
    search, before = base.pipeline.latent_features(latent), base.inspect(IMAGES[0])
    losses = tune_features(base, IMAGES, replace(QUICK, steps=30))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    after = base.inspect(IMAGES[0])
    assert after.score < before.score  # of a training image, whose reconstruction it learnt to overlook
    assert torch.equal(base.pipeline.latent_features(latent), search)
    assert torch.equal(after.latent, before.latent)
    assert all(torch.equal(frozen[name], weight) for name, weight in base.pipeline.features.state_dict().items())


def test_only_the_mlps_learn(base: StableDiffusion) -> None:
    task = FeatureTask(base, IMAGES, QUICK)
    train(task, QUICK.loop(len(IMAGES), "float32"), stage="features")
    frozen = base.pipeline.features
    differ = {name for name, weight in task.module.state_dict().items() if not torch.equal(weight, frozen.state_dict()[name])}
    assert differ == {name for name, _ in frozen.mlp_parameters(frozen.default_layers)}


def test_a_second_tuning_starts_from_the_frozen_extractor(base: StableDiffusion) -> None:
    first = tune_features(base, IMAGES, QUICK)
    weights = base.pipeline.tuned_weights()
    assert tune_features(base, IMAGES, QUICK) == first
    again = base.pipeline.tuned_weights()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_the_anchor_holds_features_near_the_frozen_ones(base: StableDiffusion) -> None:
    images = stack(IMAGES)
    moved = []
    for anchor in (0.0, 1.0, 30.0):
        tune_features(base, IMAGES, replace(QUICK, steps=15, anchor_weight=anchor))
        pairs = zip(base.pipeline.scoring_features(images), base.pipeline.features(images), strict=True)
        moved.append(sum(float(features_distance(a, b)) for a, b in pairs))
    assert moved[0] > 1.2 * moved[1] > 1.2 * moved[2]


@torch.no_grad()
def test_reconstructions_are_plain_ddim(base: StableDiffusion) -> None:
    task = FeatureTask(base, IMAGES[:2], replace(QUICK, feature_size=(24, 17)))
    pipeline = base.pipeline
    image = stack(IMAGES[:2])
    latent = pipeline.encode(image)
    noise = image_noise(latent.shape[1:], base.config.settings.seed).expand_as(latent)
    chain = ReconstructionConfig(max_step=200, num_steps=3, adaptive=False)  # the base's stride is 60
    rebuilt = pipeline.decode(reconstruct(pipeline, latent, noise, pipeline.schedule, chain).latent)
    for place, expected in enumerate((image, rebuilt)):
        resized = F.interpolate(expected, (24, 16), mode="bilinear", align_corners=True)
        torch.testing.assert_close(task.pairs[:, place].float(), resized, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_loss_is_the_published_formula(base: StableDiffusion) -> None:
    """Against a plain reading in float64: ``1 - cos`` of all of an image's tokens as one vector, mean over images, sum over layers."""
    config = replace(QUICK, anchor_weight=0.5, batch_size=3)
    task = FeatureTask(base, IMAGES, config)
    for weight in task.trained.values():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))

    def distance(one: Tensor, other: Tensor) -> float:
        a, b = one.double().numpy().ravel(), other.double().numpy().ravel()
        return float(1 - a @ b / np.sqrt((a @ a) * (b @ b)))

    samples, expected = [0, 2], 0.0
    for sample in samples:
        image, rebuilt = task.pairs[image_of_sample(config.seed, 3 * 1 + sample, len(IMAGES))].float()
        tuned, frozen = [[network(x[None]) for x in (image, rebuilt)] for network in (task.module, base.pipeline.features)]
        for layer in range(4):
            expected += distance(tuned[0][layer], tuned[1][layer]) / len(samples)
            expected += 0.5 * sum(distance(tuned[part][layer], frozen[part][layer]) for part in (0, 1)) / len(samples)
    assert float(task.loss(task.module, 1, samples)) == pytest.approx(expected, rel=1e-4)


def test_micro_batches_change_nothing(base: StableDiffusion) -> None:
    whole = tune_features(base, IMAGES, replace(QUICK, steps=3))
    pieces = tune_features(base, IMAGES, replace(QUICK, steps=3, micro_batch=3))
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_a_base_in_half_precision(tiny_base: Path) -> None:
    base = make_base(tiny_base, torch.bfloat16)
    task = FeatureTask(base, IMAGES, QUICK)
    assert task.frozen.dtype == task.module.dtype == torch.float32
    before = base.inspect(IMAGES[0]).score
    tune_features(base, IMAGES, replace(QUICK, steps=2))
    assert base.pipeline.scoring_features.dtype == base.pipeline.features.dtype == torch.bfloat16
    assert base.inspect(IMAGES[0]).score != before


# ---------------------------------------------------------------------------------------------------------- budget


def test_every_image_is_shown_once_per_epoch() -> None:
    shown = [image_of_sample(3, number, 7) for number in range(21)]
    assert all(Counter(shown[start : start + 7]) == Counter(range(7)) for start in (0, 7, 14))
    assert shown[:7] != shown[7:14]
    assert shown != [image_of_sample(4, number, 7) for number in range(21)]


def test_the_budget() -> None:
    assert FeatureTuningConfig(epochs=3, batch_size=4).loop(5, "float32").steps == 4  # 15 images
    assert FeatureTuningConfig(epochs=3, steps=9).loop(5, "bfloat16").steps == 9
    chains = [
        FeatureTuningConfig().reconstruction(usual) for usual in (ReconstructionConfig(), ReconstructionConfig(max_step=450, num_steps=15))
    ]
    assert [(chain.max_step, chain.num_steps, chain.adaptive, chain.noise_step) for chain in chains] == [(200, 6, False, None)] * 2
    assert FeatureTuningConfig(start_timestep=10).reconstruction(ReconstructionConfig()).num_steps == 1
    assert FeatureTuningConfig(num_steps=15).reconstruction(ReconstructionConfig()).num_steps == 15


# ---------------------------------------------------------------------------------------------- saving and going on


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_scores_the_same(tiny_base: Path, tmp_path: Path, method: str) -> None:
    base = make_base(tiny_base)
    if method == "lora":
        settings = replace(base.config.settings, training=replace(base.config.settings.training, steps=1))
        base = family.train({"": IMAGES}, Training(str(tiny_base), settings, (SIDE, SIDE), {"": "all"}))[""]
    tune_features(base, IMAGES, replace(QUICK, steps=2))
    expected = base.inspect(IMAGES[0])
    loaded = StableDiffusion.load(tmp_path, base.save(tmp_path))
    assert loaded.pipeline.tuned_weights().keys() == base.pipeline.tuned_weights().keys()
    assert loaded.inspect(IMAGES[0]).score == expected.score


def test_an_interrupted_tuning_goes_on_bit_for_bit(base: StableDiffusion, tmp_path: Path) -> None:
    told = []
    expected = tune_features(base, IMAGES, QUICK, progress=lambda *what: told.append(what))
    weights = base.pipeline.tuned_weights()
    assert told == [("reconstructions", n, 5) for n in range(1, 6)] + [("features", n, 6) for n in range(1, 7)]

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("features", 5):
            raise RuntimeError("power cut")

    run = TrainingRun(folder=tmp_path, checkpoint_every=2, tracker="none", sample_every=2)
    base.pipeline.tune_scoring({})
    with pytest.raises(RuntimeError, match="power cut"):
        tune_features(base, IMAGES, QUICK, run=run, progress=stop)
    assert not base.pipeline.tuned_weights()  # nothing of an unfinished one
    lines: list[str] = []
    assert tune_features(base, IMAGES, QUICK, run=replace(run, tell=lines.append)) == expected
    assert lines == ["going on after step 4 of 6"]
    again = base.pipeline.tuned_weights()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert (tmp_path / "examples" / "image-and-reconstruction-0000006.png").is_file()

    longer = tune_features(base, IMAGES, replace(QUICK, steps=8, micro_batch=2), run=run)  # more steps may be asked for
    assert (len(longer), longer[:6]) == (8, expected)
    for other, differs in ((replace(QUICK, anchor_weight=0.5), "anchor_weight"), (replace(QUICK, start_timestep=100), "reconstruction")):
        with pytest.raises(ConfigError, match=rf"another training \({differs} differ"):
            tune_features(base, IMAGES, other, run=run)
    with torch.no_grad():
        base.pipeline.unet.conv_in.bias += 1
    with pytest.raises(ConfigError, match=r"another training \(unet differ"):
        tune_features(base, IMAGES, QUICK, run=run)


# ------------------------------------------------------------------------------------------------------------- errors


def test_images_that_cannot_be_used(base: StableDiffusion) -> None:
    with pytest.raises(DataError, match="no images to train on"):
        tune_features(base, [], QUICK)
    with pytest.raises(DataError, match="images of 16x32 pixels for a base of 32x32"):
        tune_features(base, [IMAGES[0][:16]], QUICK)
    with pytest.raises(DataError, match="same size"):
        tune_features(base, [IMAGES[0], IMAGES[0][:16]], QUICK)
    with pytest.raises(DataError, match=r"image 1 must be \[H, W, 3\] uint8, not \[32, 32, 3\] float64"):
        tune_features(base, [IMAGES[0], IMAGES[0] / 255], QUICK)


def test_bases_that_cannot_be_tuned(base: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match="only the extractor of a diffusers base can be tuned; this detector's base is lite"):
        tune_features(SimpleNamespace(kind="lite"), IMAGES, QUICK)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="below the denoiser's 1000 timesteps, not be 1000"):
        tune_features(base, IMAGES, replace(QUICK, start_timestep=1000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "^epochs: input should be greater than or equal to 1, not 0"),
        ({"anchor_weight": -0.1}, "^anchor_weight: input should be greater than or equal to 0"),
        ({"anchor_weight": float("nan")}, "^anchor_weight: input should be a finite number"),
        ({"start_timestep": 0}, "^start_timestep: input should be greater than or equal to 1"),
        ({"num_steps": 201}, r"num_steps must lie in 1\.\.\.200"),
        ({"batch_size": 0}, "^batch_size: input should be greater than or equal to 1"),
        ({"feature_size": (0, 8)}, r"^feature_size\.0: input should be greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureTuningConfig(**settings)  # type: ignore[arg-type]
