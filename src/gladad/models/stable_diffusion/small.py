"""``small``: a base in the paper's form that starts from random weights, for images of one product and machines without the Hub.

Autoencoder, UNet and schedule are of the classes and the form of Stable Diffusion; the extractor is EfficientNet-Lite0. The autoencoder is
trained first, on the good images, on the same with synthetic anomalies, which it must be able to draw, and on textures if there are any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from gladad.core.errors import ConfigError
from gladad.core.inference import fast_dtype
from gladad.core.tensors import to_tensor
from gladad.data.synthesis import Draw, SynthesisConfig, synthesise
from gladad.features.pyramid import PyramidFeatures
from gladad.models.family import Pixels, Training
from gladad.models.stable_diffusion.autoencoder_tuning import AutoencoderTuningConfig, tune_autoencoder
from gladad.models.stable_diffusion.components import Components, load_component, locate_autoencoder
from gladad.models.stable_diffusion.device import choose_device
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.settings import DenoiserSettings, StableDiffusionSettings
from gladad.training.loop import Precision

NAME = "small"
PARTS = ("autoencoder", "denoiser")  # its trainings, as folders of their checkpoints
PROMPT_WIDTH = 64
AUTOENCODER_SHARE = 1 / 3  # of a budget of minutes
WITH_ANOMALIES = 200  # images with synthetic anomalies that the autoencoder learns to draw
STANDARDISED = 64  # good images by which the latents' scale is set
# 5.6 million parameters, 8 pixels per latent cell; few channels where there are many pixels, which is where the time goes
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 192),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
UNET = {  # 24 million parameters
    "sample_size": 32,
    "block_out_channels": (96, 192, 288),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": PROMPT_WIDTH,
    "attention_head_dim": 8,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}


def default_settings() -> StableDiffusionSettings:
    """Those of Stable Diffusion, but for the size, for trainings that start from nothing, and for the precision, which is the machine's."""
    precision: Precision = "bfloat16" if fast_dtype(choose_device()) is torch.bfloat16 else "float32"
    training = DenoiserSettings(
        method="full", batch_size=8, learning_rate=2e-4, optimizer="muon", ema=0.999, gradient_checkpointing=False, precision=precision
    )
    autoencoder = AutoencoderTuningConfig(
        steps=2000, batch_size=4, learning_rate=4e-4, optimizer="muon", ema=0.995, gradient_checkpointing=False, precision=precision
    )
    return StableDiffusionSettings(image_size=256, training=training, autoencoder=autoencoder)


def untrained(seed: int) -> Components:
    """The networks with random weights, the same for the same seed; the extractor with its trained ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet = AutoencoderKL(**VAE), UNet2DConditionModel(**UNET)  # type: ignore[no-untyped-call]
    scheduler = DDIMScheduler(**SCHEDULER)  # type: ignore[no-untyped-call]
    return Components(vae=vae, unet=unet, scheduler=scheduler, features=PyramidFeatures.pretrained())


def prompt_embeds(prompt: str) -> Tensor:
    """``[2, 1, PROMPT_WIDTH]``: a random vector that a prompt always gets, and zeros for the empty one."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    drawn = torch.randn(1, 1, PROMPT_WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.cat([drawn, torch.zeros_like(drawn)])


def make_pipelines(
    prompts: Mapping[str, str], images: Mapping[str, Sequence[Pixels]], training: Training, dtype: torch.dtype
) -> dict[str, GladPipeline]:
    """Train or read the autoencoder, and give each product a pipeline over the same networks; the denoiser, in float32, is untrained.

    Args:
        prompts: Name of the product -> prompt.
        images: Name of the product -> ``[H, W, 3]`` uint8 normal images.
        training: What the fit is asked for; its settings say how the autoencoder is trained.
        dtype: Of autoencoder and extractor afterwards.

    Raises:
        ConfigError: The autoencoder given has other latents than this base.
        ModelFormatError: It is missing or damaged.
    """
    settings: StableDiffusionSettings = training.settings
    networks = untrained(settings.seed)
    if settings.vae is None:
        _train_autoencoder(networks, images, training)
    else:
        networks = replace(networks, vae=_given_autoencoder(settings.vae, settings.offline))
    networks.vae.register_to_config(scaling_factor=1 / _spread(networks.vae, [image for own in images.values() for image in own]))
    for network in (networks.vae, networks.features):
        torch.nn.Module.to(network, dtype)
    return {product: GladPipeline.of(networks, prompt_embeds(prompt), prompt) for product, prompt in prompts.items()}


def _train_autoencoder(networks: Components, images: Mapping[str, Sequence[Pixels]], training: Training) -> None:
    """Train it in place, to rebuild and to draw what the module says."""
    settings: StableDiffusionSettings = training.settings
    seed, good = settings.seed, [(product, image) for product, own in images.items() for image in own]
    shown = [image for _, image in good]
    for number in range(WITH_ANOMALIES):
        draw = Draw((seed, 4, number))
        product, image = good[draw.integer(0, len(good) - 1)]
        shown.append(synthesise(image, draw, SynthesisConfig(), training.textures, training.foregrounds[product])[0])
    run = None if training.run is None else training.run.part(PARTS[0])
    config = replace(settings.autoencoder or AutoencoderTuningConfig(), seed=seed)
    if settings.training.minutes is not None:
        config = replace(config, minutes=AUTOENCODER_SHARE * settings.training.minutes / training.share)
    tune_autoencoder(networks.vae, networks.features, [*shown, *training.textures], config, run=run, progress=training.progress)


def _given_autoencoder(source: str, offline: bool) -> Any:
    """One that was trained before, perhaps on other products."""
    folder, _ = locate_autoencoder(source, offline=offline)
    vae = load_component(AutoencoderKL, folder, use_safetensors=True, dtype=torch.float32)
    wanted = (VAE["latent_channels"], len(VAE["block_out_channels"]))
    if (vae.config.latent_channels, len(vae.config.block_out_channels)) != wanted:
        raise ConfigError(f"vae: {folder} has no latents of {wanted[0]} channels and {2 ** (wanted[1] - 1)} pixels per cell, as {NAME} has")
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def _spread(vae: Any, images: Sequence[Pixels]) -> float:
    """Standard deviation of the latents of some images."""
    chosen = images[:: -(-len(images) // STANDARDISED)]
    latents = [vae.encode(to_tensor(image)[None].to(vae.device) * 2 - 1).latent_dist.mean for image in chosen]
    return max(float(torch.cat(latents).std()), 1e-6)
