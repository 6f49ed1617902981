"""Fine-tuning of the autoencoder on normal images of a product (METHOD, "VAE fine-tuning"), before the denoiser is trained in its latents.

The loss is that of latent diffusion's KL autoencoder (arXiv 2112.10752): absolute difference, a perceptual distance, a light pull of the
latents towards a standard normal, and if wanted a discriminator of patches. The perceptual distance is that of the extractor which the
detector compares images with, instead of LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gladad.core.errors import ConfigError
from gladad.core.records import Progress, no_progress
from gladad.core.settings import to_json, validated
from gladad.core.tensors import to_pixels, to_tensor
from gladad.features.pyramid import PyramidFeatures
from gladad.features.vit import DinoFeatures
from gladad.models.family import Pixels
from gladad.models.stable_diffusion.components import latent_size
from gladad.models.stable_diffusion.device import choose_device
from gladad.models.stable_diffusion.folders import save_folder
from gladad.models.stable_diffusion.training_inputs import check_images, image_of_sample, loop_config, sha256_of_images, sha256_of_weights
from gladad.training.loop import FREE_OF_RESULT, LoopConfig, Precision, TrainingRun, draw_generator, train
from gladad.training.optimizers import OptimizerName

AUTOENCODER_FORMAT = "gladad-autoencoder"
Weight = Annotated[float, Field(ge=0)]


@validated
class AutoencoderTuningConfig:
    """How the autoencoder is fine-tuned."""

    steps: Annotated[int, Field(ge=0)] = 2000  # optimiser steps
    minutes: Annotated[float, Field(gt=0)] | None = None  # after which the training ends before
    batch_size: Annotated[int, Field(ge=1)] = 4  # images per step, of all processes together
    micro_batch: Annotated[int, Field(ge=1)] | None = None  # images at a time; None = all of a process's share
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5  # latent diffusion's, from nothing, is 4.5e-6 per image of a batch (Adam)
    optimizer: OptimizerName = "adamw"  # of the discriminator, too; adamw8bit needs bitsandbytes
    kl_weight: Weight = 1e-6  # of the latents' divergence from a standard normal, in nats over the image's number of values
    perceptual_weight: Weight = 1.0  # of the distance between patch features
    discriminator: bool = False  # train a discriminator of patches, too, and against it
    discriminator_weight: Weight = 0.1  # of what the discriminator says of reconstructions
    discriminator_start: Annotated[int, Field(ge=0)] = 500  # step from which it guides the autoencoder; it learns from the first
    gradient_checkpointing: bool = True  # compute activations twice instead of keeping them
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the averaged weights, which are then the ones kept; 0 = none
    precision: Precision = "float32"  # of the networks' arithmetic; fine detail is what this training is for
    seed: Annotated[int, Field(ge=0)] = 0  # of everything random

    def loop(self) -> LoopConfig:
        """The loop's settings."""
        return loop_config(self, weight_decay=0.0)


def tune_autoencoder(
    vae: Any,
    features: DinoFeatures | PyramidFeatures,
    images: Sequence[Pixels],
    config: AutoencoderTuningConfig,
    *,
    run: TrainingRun | None = None,
    progress: Progress = no_progress,
) -> list[float]:
    """Train an autoencoder in place, to rebuild normal images of a product; returns the loss of every step, with any discriminator's.

    The same seed and images give the same weights. Parts have an orientation, so there are no flips. Each image is shown once per epoch.

    Args:
        vae: A diffusers ``AutoencoderKL`` in float32. Its encoder learns, too; its ``scaling_factor`` stays.
        features: The frozen extractor, for the perceptual distance; in any dtype.
        images: ``[H, W, 3]`` uint8 normal images, of one size that the autoencoder accepts.
        config: How to train.
        run: Checkpoints, logs and examples.
        progress: Told of every step, as ``autoencoder``.

    Raises:
        ConfigError: The autoencoder is in half precision, or the images' sides are no multiples of its stride.
        DataError: There are no images, or they differ in size.
    """
    check_images(images)
    latent_size(vae, images[0].shape[:2])
    if vae.dtype != torch.float32:
        raise ConfigError(f"training needs the autoencoder in float32, not {vae.dtype}; its arithmetic is set by precision")
    device = choose_device()
    extractor: Any = features
    extractor.to(device).eval().requires_grad_(False)
    vae.to(device).requires_grad_(True)
    try:
        task = AutoencoderTask(vae, extractor, images, config)
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        return train(task, config.loop(), run, progress=progress, stage="autoencoder")
    finally:
        vae.disable_gradient_checkpointing()
        vae.requires_grad_(False).eval()


class Passed(NamedTuple):
    """What one call of `TrainedAutoencoder` makes of a batch."""

    reconstruction: Tensor  # [B, 3, H, W] float32, nominally in [-1, 1]
    mean: Tensor  # [B, C, h, w] float32 of the posterior
    logvar: Tensor  # of its variance, the same shape
    generator_loss: Tensor  # what the discriminator says of the reconstructions; no gradient of it reaches the discriminator
    discriminator_loss: Tensor  # how badly it tells them from images; no gradient of it reaches the autoencoder


class TrainedAutoencoder(nn.Module):
    """Autoencoder and discriminator as one module: data-parallel training wants all that is trained in one call."""

    def __init__(self, vae: nn.Module, discriminator: nn.Module | None = None):
        super().__init__()
        self.vae: Any = vae
        self.discriminator = discriminator

    def forward(self, images: Tensor, noise: Tensor, guided: bool = False) -> Passed:
        """Rebuild images ``[B, 3, H, W]`` in [-1, 1] from draws of the posterior, made by standard normal noise ``[B, C, h, w]``.

        Only if they are ``guided``, the discriminator is asked what it thinks of the reconstructions.
        """
        posterior = self.vae.encode(images).latent_dist
        rebuilt = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        generator_loss = discriminator_loss = rebuilt.new_zeros(())
        if self.discriminator is not None:
            # One optimiser trains both, because each one's loss sees the other as a constant, and it takes each layer by itself.
            if guided:
                constant = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
                generator_loss = -torch.func.functional_call(self.discriminator, constant, (rebuilt,)).float().mean()
            real, fake = self.discriminator(torch.cat([images, rebuilt.detach()])).float().chunk(2)
            discriminator_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # hinge
        return Passed(rebuilt, posterior.mean.float(), posterior.logvar.float(), generator_loss, discriminator_loss)


def patch_discriminator(seed: int, width: int = 64) -> nn.Sequential:
    """A small convolutional network ``[B, 3, H, W] -> [B, 1, H / 8, W / 8]``: how real each patch looks (PatchGAN, arXiv 1611.07004).

    Group norm in place of batch norm: what it says of an image depends on that image alone. The width is channels of the first layer.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(4 * width, 1, 3, padding=1))
    return nn.Sequential(*layers)


class AutoencoderTask:
    """The autoencoder, whose weights to train require a gradient, as a task of the training loop."""

    def __init__(self, vae: Any, features: Any, images: Sequence[Pixels], config: AutoencoderTuningConfig):
        self.features, self.images, self.config, self.device = features, images, config, vae.device
        settings = {name: value for name, value in to_json(config).items() if name not in {*FREE_OF_RESULT, "gradient_checkpointing"}}
        self.identity: dict[str, Any] = {
            "tuning": settings,
            "images": sha256_of_images(images),
            "vae": sha256_of_weights(vae.state_dict()),
            "features": sha256_of_weights(self.features.state_dict()),
        }
        self.module: nn.Module = TrainedAutoencoder(vae, patch_discriminator(config.seed) if config.discriminator else None)
        self.latent_shape = (vae.config.latent_channels, *latent_size(vae, images[0].shape[:2]))

    def loss(self, module: nn.Module, step: int, samples: Sequence[int]) -> Tensor:
        """Difference, perceptual distance and divergence, means over samples; with a discriminator, what it says and its own loss."""
        config, device = self.config, self.device
        numbers = [image_of_sample(config.seed, step * config.batch_size + sample, len(self.images)) for sample in samples]
        images = torch.stack([to_tensor(self.images[number]) for number in numbers]).to(device) * 2 - 1
        draws = [torch.randn(self.latent_shape, generator=draw_generator(config.seed, step, sample)) for sample in samples]
        passed: Passed = module(images, torch.stack(draws).to(device), step >= config.discriminator_start)
        total = F.l1_loss(passed.reconstruction, images)
        if config.perceptual_weight:
            total = total + config.perceptual_weight * self.perceptual(images, passed.reconstruction)
        divergence = (passed.mean.square() + passed.logvar.exp() - 1 - passed.logvar).sum() / 2
        # Latent diffusion sums both over the image. Here both are divided by its number of values, so the weight means the same.
        total = total + config.kl_weight * divergence / images.numel()
        # A fixed weight: latent diffusion's, a quotient of gradient norms, would depend on how a batch is divided among processes.
        return total + config.discriminator_weight * passed.generator_loss + passed.discriminator_loss

    def perceptual(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean over patches and layers of the squared distance between unit-normalised features, in [0, 4]; gradients reach ``others``."""
        size = self.features.nearest_size(images.shape[-2:])
        pair = [F.interpolate(x / 2 + 0.5, size, mode="bilinear", align_corners=True) for x in (images, others)]
        with torch.no_grad():
            wanted = self.features(pair[0])
        layers = zip(wanted, self.features(pair[1]), strict=True)
        return torch.stack([(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in layers]).mean()

    @torch.no_grad()
    def examples(self) -> dict[str, Pixels]:
        """The first image beside what the autoencoder makes of it."""
        vae: Any = self.module.vae
        image = to_tensor(self.images[0])[None].to(self.device)
        rebuilt = vae.decode(vae.encode(image * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        return {"image-and-reconstruction": np.concatenate([self.images[0], to_pixels(rebuilt[0].cpu())], axis=1)}


def save_autoencoder(vae: Any, folder: Path) -> None:
    """Write an ``AutoencoderKL`` as a folder that ``gladad fit --vae`` takes; an earlier one is replaced.

    Raises:
        WriteError: The folder holds something else, or the disk refuses.
    """
    save_folder(folder, vae.save_pretrained, AUTOENCODER_FORMAT)
