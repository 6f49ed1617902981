"""Training of ``lite`` from good images alone: features, denoiser, decoder, and the usual size of its residuals."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gladad.core.errors import DataError, TrainingError
from gladad.core.images import to_tensor
from gladad.core.records import Progress, no_progress
from gladad.data.foreground import Foreground
from gladad.data.synthesis import Draw, synthesise
from gladad.features.extractor import Extractor, load_extractor
from gladad.features.stack import FeatureStack
from gladad.models.feature_diffusion.model import FeatureDiffusion, pool
from gladad.models.feature_diffusion.settings import (
    DEFAULT_STEPS,
    FeatureDiffusionConfig,
    FeatureDiffusionSettings,
    FeatureTrainingSettings,
)

Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")
ENCODE_BATCH = 16
TIMING_STEPS = 10
MIN_STEPS = 20
TEXTURE_UNEXPLAINED = 0.10
"""A product is a texture if the latent leaves out more than this share of the variance of its features."""
POSITION_SHARE, POSITION_PRIOR = 0.75, 10
"""Largest share of the position profile, and the number of images that stand against it."""


def train_models(
    images: Mapping[str, Sequence[Pixels]],
    config: FeatureDiffusionConfig,
    *,
    textures: Sequence[Pixels] = (),
    foregrounds: Mapping[str, Foreground] | None = None,
    share: int = 1,
    extractor: Extractor | None = None,
    device: torch.device = CPU,
    progress: Progress = no_progress,
) -> dict[str, FeatureDiffusion]:
    """Train one denoiser for one product or several, which it is told apart by their class; everything else is each product's own.

    The same images, settings and machine give the same weights, unless ``minutes`` sets the budget.

    Args:
        images: Product -> ``[H, W, 3]`` uint8 normal images, already at ``config.image_size``.
        config: The settings, and the products by name where there are several; what the settings leave open is resolved here.
        textures: Images of the same size that synthetic anomalies take content from; generated textures when there are none.
        foregrounds: Product -> where synthetic anomalies may appear; None means everywhere.
        share: Number of trainings that the default budget is divided among.
        extractor: The frozen feature network; None loads that of the settings.
        device: To train and to stay on. Everything random is drawn on the CPU, so that all devices draw the same.
        progress: Told of every stage.

    Returns:
        Product -> its model. All hold the same denoiser.

    Raises:
        DataError: A product has fewer than two images.
        TrainingError: The loss is not finite.
    """
    for product, own in images.items():
        if len(own) < 2:
            of = f" of {product}" if product else ""
            raise DataError(f"training needs at least 2 good images{of} besides the held-out ones, there are {len(own)}; add good images")
    started = time.monotonic()
    settings = config.settings
    training, planned = settings.training, budget(settings.training, len(images), share)
    generator = torch.Generator().manual_seed(settings.seed)
    extractor = load_extractor(settings.features) if extractor is None else extractor
    config, stack = replace(config, extractor=extractor.identity), FeatureStack(extractor.fast(), config.image_size)
    parts = []
    for product, own in images.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = FeatureDiffusion(replace(config, category=product if config.categories else ""), stack)
        model.on(device).eval()
        normal = _fit_space(model, own, progress)
        model.config = resolved(model)
        foreground = (foregrounds or {}).get(product, "all")
        wanted = planned.pool // len(images) if training.anomaly_oriented and model.method.uses_anomalies else 0
        parts.append(_Part(model, normal, *_synthetic_pool(model, own, wanted, textures, foreground, progress)))
    _train_denoiser(parts, planned, generator, started, progress)
    for part, own in zip(parts, images.values(), strict=True):
        _train_decoder(part.model, part.normal, own, generator, progress)
        measure_residuals(part.model, own, progress)
        part.model.requires_grad_(False)
    return dict(zip(images, (part.model for part in parts), strict=True))


@dataclass(frozen=True)
class Budget:
    """Of one training: optimiser steps, or minutes that choose them by the machine's speed; and synthetic anomalies."""

    steps: int
    minutes: float | None
    pool: int


def budget(training: FeatureTrainingSettings, products: int, share: int) -> Budget:
    """The budget of one of ``share`` trainings for so many products.

    Steps that were set are those of each training. The default ones grow with the square root of the number of products and are divided,
    as the synthetic anomalies are; minutes are those of all trainings together.
    """
    if training.steps is not None:
        return Budget(training.steps, None, training.pool)
    steps = max(1, round(DEFAULT_STEPS * math.sqrt(products)) // share)
    return Budget(steps, None if training.minutes is None else training.minutes / share, max(1, training.pool // share))


@dataclass(frozen=True)
class _Part:
    """What the denoiser learns of one product.

    Attributes:
        model: The product's model.
        normal: ``[N, D, h, w]`` float16 latents of its normal images.
        anomalous: ``[P, D, h, w]`` float16 latents of synthetic anomalies.
        source: ``[P]`` the normal image of each.
    """

    model: FeatureDiffusion
    normal: Tensor
    anomalous: Tensor
    source: Tensor


def adjusted(model: FeatureDiffusion, settings: FeatureDiffusionSettings, images: Sequence[Pixels], progress: Progress) -> FeatureDiffusion:
    """A copy that inspects as other settings say: what is measured after the training is measured anew.

    Args:
        model: It is not changed; the copy has its networks.
        settings: Their networks and training are those of the model.
        images: Those the model was trained on.
        progress: Told of every stage.
    """
    memo = {id(network): network for network in (model.stack, model.denoiser, model.decoder)}
    other = copy.deepcopy(model, memo)
    other.config = replace(model.config, settings=settings)
    other.config = resolved(other)
    measure_residuals(other, images, progress)
    return other


def resolved(model: FeatureDiffusion) -> FeatureDiffusionConfig:
    """The config with what the fitted feature space settles: the kind of product, and the timesteps of inspection."""
    settings = model.config.settings
    if settings.product == "auto":
        settings = replace(settings, product="texture" if float(model.space.unexplained) > TEXTURE_UNEXPLAINED else "object")
    config = replace(model.config, settings=settings)
    if getattr(settings.reconstruction, "timesteps", None) == ():
        search = replace(settings.reconstruction, timesteps=config.recipe.timesteps)
        config = replace(config, settings=replace(settings, reconstruction=search))
    return config


def _batches(images: Sequence[Pixels], device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(images), ENCODE_BATCH):
        yield torch.stack([to_tensor(pixels) for pixels in images[start : start + ENCODE_BATCH]]).to(device)


@torch.no_grad()
def _fit_space(model: FeatureDiffusion, images: Sequence[Pixels], progress: Progress) -> Tensor:
    """Fit the feature space; returns the normal latents ``[N, D, h, w]`` float16."""
    features = []
    for batch in _batches(images, model.device):
        features.append(model.features(batch).half().cpu())
        progress("features", min(len(images), len(features) * ENCODE_BATCH), len(images))
    model.space.fit(batch.to(model.device) for batch in features)
    return torch.cat([model.space(batch.float().to(model.device))[0].half().cpu() for batch in features])


@torch.no_grad()
def _synthetic_pool(
    model: FeatureDiffusion,
    images: Sequence[Pixels],
    count: int,
    textures: Sequence[Pixels],
    foreground: Foreground,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Latents of synthetic anomalies, ``[P, D, h, w]`` float16, and the index of the normal image of each, ``[P]``.

    They are made once, in bounded memory: encoding them during training would cost as much as the training step itself.
    """
    settings = model.config.settings
    latents, source = [], []
    for start in range(0, count, ENCODE_BATCH):
        batch = []
        for index in range(start, min(start + ENCODE_BATCH, count)):
            draw = Draw((settings.seed, index))
            source.append(draw.integer(0, len(images) - 1))
            batch.append(to_tensor(synthesise(images[source[-1]], draw, settings.training.synthesis, textures, foreground)[0]))
        latents.append(model.encode(torch.stack(batch).to(model.device)).half().cpu())
        progress("synthetic anomalies", min(start + ENCODE_BATCH, count), count)
    if not latents:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.cat(latents), torch.tensor(source)


def _train_denoiser(parts: Sequence[_Part], planned: Budget, generator: torch.Generator, started: float, progress: Progress) -> None:
    """Train the denoiser by the method, and keep the average of its weights."""
    denoiser, method, training = parts[0].model.denoiser, parts[0].model.method, parts[0].model.config.settings.training
    device = parts[0].model.device
    denoiser.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    parameters = list(denoiser.parameters())
    averaged = [p.detach().clone() for p in parameters]
    step, steps, times = 0, planned.steps, [time.monotonic()]
    while step < steps:
        warmup = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * warmup * _cosine(step / steps)
        z_normal, z_input, timestep, label = _draw_batch(parts, training, generator, device)
        x_t, target, weight = method.example(z_normal, z_input, timestep, generator, training)
        with torch.autocast(device.type, torch.bfloat16):
            output = denoiser(x_t, timestep, label)
        loss = ((output - target).square() * weight).mean()
        if not loss.isfinite():
            raise TrainingError(f"the loss of the denoiser is {float(loss.detach())} at step {step + 1}; lower training.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.data for p in parameters], 1 - min(training.ema, (1 + step) / (10 + step)))
        step += 1
        times.append(time.monotonic())
        if planned.minutes is not None and step == TIMING_STEPS:
            steps = _affordable_steps(planned.minutes, started, times)
        progress("denoiser", step, steps)
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
    denoiser.eval().requires_grad_(False)
    for part in parts:
        part.model.denoiser = denoiser
        part.model.refresh()


def _cosine(progress: float) -> float:
    """The learning rate's course from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def _affordable_steps(minutes: float, started: float, times: Sequence[float]) -> int:
    """Steps that fit a budget, from the median of the first ones; an eighth is kept for what follows."""
    per_step = float(np.median(np.diff(times)))
    left = minutes * 60 * 0.875 - (times[-1] - started)
    return max(MIN_STEPS, TIMING_STEPS + int(left / per_step))


def _draw_batch(
    parts: Sequence[_Part], training: FeatureTrainingSettings, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normal latents and the latents to be repaired into them ``[B, D, h, w]`` float32, timesteps ``[B]``, labels ``[B]`` of products."""
    counts = [training.batch_size]
    if len(parts) > 1:
        counts = torch.randint(len(parts), (training.batch_size,), generator=generator).bincount(minlength=len(parts)).tolist()
    pairs, timesteps, labels = [], [], []
    for part, count in zip(parts, counts, strict=True):
        if count:
            span = part.model.method.trained_timesteps(part.model.recipe, training)
            pairs.append(_draw_pairs(part, count, training.anomaly_share, generator))
            timesteps.append(torch.randint(*span, (count,), generator=generator))
            labels.append(part.model.labels(count))
    known = [label for label in labels if label is not None]
    z_normal, z_input = (torch.cat(side).to(device) for side in zip(*pairs, strict=True))
    return z_normal, z_input, torch.cat(timesteps).to(device), torch.cat(known) if known else None


def _draw_pairs(part: _Part, size: int, anomaly_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``size`` normal latents and the latents to be repaired into them, both ``[B, D, h, w]`` float32."""
    normal, anomalous = part.normal, part.anomalous
    own = torch.randint(len(normal), (size,), generator=generator)
    if not len(anomalous):
        z_normal = normal[own].float()
        return z_normal, z_normal
    from_pool = torch.randint(len(anomalous), (size,), generator=generator)
    repaired = torch.rand(size, generator=generator) < anomaly_share
    z_normal = normal[torch.where(repaired, part.source[from_pool], own)].float()
    return z_normal, torch.where(repaired.view(-1, 1, 1, 1), anomalous[from_pool].float(), z_normal)


def _train_decoder(
    model: FeatureDiffusion, normal: Tensor, images: Sequence[Pixels], generator: torch.Generator, progress: Progress
) -> None:
    """Train the picture decoder on the same normal images, by absolute error at its own size."""
    decoder, steps = model.decoder.train().requires_grad_(True), model.config.settings.training.decoder_steps
    size = (4 * normal.shape[-2], 4 * normal.shape[-1])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, fused=True)
    for step in range(steps):
        rows = torch.randint(len(normal), (8,), generator=generator)
        shown = torch.stack([to_tensor(images[row]) for row in rows.tolist()]).to(model.device)
        target = F.interpolate(shown, size, mode="area")
        with torch.autocast(model.device.type, torch.bfloat16):
            picture = decoder(normal[rows].float().to(model.device))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * _cosine(step / steps)
        loss = F.l1_loss(picture.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("picture decoder", step + 1, steps)
    decoder.eval().requires_grad_(False)


@torch.no_grad()
def measure_residuals(model: FeatureDiffusion, images: Sequence[Pixels], progress: Progress) -> None:
    """Measure what residuals are usual on normal images, and set what turns them into a map by it.

    The images used here are good ones that the denoiser may have seen; the held-out images stay untouched for the decision threshold,
    whose guarantee needs that.

    Raises:
        TrainingError: A statistic is not finite.
    """
    settings = model.config.settings
    count = min(settings.training.statistics, len(images))
    chosen = np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist()
    if settings.scoring.position_share is None:  # the fewer images, the less is known of single positions
        share = POSITION_SHARE * len(chosen) / (len(chosen) + POSITION_PRIOR)
        settings = replace(settings, scoring=replace(settings.scoring, position_share=share))
    _inspect_by(model, settings)
    method, depths = model.method, model.method.depths()
    _inspect_by(model, replace(settings, reconstruction=method.plain()))
    model.depth_scale = torch.ones(len(depths), device=model.device)

    latents, outsides, residuals = [], [], []
    for batch in _batches([images[index] for index in chosen], model.device):
        latent, outside = model.space(model.features(batch))
        latents.append(latent)
        outsides.append(outside)
        residuals.append(latent - model.rebuild(latent).latent)
        progress("usual residuals", sum(map(len, latents)), len(chosen))
    residual = torch.cat(residuals)
    model.residual_scale.copy_(residual.square().mean((0, 2, 3), keepdim=True).sqrt())
    usual = torch.zeros_like(model.usual_energy)
    for part, outside in zip(residuals, outsides, strict=True):
        inside = model.space.to_features(part)
        for row, difference in enumerate((inside, inside + outside)):
            usual[row] += pool(difference, model.recipe.window).square().mean((2, 3)).sum(0)
    model.usual_energy.copy_(usual / len(residual))
    energies = [model.energy(part, outside) for part, outside in zip(residuals, outsides, strict=True)]
    profile = pool(torch.cat(energies).mean(0, keepdim=True), 3)  # smoothed: parts never lie exactly alike
    model.position_energy.copy_(profile / profile.mean())

    # the step search and the fusion mask, now that the residual's scale is known
    traces = torch.cat([model.rebuild(latent).trace for latent in latents])
    deltas = traces.quantile(settings.training.step_quantile, dim=0).tolist()
    if len(depths) > 1:
        model.depth_scale.copy_(_depth_scale(model, depths, latents, outsides))
    gap = (residual / model.residual_scale).square().mean(1)
    center = float(gap.flatten().kthvalue(max(1, int(0.99 * gap.numel()))).values)
    _inspect_by(model, replace(settings, reconstruction=method.settled(deltas, center)))
    for name in ("residual_scale", "usual_energy", "position_energy", "depth_scale"):
        if not getattr(model, name).isfinite().all():
            raise TrainingError(f"the statistic {name} of normal residuals is not finite; are the good images all of one colour?")


def _inspect_by(model: FeatureDiffusion, settings: FeatureDiffusionSettings) -> None:
    model.config = replace(model.config, settings=settings)


def _depth_scale(model: FeatureDiffusion, depths: Sequence[Any], latents: Sequence[Tensor], outsides: Sequence[Tensor]) -> Tensor:
    """Mean root energy of normal latents decided at each depth, relative to the last: ``[K]``."""
    before, means = model.config.settings, []
    for reconstruction in depths:
        _inspect_by(model, replace(before, reconstruction=reconstruction))
        energies = [model.energy(z - model.rebuild(z).latent, outside) for z, outside in zip(latents, outsides, strict=True)]
        means.append(torch.cat(energies).sqrt().mean())
    _inspect_by(model, before)
    return torch.stack(means) / means[-1]
