"""Fine-tuning of the autoencoder, on a tiny base of real classes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_part
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import ViTConfig, ViTModel

from gladad.core.errors import ConfigError, DataError
from gladad.core.images import resize_pixels
from gladad.core.storage import FORMAT, WriteError, write_json
from gladad.core.tensors import to_tensor
from gladad.features.vit import DinoFeatures
from gladad.models.stable_diffusion.autoencoder_tuning import (
    AUTOENCODER_FORMAT,
    AutoencoderTask,
    AutoencoderTuningConfig,
    save_autoencoder,
    tune_autoencoder,
)
from gladad.models.stable_diffusion.components import Sources, locate_base
from gladad.models.stable_diffusion.folders import check_replaceable
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training_inputs import image_of_sample
from gladad.training.loop import TrainingRun, draw_generator

SIDE = 32
IMAGES = [resize_pixels(np.asarray(draw_part(seed)[0]), (SIDE, SIDE)) for seed in range(4)]
QUICK = AutoencoderTuningConfig(steps=6, batch_size=2, learning_rate=1e-3, gradient_checkpointing=False)
GAN = replace(QUICK, discriminator=True, discriminator_start=2, discriminator_weight=1.0)


@pytest.fixture
def vae(tiny_base: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_base / "sd" / "vae").eval()


@pytest.fixture
def features(tiny_base: Path) -> DinoFeatures:
    return DinoFeatures.from_pretrained(tiny_base / "dino")


def tuned(vae: Any, features: Any, config: AutoencoderTuningConfig, **more: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a training of a copy."""
    vae = copy.deepcopy(vae)
    return tune_autoencoder(vae, features, IMAGES, config, **more), vae.state_dict()


def same(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weight, others[name]) for name, weight in weights.items())


def moved(module: torch.nn.Module) -> bool:
    """Whether some gradient has reached a module."""
    return any(weight.grad is not None and bool(weight.grad.any()) for weight in module.parameters())


# ------------------------------------------------------------------------------------------------------- what it does


@torch.no_grad()
def error(vae: Any) -> float:
    images = torch.stack([to_tensor(image) for image in IMAGES]) * 2 - 1
    return float(F.l1_loss(vae.decode(vae.encode(images).latent_dist.mean).sample, images))


def test_it_learns_to_rebuild(vae: Any, features: Any) -> None:
    frozen, before = copy.deepcopy(features.state_dict()), error(vae)
    told: list[tuple[str, int, int]] = []
    losses = tune_autoencoder(vae, features, IMAGES, replace(QUICK, steps=40, learning_rate=3e-3), progress=lambda *what: told.append(what))
    assert told == [("autoencoder", done, 40) for done in range(1, 41)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert error(vae) < 0.7 * before
    assert not vae.training
    assert not any(weight.requires_grad for weight in vae.parameters())
    assert same(frozen, features.state_dict())
    assert all(weight.grad is None for weight in features.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("patch_size", "size"), [(8, 32), (12, 36)])
def test_the_loss(vae: Any, patch_size: int, size: int) -> None:
    """Against diffusers' own divergence, and the squared distance of unit vectors as twice ``1 - cos``."""
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "initializer_range": 0.2}
    features: Any = DinoFeatures(ViTModel(ViTConfig(**shape, image_size=64, patch_size=patch_size), add_pooling_layer=False)).eval()
    config = replace(QUICK, kl_weight=0.1, perceptual_weight=0.5, batch_size=3)
    task = AutoencoderTask(vae, features, IMAGES, config)
    samples = [0, 2]
    images = torch.stack([to_tensor(IMAGES[image_of_sample(0, 3 * 5 + sample, len(IMAGES))]) for sample in samples]) * 2 - 1
    posterior = vae.encode(images).latent_dist
    noise = torch.stack([torch.randn(4, SIDE // 8, SIDE // 8, generator=draw_generator(0, 5, sample)) for sample in samples])
    rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
    expected = F.l1_loss(rebuilt, images) + 0.1 * posterior.kl().sum() / (2 * 3 * SIDE * SIDE)
    pair = [features(F.interpolate(x / 2 + 0.5, (size, size), mode="bilinear", align_corners=True)) for x in (images, rebuilt)]
    distances = [2 * (1 - F.cosine_similarity(one, other, dim=1)).mean() for one, other in zip(*pair, strict=True)]
    expected += 0.5 * sum(distances) / 4
    assert float(task.loss(task.module, 5, samples)) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_a_sample_depends_on_its_numbers_alone(vae: Any, features: Any) -> None:
    task = AutoencoderTask(vae, features, IMAGES, GAN)
    alone = [float(task.loss(task.module, 3, [sample])) for sample in (0, 1)]
    assert float(task.loss(task.module, 3, [0, 1])) == pytest.approx(np.mean(alone), rel=1e-5)
    assert float(task.loss(task.module, 4, [0])) != alone[0]


def test_memory_saved_changes_nothing(vae: Any, features: Any) -> None:
    losses, weights = tuned(vae, features, replace(QUICK, steps=2))
    again, other = tuned(vae, features, replace(QUICK, steps=2, gradient_checkpointing=True))
    assert losses == again
    assert same(weights, other)
    pieces, _ = tuned(vae, features, replace(QUICK, steps=2, micro_batch=1))
    assert pieces == pytest.approx(losses, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ discriminator


def test_autoencoder_and_discriminator_learn_from_their_own_loss_only(vae: Any, features: Any) -> None:
    module: Any = AutoencoderTask(vae.requires_grad_(True), features, IMAGES, GAN).module
    images = torch.stack([to_tensor(image) for image in IMAGES]) * 2 - 1
    module(images, torch.zeros(4, 4, 4, 4), True).generator_loss.backward()
    assert moved(module.vae)
    assert all(weight.grad is None for weight in module.discriminator.parameters())
    module.zero_grad(set_to_none=True)
    module(images, torch.zeros(4, 4, 4, 4), True).discriminator_loss.backward()
    assert moved(module.discriminator)
    assert all(weight.grad is None for weight in module.vae.parameters())


@torch.no_grad()
def test_the_discriminators_losses_are_those_of_a_hinge(vae: Any, features: Any) -> None:
    module: Any = AutoencoderTask(vae, features, IMAGES, GAN).module
    images = torch.stack([to_tensor(image) for image in IMAGES]) * 2 - 1
    passed = module(images, torch.zeros(4, 4, 4, 4), True)
    real, fake = module.discriminator(images).double(), module.discriminator(passed.reconstruction).double()
    assert real.shape == (4, 1, SIDE // 8, SIDE // 8)
    assert float(passed.generator_loss) == pytest.approx(float(-fake.mean()), rel=1e-4)
    expected = ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2
    assert float(passed.discriminator_loss) == pytest.approx(float(expected), rel=1e-4)
    assert module(images, torch.zeros(4, 4, 4, 4)).generator_loss == 0


def test_the_discriminator_guides_from_its_step_on(vae: Any, features: Any) -> None:
    free = replace(QUICK, gradient_clip=1e9)  # a clipped gradient would be that of both together
    _, without = tuned(vae, features, free)
    _, watched = tuned(vae, features, replace(GAN, gradient_clip=1e9, discriminator_start=6))
    _, guided = tuned(vae, features, replace(GAN, gradient_clip=1e9, discriminator_start=5))
    assert same(without, watched)
    assert not same(without, guided)


# ---------------------------------------------------------------------------------------------- saving and going on


def test_an_interrupted_tuning_goes_on_bit_for_bit(vae: Any, features: Any, tmp_path: Path) -> None:
    config = replace(GAN, ema=0.5)
    expected, weights = tuned(vae, features, config)

    def stop(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise RuntimeError("power cut")

    run = TrainingRun(folder=tmp_path, checkpoint_every=2, tracker="none", sample_every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        tuned(vae, features, config, run=run, progress=stop)
    lines: list[str] = []
    losses, again = tuned(vae, features, config, run=replace(run, tell=lines.append))
    assert lines == ["going on after step 4 of 6"]
    assert losses == expected
    assert same(weights, again)
    assert (tmp_path / "examples" / "image-and-reconstruction-0000006.png").is_file()

    longer = replace(config, steps=8, micro_batch=1, gradient_checkpointing=True)  # may be asked for
    assert tuned(vae, features, longer, run=run)[0][:6] == expected
    with pytest.raises(ConfigError, match=r"another training \(tuning differ"):
        tuned(vae, features, replace(config, kl_weight=0.0), run=run)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    with pytest.raises(ConfigError, match=r"another training \(vae differ"):
        tuned(vae, features, config, run=run)


def test_the_saved_folder_serves_as_an_autoencoder(vae: Any, tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    before = copy.deepcopy(vae.state_dict())
    for shift in (1, 2):  # a second one replaces the first
        with torch.no_grad():
            vae.decoder.conv_out.bias.fill_(shift)
        check_replaceable(folder, AUTOENCODER_FORMAT)
        save_autoencoder(vae, folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors", "model.json"}
        assert same(vae.state_dict(), AutoencoderKL.from_pretrained(folder).state_dict())
    pipeline = GladPipeline.from_base(tiny_base, vae=folder)
    assert same(vae.state_dict(), pipeline.vae.state_dict())
    assert not same(before, pipeline.vae.state_dict())
    assert pipeline.origin is not None
    assert pipeline.origin.vae == locate_base(Sources(tiny_base, vae=folder)).origin.vae


def test_other_folders_are_not_overwritten(vae: Any, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "plain")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.json").write_text("{")
    (tmp_path / "detector").mkdir()
    write_json(tmp_path / "detector" / "model.json", {"format": FORMAT})
    for folder in (tmp_path / "plain", tmp_path / "damaged", tmp_path / "detector"):
        held = sorted(folder.iterdir())
        with pytest.raises(WriteError, match="is no earlier gladad-autoencoder"):
            save_autoencoder(vae, folder)
        assert sorted(folder.iterdir()) == held
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="is not a folder"):
        check_replaceable(tmp_path / "file", AUTOENCODER_FORMAT)


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_trained_on(vae: Any, features: Any) -> None:
    for images, message in (
        ([], "no images to train on"),
        ([IMAGES[0], IMAGES[1][:16]], "same size"),
        ([IMAGES[0][..., 0]], r"image 0 must be \[H, W, 3\] uint8, not \[32, 32\] uint8"),
    ):
        with pytest.raises(DataError, match=message):
            tune_autoencoder(vae, features, images, QUICK)
    with pytest.raises(ConfigError, match=r"multiples of 8, got 20x32 \(height x width\)"):
        tune_autoencoder(vae, features, [IMAGES[0][:20]], QUICK)
    with pytest.raises(ConfigError, match=r"in float32, not torch\.bfloat16"):
        tune_autoencoder(vae.to(torch.bfloat16), features, IMAGES, QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -1.0}, "^kl_weight: input should be greater than or equal to 0"),
        ({"perceptual_weight": float("nan")}, "^perceptual_weight: input should be a finite number"),
        ({"discriminator_start": -1}, "^discriminator_start: input should be greater than or equal to 0"),
        ({"batch_size": 0}, "^batch_size: input should be greater than or equal to 1"),
        ({"micro_batch": 0}, "^micro_batch: input should be greater than or equal to 1"),
        ({"ema": 1.0}, "^ema: input should be less than 1"),
        ({"seed": -1}, "^seed: input should be greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderTuningConfig(**settings)
