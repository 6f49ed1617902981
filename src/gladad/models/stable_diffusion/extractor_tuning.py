"""Fine-tuning of the feature extractor that scores (METHOD, "Extractor fine-tuning"; the paper's for VisA and PCB-Bank).

An image and its reconstruction differ a little even where the part is normal: the autoencoder loses fine detail. The extractor learns to
overlook just that, on normal images, by the loss of DDAD's domain adaptation (arXiv 2305.15956). The step search keeps the frozen one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gladad.algorithm import ReconstructionConfig
from gladad.core.errors import ConfigError, DataError
from gladad.core.records import Progress, no_progress
from gladad.core.settings import validated
from gladad.core.tensors import to_pixels, to_tensor
from gladad.models.family import Pixels
from gladad.models.stable_diffusion.device import choose_device
from gladad.models.stable_diffusion.model import StableDiffusion
from gladad.models.stable_diffusion.training_inputs import check_images, image_of_sample, loop_config, sha256_of_images, sha256_of_weights
from gladad.training.loop import LoopConfig, Precision, TrainingRun, divided, train

Side = Annotated[int, Field(ge=1)]  # in pixels


@validated
class FeatureTuningConfig:
    """How the extractor is fine-tuned. The defaults are the paper's, but for the number of denoising steps."""

    epochs: Annotated[int, Field(ge=1)] = 15  # times that every image is shown; the budget is fixed, no epoch is chosen by results
    steps: Annotated[int, Field(ge=0)] | None = None  # optimiser steps instead of epochs
    batch_size: Annotated[int, Field(ge=1)] = 32  # images per step, of all processes together
    micro_batch: Annotated[int, Field(ge=1)] | None = None  # images at a time; None = all of a process's share
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4  # of Adam
    anchor_weight: Annotated[float, Field(ge=0)] = 0.01  # lambda: pull to the frozen features; the paper's 0 for cashew and macaroni2
    start_timestep: Annotated[int, Field(ge=1)] = 200  # that reconstructions start from, of 1000
    num_steps: Annotated[int, Field(ge=1)] | None = None  # denoiser calls of a reconstruction; None = as densely spaced as the base's own
    feature_size: tuple[Side, Side] = (256, 256)  # (H, W) pixels that features are compared at
    seed: Annotated[int, Field(ge=0)] = 0  # of the order of the images

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps > self.start_timestep:
            raise ConfigError(f"num_steps must lie in 1...{self.start_timestep}, the start_timestep, not {self.num_steps}")

    def loop(self, images: int, precision: Precision) -> LoopConfig:
        """The loop's settings for so many images."""
        steps = math.ceil(self.epochs * images / self.batch_size) if self.steps is None else self.steps
        return loop_config(self, steps=steps, weight_decay=0.0, precision=precision)  # AdamW is Adam then

    def reconstruction(self, usual: ReconstructionConfig) -> ReconstructionConfig:
        """Plain DDIM from `start_timestep`, without the step search, in the stride of a base's usual chain unless `num_steps` is given.

        From 200 that is 6 steps for a base that takes 25 from 750, or 15 from 450.
        """
        steps = self.num_steps or max(1, self.start_timestep // max(1, usual.max_step // usual.num_steps))
        return ReconstructionConfig(max_step=self.start_timestep, num_steps=steps, adaptive=False)


def tune_features(
    base: StableDiffusion,
    images: Sequence[Pixels],
    config: FeatureTuningConfig,
    *,
    run: TrainingRun | None = None,
    progress: Progress = no_progress,
) -> list[float]:
    """Teach the extractor that scores to overlook what reconstructions of normal images lose; returns the loss of every step.

    Only the MLPs of the blocks whose outputs are compared are trained (blocks 3, 6, 9, 12 of ViT-B), in a copy of the frozen extractor; a
    base that was tuned before starts from the frozen one again. Scores are of another scale afterwards: thresholds have to be calibrated
    anew, on images that are not among these.

    Args:
        base: A fitted diffusers base. Changed only at the end, and only in what scores.
        images: ``[H, W, 3]`` uint8 normal images, already at the ``image_size`` of its config.
        config: How to train.
        run: Checkpoints, logs and examples.
        progress: Told of every reconstruction and every step, as ``features``.

    Raises:
        ConfigError: The base is not a diffusers base, or its schedule is shorter than ``start_timestep``.
        DataError: There are no images, or they are of another size.
    """
    if base.kind != StableDiffusion.kind:
        raise ConfigError(f"only the extractor of a {StableDiffusion.kind} base can be tuned; this detector's base is {base.kind}")
    check_images(images)
    if images[0].shape[:2] != base.config.image_size:
        (height, width), (wanted_height, wanted_width) = images[0].shape[:2], base.config.image_size
        raise DataError(f"images of {height}x{width} pixels for a base of {wanted_height}x{wanted_width} (height x width); resize them")
    timesteps = base.pipeline.schedule.num_timesteps
    if config.start_timestep >= timesteps:
        raise ConfigError(f"start_timestep must lie below the denoiser's {timesteps} timesteps, not be {config.start_timestep}")
    loop = config.loop(len(images), base.config.settings.training.precision)
    base.pipeline.to(choose_device())
    task = FeatureTask(base, images, config, progress)
    losses = train(task, loop, run, progress=progress, stage="features")
    base.pipeline.tune_scoring({name: weight.detach() for name, weight in task.trained.items()})
    return losses


class FeatureTask:
    """The extractor as a task of the training loop; a base's denoiser makes the reconstructions, and its frozen extractor is the start."""

    def __init__(self, base: StableDiffusion, images: Sequence[Pixels], config: FeatureTuningConfig, progress: Progress = no_progress):
        self.base, self.images, self.config = base, images, config
        self.reconstruction = config.reconstruction(base.config.settings.reconstruction)
        frozen: Any = base.pipeline.features
        # Both in float32: rounded weights cannot take small updates, and would differ from the frozen ones before the first.
        self.frozen: Any = frozen if frozen.dtype == torch.float32 else copy.deepcopy(frozen).float()
        self.module: Any = copy.deepcopy(self.frozen)
        self.trained = dict(self.module.mlp_parameters(self.module.default_layers))  # name in the extractor -> weight
        for weight in self.trained.values():
            weight.requires_grad_(True)
        self.size: tuple[int, int] = frozen.nearest_size(config.feature_size)
        self.identity = self._identity()
        made = divided(self._pair, len(images), lambda *done: progress("reconstructions", *done))
        self.pairs = torch.stack(made)  # [N, 2, 3, h, w] on the CPU; float16 is finer than the pixels' 256 steps, and nothing is clipped

    def loss(self, module: nn.Module, step: int, samples: Sequence[int]) -> Tensor:
        """Sum over layers of the mean distance between an image's features and its reconstruction's, and of both to the frozen ones'."""
        config = self.config
        numbers = [image_of_sample(config.seed, step * config.batch_size + sample, len(self.pairs)) for sample in samples]
        device = next(self.module.parameters()).device
        pixels = self.pairs[numbers].to(device).float().transpose(0, 1).flatten(0, 1)  # all images, then all reconstructions, in one call
        ours = [layer.chunk(2) for layer in module(pixels)]
        total = torch.stack([features_distance(image, rebuilt) for image, rebuilt in ours]).sum()
        if config.anchor_weight:
            with torch.no_grad():
                frozen = [layer.chunk(2) for layer in self.frozen(pixels)]
            anchors = [features_distance(a, b) for now, then in zip(ours, frozen, strict=True) for a, b in zip(now, then, strict=True)]
            total = total + config.anchor_weight * torch.stack(anchors).sum()
        return total

    def examples(self) -> dict[str, Pixels]:
        """The first image beside its reconstruction: what the extractor is taught to overlook."""
        return {"image-and-reconstruction": np.concatenate([to_pixels(picture) for picture in self.pairs[0]], axis=1)}

    @torch.no_grad()
    def _pair(self, number: int) -> Tensor:
        """An image and its reconstruction, ``[2, 3, h, w]`` float16 in [0, 1] on the CPU, resized as for scoring."""
        image = to_tensor(self.images[number])[None].to(self.base.pipeline.device)
        rebuilt = self.base.pipeline.decode(self.base.rebuild(image, self.reconstruction).latent)
        pair = F.interpolate(torch.cat([image, rebuilt]), self.size, mode="bilinear", align_corners=True)
        return pair.half().cpu()

    def _identity(self) -> dict[str, Any]:
        """What the result depends on besides the loop's settings. Reconstructions themselves could differ in a bit on another card."""
        base, config, pipeline = self.base, self.config, self.base.pipeline
        weights = pipeline.unet.state_dict().items()  # with adapters, of which others than this base's may be attached
        unet = {name.replace(".base_layer.", "."): weight for name, weight in weights if ".lora_" not in name}
        return {
            "anchor_weight": config.anchor_weight,
            "feature_size": list(self.size),
            "reconstruction": [self.reconstruction.max_step, self.reconstruction.num_steps],
            "inspection": [list(base.config.image_size), base.config.settings.guidance, base.config.settings.seed],
            "images": sha256_of_images(self.images),
            "features": sha256_of_weights(self.frozen.state_dict()),
            "vae": sha256_of_weights(pipeline.vae.state_dict()),
            "unet": sha256_of_weights(unet),
            "adapter": sha256_of_weights({} if base.adapter is None else base.adapter.weights),
            "prompt": sha256_of_weights({"embeds": pipeline.prompt_embeds}),
        }


def features_distance(features: Tensor, others: Tensor) -> Tensor:
    """Mean over images of ``1 - cos`` between all of an image's features at once.

    The features ``[B, D, h, w]`` of an image are one vector of ``D h w`` values, as in DDAD's and GLAD's programs, so that strong features
    count more. (GLAD's program has the class token in the vector, too, which no map is made of.)
    """
    return (1 - F.cosine_similarity(features.flatten(1), others.flatten(1), dim=1)).mean()
