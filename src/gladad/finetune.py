"""The paper's training: the whole denoiser, on normal images with synthetic anomalies, towards the normal image (section 3.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gladad.algorithm import add_noise, denoising_target, mix_anomaly
from gladad.errors import ConfigError, DataError
from gladad.images import to_tensor
from gladad.pipeline import GladPipeline
from gladad.synthesis import Draw, Foreground, SynthesisConfig, synthesise


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How the denoiser is trained. The rate and the share are the paper's; its batch is 32 at 512 pixels."""

    steps: int = 4000  # optimiser steps
    batch_size: int = 4  # images per step
    learning_rate: float = 5e-6  # of AdamW, constant
    seed: int = 0  # of everything random
    anomaly_share: float = 0.5  # probability that a sample gets a synthetic anomaly
    gradient_clip: float = 1.0  # largest gradient norm
    autocast: bool = False  # run the networks in bfloat16; weights stay float32


def finetune_denoiser(
    pipeline: GladPipeline,
    images: Sequence[NDArray[np.uint8]],
    config: FinetuneConfig,
    synthesis: SynthesisConfig | None = None,
    textures: Sequence[NDArray[np.uint8]] = (),
    foreground: Foreground = "all",
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train ``pipeline.unet`` in place; the same seed and images give the same weights.

    Each sample draws a normal image, a timestep, noise and, by ``anomaly_share``, a synthetic anomaly that fades out at small timesteps.
    The target is the noise whose implied clean latent is the normal one.

    Args:
        pipeline: Its denoiser must be in float32.
        images: ``[H, W, 3]`` uint8 normal images of one size that the autoencoder accepts.
        config: The training budget.
        synthesis: How anomalies look; None means the paper's recipe.
        textures: ``[H, W, 3]`` images of the same size that anomalies take content from.
        foreground: Where anomalies may appear.
        progress: Called after every step with the steps done, the steps in all and the loss.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: The denoiser is in half precision, in which an update this small would vanish.
        DataError: There are no images, or they differ in size.
    """
    if pipeline.unet.dtype != torch.float32:
        raise ConfigError(f"training needs the denoiser in float32, not {pipeline.unet.dtype}; for speed switch on autocast")
    if not images or any(image.shape != images[0].shape for image in images):
        raise DataError("training needs at least one image, and all of the same size")
    synthesis = SynthesisConfig() if synthesis is None else synthesis
    device, schedule, unet = pipeline.device, pipeline.schedule, pipeline.unet
    prompt = pipeline.prompt_embeds[:1]
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU, so that every device draws the same

    def autocast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if config.autocast else contextlib.nullcontext()

    @torch.no_grad()
    def encode(pixels: NDArray[np.uint8]) -> Tensor:
        with autocast():
            return pipeline.encode(to_tensor(pixels)[None].to(device)).cpu()

    normal_latents = torch.cat([encode(image) for image in images])
    optimizer = torch.optim.AdamW(unet.requires_grad_(True).parameters(), lr=config.learning_rate)
    losses: list[float] = []
    unet.train()
    try:
        for step in range(config.steps):
            chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
            timestep = torch.randint(schedule.num_timesteps, (config.batch_size,), generator=generator)
            noise = torch.randn((config.batch_size, *normal_latents.shape[1:]), generator=generator)
            z_normal = normal_latents[chosen]
            z_anomalous = z_normal.clone()
            for sample, index in enumerate(chosen.tolist()):
                draw = Draw((config.seed, step, sample))
                if draw.uniform(0, 1) < config.anomaly_share:
                    z_anomalous[sample] = encode(synthesise(images[index], draw, synthesis, textures, foreground)[0])[0]
            z_normal, z_anomalous, noise, timestep = (x.to(device) for x in (z_normal, z_anomalous, noise, timestep))

            alpha_bar = schedule.alpha_bar(timestep)
            x_t = add_noise(mix_anomaly(z_normal, z_anomalous, timestep, schedule.num_timesteps), noise, alpha_bar)
            with autocast():
                noise_pred = pipeline.denoise(x_t, timestep, prompt)
            loss = F.mse_loss(noise_pred.float(), denoising_target(x_t, z_normal, alpha_bar))

            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.gradient_clip)
            optimizer.step()
            losses.append(loss.item())
            if progress is not None:
                progress(step + 1, config.steps, losses[-1])
    finally:
        unet.eval().requires_grad_(False)
    return losses
