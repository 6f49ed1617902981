"""The paper's training of the denoiser, on normal images with synthetic anomalies, towards the normal image (section 3.3).

The whole denoiser is trained, as in the paper, or low-rank adapters of it. Latents and prompt embeddings are made before the first step, so
that a step is the denoiser's work alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gladad.algorithm import add_noise, denoising_target, image_noise, mix_anomaly, predict_x0
from gladad.core.errors import ConfigError, DataError
from gladad.core.records import Progress, no_progress
from gladad.core.settings import to_json, validated
from gladad.core.tensors import to_pixels, to_tensor
from gladad.data.foreground import Foreground
from gladad.data.synthesis import Draw, SynthesisConfig, synthesise
from gladad.models.family import Pixels
from gladad.models.stable_diffusion.adapters import Adapter, Layers, add_adapter, read_adapter, settle_adapter
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training_inputs import loop_config, sha256_of_images
from gladad.training.loop import DTYPES, LoopConfig, Precision, TrainingRun, divided, draw_generator, train
from gladad.training.optimizers import OptimizerName

LEARNING_RATES = {"lora": 1e-4, "full": 5e-6}
EXAMPLE_TIMESTEP = 400


@validated
class FinetuneConfig:
    """How the denoiser is trained."""

    method: Literal["lora", "full"] = "lora"  # low-rank adapters, or all of its weights as in the paper
    rank: Annotated[int, Field(ge=1)] = 16  # of the adapters
    layers: Layers = "attention"  # that are adapted; "all" learns more per step, and its file is five times as large
    batch_size: Annotated[int, Field(ge=1)] = 4  # images per step, of all processes together; the paper's is 32
    micro_batch: Annotated[int, Field(ge=1)] | None = None  # images at a time; gradients are accumulated over them; None = all
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # constant; None = 1e-4 for adapters, else the paper's 5e-6
    optimizer: OptimizerName = "adamw"  # adamw8bit needs bitsandbytes
    gradient_checkpointing: bool = True  # compute activations twice instead of keeping them: much less memory, a third more time
    precision: Precision = "bfloat16"  # of the networks' arithmetic, in training and at inspection
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the averaged weights, which are then the ones kept; 0 = none
    anomaly_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability that a sample gets a synthetic anomaly
    pool: Annotated[int, Field(ge=0)] = 1000  # synthetic anomalies made in advance
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm

    def loop(self, steps: int, seed: int) -> LoopConfig:
        """The loop's settings for a training of so many steps."""
        rate = LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
        return loop_config(self, steps=steps, seed=seed, learning_rate=rate)


PAPER = FinetuneConfig(method="full", batch_size=32)  # the paper's training (section 4.1) but for its float16


@dataclass(frozen=True)
class TrainedProduct:
    """What the denoiser learns of one product."""

    images: Sequence[Pixels]  # [H, W, 3] uint8 normal ones, of one size that the autoencoder accepts
    prompt_embeds: Tensor  # [1, L, D], by which the denoiser is told the product
    foreground: Foreground = "all"  # where synthetic anomalies may appear


@dataclass(frozen=True)
class Trained:
    """What a training made."""

    losses: list[float]  # of every step
    adapter: Adapter | None = None  # None where all weights were trained
    adapter_name: str | None = None  # in the pipeline's denoiser


def finetune_denoiser(
    pipeline: GladPipeline,
    products: Mapping[str, TrainedProduct],
    config: FinetuneConfig,
    steps: int,
    *,
    seed: int = 0,
    textures: Sequence[Pixels] = (),
    run: TrainingRun | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Trained:
    """Train ``pipeline.unet`` in place; the same seed and images give the same weights.

    Each sample draws a normal image, a timestep, noise and, by ``anomaly_share``, a synthetic anomaly that fades out at small timesteps.
    The target is the noise whose implied clean latent is the normal one.

    Args:
        pipeline: Its denoiser must be in float32 to be trained as a whole.
        products: By name; more than one makes one denoiser for all, which is told the product by its prompt.
        config: How to train.
        steps: Optimiser steps.
        seed: Of everything random.
        textures: ``[H, W, 3]`` images of the same size that anomalies take content from.
        run: Checkpoints, logs and examples.
        identity: JSON-ready, what else the result depends on; checkpoints of another one are not gone on from.
        progress: Told of every stage.

    Raises:
        ConfigError: The denoiser is in half precision, in which an update this small would vanish.
        DataError: There are no images, or they differ in size.
    """
    shapes = {image.shape for product in products.values() for image in product.images}
    if len(shapes) != 1 or not all(product.images for product in products.values()):
        raise DataError("training needs at least one image of each product, and all of the same size")
    unet = pipeline.unet
    if config.method == "full" and unet.dtype != torch.float32:
        raise ConfigError(f"training needs the denoiser in float32, not {unet.dtype}; its arithmetic is set by precision")
    name = add_adapter(unet, config.rank, config.layers, seed) if config.method == "lora" else None
    if name is None:
        unet.requires_grad_(True)
    try:
        task = DenoiserTask(pipeline, products, config, seed, textures, progress)
        task.identity |= identity or {}
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        losses = train(task, config.loop(steps, seed), run, progress=progress, stage="denoiser")
    finally:
        unet.disable_gradient_checkpointing()
        unet.requires_grad_(False)
    if name is None:
        return Trained(losses)
    adapter = read_adapter(unet, name, config.rank, config.layers)
    settle_adapter(unet, name)
    return Trained(losses, adapter, name)


class DenoiserTask:
    """The denoiser as a task of the training loop."""

    def __init__(
        self,
        pipeline: GladPipeline,
        products: Mapping[str, TrainedProduct],
        config: FinetuneConfig,
        seed: int,
        textures: Sequence[Pixels] = (),
        progress: Progress = no_progress,
    ):
        self.pipeline, self.config, self.seed = pipeline, config, seed
        self.module: nn.Module = pipeline.unet
        synthesis = SynthesisConfig()  # the paper's recipe
        images = [image for product in products.values() for image in product.images]
        self.identity: dict[str, Any] = {
            **{name: getattr(config, name) for name in ("method", "rank", "layers", "anomaly_share", "pool")},
            "synthesis": to_json(synthesis),
            "images": sha256_of_images(images),
            "textures": sha256_of_images(textures),
            "products": {name: product.foreground for name, product in products.items()},
        }
        self.prompts = torch.cat([product.prompt_embeds for product in products.values()]).to(pipeline.device)
        foregrounds = [product.foreground for product in products.values() for _ in product.images]
        self.place = torch.tensor([place for place, product in enumerate(products.values()) for _ in product.images])  # of each's product
        self.normal = torch.stack(divided(lambda n: self._encode(images[n]), len(images), lambda *done: progress("latents", *done)))

        def synthetic(number: int) -> tuple[Tensor, int]:
            draw = Draw((seed, number))
            source = draw.integer(0, len(images) - 1)
            return self._encode(synthesise(images[source], draw, synthesis, textures, foregrounds[source])[0]), source

        count = config.pool if config.anomaly_share else 0
        pool = divided(synthetic, count, lambda *done: progress("synthetic anomalies", *done))
        self.anomalous = torch.stack([latent for latent, _ in pool]) if pool else self.normal[:0]
        self.sources = [source for _, source in pool]  # normal image of each

    def loss(self, module: nn.Module, step: int, samples: Sequence[int]) -> Tensor:
        """Mean squared error of the noise prediction (METHOD: training, ATP)."""
        device, schedule = self.pipeline.device, self.pipeline.schedule
        indices, mixed_in, timesteps, noise = [], [], [], []
        for sample in samples:
            draw = Draw((self.seed, step, sample))
            if len(self.anomalous) and draw.uniform(0, 1) < self.config.anomaly_share:
                number = draw.integer(0, len(self.anomalous) - 1)
                index, anomalous = self.sources[number], self.anomalous[number]
            else:
                index = draw.integer(0, len(self.normal) - 1)
                anomalous = self.normal[index]
            indices.append(index)
            mixed_in.append(anomalous)
            timesteps.append(draw.integer(0, schedule.num_timesteps - 1))
            noise.append(torch.randn(self.normal.shape[1:], generator=draw_generator(self.seed, step, sample)))
        z_normal, z_anomalous, eps = (part.to(device) for part in (self.normal[indices], torch.stack(mixed_in), torch.stack(noise)))
        timestep = torch.tensor(timesteps, device=device)
        alpha_bar = schedule.alpha_bar(timestep)
        x_t = add_noise(mix_anomaly(z_normal, z_anomalous, timestep, schedule.num_timesteps), eps, alpha_bar)
        noise_pred = self.pipeline.denoise(x_t, timestep, self.prompts[self.place[indices].to(device)], module)
        return F.mse_loss(noise_pred.float(), denoising_target(x_t, z_normal, alpha_bar))

    @torch.no_grad()
    def examples(self) -> dict[str, Pixels]:
        """One synthetic anomaly, or a normal image, beside what one call of the denoiser makes of it."""
        pipeline = self.pipeline
        latent = (self.anomalous if len(self.anomalous) else self.normal)[:1].to(pipeline.device)
        place = int(self.place[self.sources[0] if self.sources else 0])
        timestep = torch.tensor([min(EXAMPLE_TIMESTEP, pipeline.schedule.num_timesteps - 1)], device=pipeline.device)
        alpha_bar = pipeline.schedule.alpha_bar(timestep)
        x_t = add_noise(latent, image_noise(latent.shape[1:], self.seed).to(latent), alpha_bar)
        with torch.autocast(pipeline.device.type, DTYPES[self.config.precision], enabled=self.config.precision != "float32"):
            noise_pred = pipeline.denoise(x_t, timestep, self.prompts[place : place + 1])
            # one at a time: decoding can need more memory than a step
            pictures = [pipeline.decode(shown)[0] for shown in (latent, predict_x0(x_t, noise_pred.float(), alpha_bar))]
        return {"input-and-reconstruction": np.concatenate([to_pixels(picture.cpu()) for picture in pictures], axis=1)}

    @torch.no_grad()
    def _encode(self, pixels: Pixels) -> Tensor:
        """Latent ``[C, h, w]`` on the CPU."""
        return self.pipeline.encode(to_tensor(pixels)[None].to(self.pipeline.device))[0].cpu()
