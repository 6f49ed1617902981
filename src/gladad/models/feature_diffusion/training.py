"""Training of the ``lite`` base from good images alone: features, denoiser, decoder, and the usual size of its residuals."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gladad.algorithm import OneCallConfig, add_noise, mix_anomaly
from gladad.core.errors import DataError
from gladad.core.images import to_tensor
from gladad.core.records import Progress, no_progress
from gladad.core.settings import validated
from gladad.data.foreground import Foreground
from gladad.data.synthesis import LITE, Draw, SynthesisConfig, synthesise
from gladad.features.efficientnet import EfficientNetLite0, pretrained
from gladad.models.feature_diffusion.model import LiteBase, LiteConfig, pool

Pixels = NDArray[np.uint8]
ENCODE_BATCH = 16
TIMING_STEPS = 10
MIN_STEPS = 20
TEXTURE_UNEXPLAINED = 0.10
"""A product is a texture if the latent leaves out more than this share of the variance of its features."""
POSITION_SHARE, POSITION_PRIOR = 0.75, 10
"""Largest share of the position profile, and the number of images that stand against it."""


@validated
class LiteTrainingConfig:
    """The training budget and recipe."""

    steps: int = 600  # optimiser steps of the denoiser
    minutes: float | None = None  # wall-clock budget of the whole fit; chooses the steps by the machine's speed instead
    batch_size: int = 16  # latents per step
    learning_rate: float = 1e-3  # peak, of AdamW; warm-up over 50 steps, then a cosine to 0
    weight_decay: float = 1e-3  # of AdamW
    ema: float = 0.995  # decay of the averaged weights, which are the ones kept
    timesteps: tuple[int, int] | None = None  # drawn from here to below there; None = around those of inspection, see RECIPES
    anomaly_oriented: bool = True  # ATP: synthetic anomalies in, normal latent as the target; False = plain diffusion
    anomaly_share: float = 0.5  # probability that a sample carries a synthetic anomaly
    fade: bool = False  # fade the anomaly with the timestep, as published; measured worse here
    weighting: Literal["x0", "velocity"] = "x0"  # loss weight: error of the clean latent, or of the velocity
    pool: int = 2000  # synthetic anomalies made in advance
    decoder_steps: int = 200  # optimiser steps of the picture decoder
    statistics: int = 96  # training images that the residual's usual size is measured on
    step_quantile: float = 0.9  # delta of each probe: this quantile of the gap score on normal images
    synthesis: SynthesisConfig = LITE  # how anomalies look


def fit_lite(
    images: Sequence[Pixels],
    config: LiteConfig,
    training: LiteTrainingConfig,
    *,
    textures: Sequence[Pixels] = (),
    foreground: Foreground = "all",
    trunk: EfficientNetLite0 | None = None,
    progress: Progress = no_progress,
) -> LiteBase:
    """Train a ``lite`` base. The same images, settings and machine give the same weights, unless ``minutes`` sets the budget.

    Args:
        images: ``[H, W, 3]`` uint8 normal images, already at ``config.image_size``.
        config: Shape and scoring; the data-driven numbers in it are set here.
        training: Budget and recipe; ``config.seed`` seeds everything.
        textures: Images of the same size that synthetic anomalies take content from; generated textures when there are none.
        foreground: Where synthetic anomalies may appear.
        trunk: The frozen feature network; None loads the ImageNet weights.
        progress: Told of every stage.

    Raises:
        DataError: There are fewer than two images.
    """
    return fit_lite_multi_class(
        {config.category: images},
        config,
        training,
        textures=textures,
        foregrounds={config.category: foreground},
        trunk=trunk,
        progress=progress,
    )[config.category]


def fit_lite_multi_class(
    images: Mapping[str, Sequence[Pixels]],
    config: LiteConfig,
    training: LiteTrainingConfig,
    *,
    textures: Sequence[Pixels] = (),
    foregrounds: Mapping[str, Foreground],
    trunk: EfficientNetLite0 | None = None,
    progress: Progress = no_progress,
) -> dict[str, LiteBase]:
    """Train one denoiser for several products, which it is told apart by their class; everything else is each product's own.

    Args:
        images: Category -> ``[H, W, 3]`` uint8 normal images, already at ``config.image_size``.
        config: Shape and scoring, the same for all; with more than one category, ``config.categories`` names them.
        training: Budget and recipe; the steps and the pool of synthetic anomalies are shared.
        textures: Images of the same size that synthetic anomalies take content from; generated textures when there are none.
        foregrounds: Category -> where synthetic anomalies may appear.
        trunk: The frozen feature network; None loads the ImageNet weights.
        progress: Told of every stage.

    Returns:
        Category -> its base. All hold the same denoiser.

    Raises:
        DataError: A category has fewer than two images.
    """
    for category, own in images.items():
        if len(own) < 2:
            of = f" of {category}" if category else ""
            raise DataError(f"training needs at least 2 good images{of} besides the held-out ones, there are {len(own)}; add good images")
    started = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    trunk = pretrained() if trunk is None else trunk
    parts = []
    for category, own in images.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            base = LiteBase(replace(config, category=category), trunk)
        base.eval()
        normal = _fit_space(base, own, progress)
        choose_recipe(base)
        share = replace(training, pool=training.pool // len(images))
        parts.append(_Part(base, normal, *_synthetic_pool(base, own, share, textures, foregrounds[category], progress)))
    _train_denoiser(parts, training, generator, started, progress)
    for part, own in zip(parts, images.values(), strict=True):
        _train_decoder(part.base, part.normal, own, training, generator, progress)
        measure_residuals(part.base, own, training, progress)
        part.base.requires_grad_(False)
    return {part.base.config.category: part.base for part in parts}


@dataclass(frozen=True)
class _Part:
    """What the denoiser learns of one product.

    Attributes:
        base: The product's base.
        normal: ``[N, D, h, w]`` float16 latents of its normal images.
        anomalous: ``[P, D, h, w]`` float16 latents of synthetic anomalies.
        source: ``[P]`` the normal image of each.
    """

    base: LiteBase
    normal: Tensor
    anomalous: Tensor
    source: Tensor


def adjust_lite(base: LiteBase, config: LiteConfig, images: Sequence[Pixels], training: LiteTrainingConfig, progress: Progress) -> None:
    """Give a trained base another configuration of the inspection: what `fit_lite` measures after the training is measured anew.

    Args:
        base: Changed in place.
        config: As for `fit_lite`; its networks are those of the base.
        images: Those the base was trained on.
        training: As for `fit_lite`.
        progress: Told of every stage.
    """
    base.config = config
    choose_recipe(base)
    measure_residuals(base, images, training, progress)


def choose_recipe(base: LiteBase) -> None:
    """Settle, by the fitted feature space, what the settings leave open: the kind of product, and the timesteps of inspection."""
    config = base.config
    if config.product == "auto":
        config = replace(config, product="texture" if float(base.space.unexplained) > TEXTURE_UNEXPLAINED else "object")
    base.config = config
    if not config.reconstruction.timesteps:
        base.config = replace(config, reconstruction=replace(config.reconstruction, timesteps=base.recipe.timesteps))


def _batches(images: Sequence[Pixels]) -> Iterator[Tensor]:
    for start in range(0, len(images), ENCODE_BATCH):
        yield torch.stack([to_tensor(pixels) for pixels in images[start : start + ENCODE_BATCH]])


@torch.no_grad()
def _fit_space(base: LiteBase, images: Sequence[Pixels], progress: Progress) -> Tensor:
    """Fit the feature space; returns the normal latents ``[N, D, h, w]`` float16."""
    features = []
    for batch in _batches(images):
        features.append(base.features(batch).half())
        progress("features", min(len(images), len(features) * ENCODE_BATCH), len(images))
    base.space.fit(features)
    return torch.cat([base.space(batch.float())[0].half() for batch in features])


@torch.no_grad()
def _synthetic_pool(
    base: LiteBase,
    images: Sequence[Pixels],
    training: LiteTrainingConfig,
    textures: Sequence[Pixels],
    foreground: Foreground,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Latents of synthetic anomalies, ``[P, D, h, w]`` float16, and the index of the normal image of each, ``[P]``.

    They are made once, in bounded memory: encoding them during training would cost as much as the training step itself.
    """
    count = training.pool if training.anomaly_oriented else 0
    latents, source = [], []
    for start in range(0, count, ENCODE_BATCH):
        batch = []
        for index in range(start, min(start + ENCODE_BATCH, count)):
            draw = Draw((base.config.seed, index))
            source.append(draw.integer(0, len(images) - 1))
            batch.append(to_tensor(synthesise(images[source[-1]], draw, training.synthesis, textures, foreground)[0]))
        latents.append(base.encode(torch.stack(batch)).half())
        progress("synthetic anomalies", min(start + ENCODE_BATCH, count), count)
    if not latents:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.cat(latents), torch.tensor(source)


def _train_denoiser(
    parts: Sequence[_Part], training: LiteTrainingConfig, generator: torch.Generator, started: float, progress: Progress
) -> None:
    """Train towards the normal latent. v-prediction; the x0-weighted loss is the squared error of the implied clean latent."""
    denoiser, schedule, steps = parts[0].base.denoiser, parts[0].base.schedule, training.steps
    denoiser.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    parameters = list(denoiser.parameters())
    averaged = [p.detach().clone() for p in parameters]
    step, times = 0, [time.monotonic()]
    while step < steps:
        warmup = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * warmup * _cosine(step / steps)
        z_normal, z_input, timestep, label = _draw_batch(parts, training, generator)
        if training.fade:
            z_input = mix_anomaly(z_normal, z_input, timestep, schedule.num_timesteps)
        alpha_bar = schedule.alpha_bar(timestep)
        x_t = add_noise(z_input, torch.randn(z_normal.shape, generator=generator), alpha_bar)
        # the velocity whose implied clean latent is the normal one
        target = (alpha_bar.sqrt() * x_t - z_normal) / (1 - alpha_bar).sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = denoiser(x_t, timestep, label)
        error = (velocity - target).square()
        loss = (error * (1 - alpha_bar)).mean() if training.weighting == "x0" else error.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.data for p in parameters], 1 - min(training.ema, (1 + step) / (10 + step)))
        step += 1
        times.append(time.monotonic())
        if training.minutes is not None and step == TIMING_STEPS:
            steps = _affordable_steps(training.minutes, started, times)
        progress("denoiser", step, steps)
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
    denoiser.eval().requires_grad_(False)
    for part in parts:
        part.base.denoiser = denoiser
        part.base.refresh()


def _cosine(progress: float) -> float:
    """The learning rate's course from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def _affordable_steps(minutes: float, started: float, times: Sequence[float]) -> int:
    """Steps that fit a budget, from the median of the first ones; an eighth is kept for what follows."""
    per_step = float(np.median(np.diff(times)))
    left = minutes * 60 * 0.875 - (times[-1] - started)
    return max(MIN_STEPS, TIMING_STEPS + int(left / per_step))


def _draw_batch(
    parts: Sequence[_Part], training: LiteTrainingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normal latents and the latents to be repaired into them ``[B, D, h, w]`` float32, timesteps ``[B]``, labels ``[B]`` of products."""
    counts = [training.batch_size]
    if len(parts) > 1:
        counts = torch.randint(len(parts), (training.batch_size,), generator=generator).bincount(minlength=len(parts)).tolist()
    pairs, timesteps, labels = [], [], []
    for part, count in zip(parts, counts, strict=True):
        if count:
            span = part.base.recipe.trained if training.timesteps is None else training.timesteps
            pairs.append(_draw_pairs(part.normal, part.anomalous, part.source, count, training.anomaly_share, generator))
            timesteps.append(torch.randint(*span, (count,), generator=generator))
            labels.append(part.base.labels(count))
    known = [label for label in labels if label is not None]
    z_normal, z_input = (torch.cat(side) for side in zip(*pairs, strict=True))
    return z_normal, z_input, torch.cat(timesteps), torch.cat(known) if known else None


def _draw_pairs(
    normal: Tensor, anomalous: Tensor, source: Tensor, size: int, anomaly_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``size`` normal latents and the latents to be repaired into them, both ``[B, D, h, w]`` float32."""
    own = torch.randint(len(normal), (size,), generator=generator)
    if not len(anomalous):
        z_normal = normal[own].float()
        return z_normal, z_normal
    from_pool = torch.randint(len(anomalous), (size,), generator=generator)
    repaired = torch.rand(size, generator=generator) < anomaly_share
    z_normal = normal[torch.where(repaired, source[from_pool], own)].float()
    return z_normal, torch.where(repaired.view(-1, 1, 1, 1), anomalous[from_pool].float(), z_normal)


def _train_decoder(
    base: LiteBase,
    normal: Tensor,
    images: Sequence[Pixels],
    training: LiteTrainingConfig,
    generator: torch.Generator,
    progress: Progress,
) -> None:
    """Train the picture decoder on the same normal images, by absolute error at its own size."""
    decoder = base.decoder.train().requires_grad_(True)
    size = (4 * normal.shape[-2], 4 * normal.shape[-1])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, fused=True)
    for step in range(training.decoder_steps):
        rows = torch.randint(len(normal), (8,), generator=generator)
        target = F.interpolate(torch.stack([to_tensor(images[row]) for row in rows.tolist()]), size, mode="area")
        with torch.autocast("cpu", torch.bfloat16):
            picture = decoder(normal[rows].float())
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * _cosine(step / training.decoder_steps)
        loss = F.l1_loss(picture.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("picture decoder", step + 1, training.decoder_steps)
    decoder.eval().requires_grad_(False)


@torch.no_grad()
def measure_residuals(base: LiteBase, images: Sequence[Pixels], training: LiteTrainingConfig, progress: Progress) -> None:
    """Measure what residuals are usual on normal images, and set what turns them into a map by it.

    The images used here are good ones that the denoiser may have seen; the held-out images stay untouched for the decision threshold,
    whose guarantee needs that.
    """
    config = base.config
    chosen = np.unique(np.linspace(0, len(images) - 1, min(training.statistics, len(images))).astype(int)).tolist()
    if config.position_share is None:  # the fewer images, the less is known of single positions
        config = replace(config, position_share=POSITION_SHARE * len(chosen) / (len(chosen) + POSITION_PRIOR))
    search, plain = config.reconstruction, replace(config.reconstruction, adaptive=False, fusion="none")
    base.config = replace(config, reconstruction=plain)
    base.depth_scale = torch.ones(len(search.timesteps))

    latents, outsides, residuals = [], [], []
    for batch in _batches([images[index] for index in chosen]):
        latent, outside = base.space(base.features(batch))
        latents.append(latent)
        outsides.append(outside)
        residuals.append(latent - base.rebuild(latent).latent)
        progress("usual residuals", sum(map(len, latents)), len(chosen))
    residual = torch.cat(residuals)
    base.residual_scale.copy_(residual.square().mean((0, 2, 3), keepdim=True).sqrt())
    usual = torch.zeros_like(base.usual_energy)
    for part, outside in zip(residuals, outsides, strict=True):
        inside = base.space.to_features(part)
        for row, difference in enumerate((inside, inside + outside)):
            usual[row] += pool(difference, base.recipe.window).square().mean((2, 3)).sum(0)
    base.usual_energy.copy_(usual / len(residual))
    energies = [base.energy(part, outside) for part, outside in zip(residuals, outsides, strict=True)]
    profile = pool(torch.cat(energies).mean(0, keepdim=True), 3)  # smoothed: parts never lie exactly alike
    base.position_energy.copy_(profile / profile.mean())

    # the step search and the fusion mask, now that the residual's scale is known
    if search.adaptive and not search.step_thresholds:
        traces = torch.cat([base.rebuild(latent).trace for latent in latents])
        deltas = traces.quantile(training.step_quantile, dim=0)
        search = replace(search, step_thresholds=tuple(deltas.tolist()))
        base.depth_scale.copy_(_depth_scale(base, latents, outsides, plain))
    gap = (residual / base.residual_scale).square().mean(1)
    center = float(gap.flatten().kthvalue(max(1, int(0.99 * gap.numel()))).values)
    base.config = replace(config, reconstruction=replace(search, fusion_center=center, fusion_width=center / 4))


def _depth_scale(base: LiteBase, latents: Sequence[Tensor], outsides: Sequence[Tensor], plain: OneCallConfig) -> Tensor:
    """Mean root energy of normal latents after each number of probes, relative to that after all of them: ``[K]``."""
    before, means = base.config, []
    for count in range(1, len(plain.timesteps) + 1):
        base.config = replace(before, reconstruction=replace(plain, timesteps=plain.timesteps[:count]))
        energies = [base.energy(z - base.rebuild(z).latent, outside) for z, outside in zip(latents, outsides, strict=True)]
        means.append(torch.cat(energies).sqrt().mean())
    base.config = before
    return torch.stack(means) / means[-1]
