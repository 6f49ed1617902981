"""Training of the ``lite`` base from good images alone: features, denoiser, decoder, and the usual size of its residuals."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gladad.algorithm import add_noise, mix_anomaly, top_k_mean
from gladad.efficientnet import EfficientNetLite0, pretrained
from gladad.errors import DataError
from gladad.images import to_tensor
from gladad.lite import POOLING, LiteBase, LiteConfig, pool
from gladad.metrics import auroc
from gladad.synthesis import LITE, Draw, Foreground, SynthesisConfig, synthesise
from gladad.types import Progress, no_progress

Pixels = NDArray[np.uint8]
ENCODE_BATCH = 16
TIMING_STEPS = 10
MIN_STEPS = 20
VALIDATION_STREAM = 2**31
"""Keeps the random numbers of the synthetic defects that settings are judged on apart from those of training."""
OUTSIDE_WEIGHTS = (0.0, 0.3, 1.0)
POSITION_SHARES = (0.0, 0.7)
NEARLY_EQUAL = 0.002
"""Difference in AUROC below which the smaller pooling window is preferred."""


@dataclass(frozen=True, kw_only=True)
class LiteTrainingConfig:
    """The training budget and recipe."""

    steps: int = 600  # optimiser steps of the denoiser
    minutes: float | None = None  # wall-clock budget of the whole fit; chooses the steps by the machine's speed instead
    batch_size: int = 16  # latents per step
    learning_rate: float = 6e-4  # peak, of AdamW; warm-up over 50 steps, then a cosine to 0
    weight_decay: float = 1e-3  # of AdamW
    ema: float = 0.995  # decay of the averaged weights, which are the ones kept
    max_timestep: int = 700  # timesteps are drawn below this
    anomaly_oriented: bool = True  # ATP: synthetic anomalies in, normal latent as the target; False = plain diffusion
    anomaly_share: float = 0.5  # probability that a sample carries a synthetic anomaly
    fade: bool = False  # fade the anomaly with the timestep, as published; measured worse here
    weighting: Literal["x0", "velocity"] = "x0"  # loss weight: error of the clean latent, or of the velocity
    pool: int = 2000  # synthetic anomalies made in advance
    decoder_steps: int = 200  # optimiser steps of the picture decoder
    statistics: int = 96  # training images that the residual's usual size is measured on, and as many synthetic defects
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
    if len(images) < 2:
        raise DataError(f"training needs at least 2 good images besides the held-out ones, there are {len(images)}; add good images")
    started = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        base = LiteBase(config, pretrained() if trunk is None else trunk)
    base.eval()

    normal = _fit_space(base, images, progress)
    anomalous, source = _synthetic_pool(base, images, training, textures, foreground, progress)
    _train_denoiser(base, normal, anomalous, source, training, generator, started, progress)
    _train_decoder(base, normal, images, training, generator, progress)
    measure_residuals(base, images, training, textures, foreground, progress)
    return base.requires_grad_(False)


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
    base: LiteBase,
    normal: Tensor,
    anomalous: Tensor,
    source: Tensor,
    training: LiteTrainingConfig,
    generator: torch.Generator,
    started: float,
    progress: Progress,
) -> None:
    """Train towards the normal latent. v-prediction; the x0-weighted loss is the squared error of the implied clean latent."""
    denoiser, schedule, steps = base.denoiser, base.schedule, training.steps
    denoiser.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    parameters = list(denoiser.parameters())
    averaged = [p.detach().clone() for p in parameters]
    step, times = 0, [time.monotonic()]
    while step < steps:
        warmup = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        z_normal, z_input = _draw_pairs(normal, anomalous, source, training, generator)
        timestep = torch.randint(0, training.max_timestep, (len(z_normal),), generator=generator)
        if training.fade:
            z_input = mix_anomaly(z_normal, z_input, timestep, schedule.num_timesteps)
        alpha_bar = schedule.alpha_bar(timestep)
        x_t = add_noise(z_input, torch.randn(z_normal.shape, generator=generator), alpha_bar)
        # the velocity whose implied clean latent is the normal one
        target = (alpha_bar.sqrt() * x_t - z_normal) / (1 - alpha_bar).sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = denoiser(x_t, timestep)
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
    base.refresh()


def _affordable_steps(minutes: float, started: float, times: Sequence[float]) -> int:
    """Steps that fit a budget, from the median of the first ones; an eighth is kept for what follows."""
    per_step = float(np.median(np.diff(times)))
    left = minutes * 60 * 0.875 - (times[-1] - started)
    return max(MIN_STEPS, TIMING_STEPS + int(left / per_step))


def _draw_pairs(
    normal: Tensor, anomalous: Tensor, source: Tensor, training: LiteTrainingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch of normal latents and of the latents to be repaired into them, both ``[B, D, h, w]`` float32."""
    size = training.batch_size
    own = torch.randint(len(normal), (size,), generator=generator)
    if not len(anomalous):
        z_normal = normal[own].float()
        return z_normal, z_normal
    from_pool = torch.randint(len(anomalous), (size,), generator=generator)
    repaired = torch.rand(size, generator=generator) < training.anomaly_share
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
            group["lr"] = 2e-3 * (0.5 + 0.5 * math.cos(math.pi * step / training.decoder_steps))
        loss = F.l1_loss(picture.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("picture decoder", step + 1, training.decoder_steps)
    decoder.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Residuals:
    """Residuals ``[N, D, h, w]`` and outside energies ``[N, 1, h, w]`` of some images."""

    residual: Tensor
    outside: Tensor


@torch.no_grad()
def measure_residuals(
    base: LiteBase,
    images: Sequence[Pixels],
    training: LiteTrainingConfig,
    textures: Sequence[Pixels],
    foreground: Foreground,
    progress: Progress,
) -> None:
    """Measure what residuals are usual on normal images, and choose how they become a map.

    The images used here are good ones that the denoiser may have seen; the held-out images stay untouched for the decision threshold,
    whose guarantee needs that.
    """
    config = base.config
    plain = replace(config.reconstruction, adaptive=False, fusion="none")
    base.config = replace(config, reconstruction=plain)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(training.statistics, len(images))).astype(int)).tolist()
    total = 2 * len(chosen)

    def run(some: Sequence[Pixels], done: int) -> _Residuals:
        rows = []
        for batch in _batches(some):
            latent, outside = base.space(base.features(batch))
            rows.append((latent - base.rebuild(latent).latent, outside))
            done += len(batch)
            progress("usual residuals", done, total)
        return _Residuals(torch.cat([r for r, _ in rows]), torch.cat([o for _, o in rows]))

    def damage(index: int) -> Pixels:
        draw = Draw((base.config.seed, VALIDATION_STREAM, index))
        return synthesise(images[index], draw, training.synthesis, textures, foreground)[0]

    base.depth_scale = torch.ones(len(config.reconstruction.timesteps))
    normal = run([images[index] for index in chosen], 0)
    base.residual_scale.copy_(normal.residual.square().mean((0, 2, 3), keepdim=True).sqrt())
    for row, window in enumerate(POOLING):
        base.scale_energy[row] = pool(normal.residual, window).square().mean((0, 2, 3))
    base.outside_energy.copy_(normal.outside.mean())

    config = _choose_evidence(base, normal, run([damage(index) for index in chosen], len(chosen)), config)
    base.config = config
    profile = _position_profile(base.energy(normal.residual, normal.outside))
    base.position_energy.copy_(profile / profile.mean())

    # the step search and the fusion mask, now that the residual's scale is known
    if config.reconstruction.adaptive and not config.reconstruction.step_thresholds:
        base.config = replace(config, reconstruction=plain)
        latents = torch.cat([base.encode(batch) for batch in _batches([images[index] for index in chosen])])
        traces = torch.cat([base.rebuild(part).trace for part in latents.split(ENCODE_BATCH)])
        deltas = traces.quantile(training.step_quantile, dim=0)
        config = replace(config, reconstruction=replace(config.reconstruction, step_thresholds=tuple(deltas.tolist())))
        base.depth_scale.copy_(_depth_scale(base, latents, normal.outside, config))
    gap = (normal.residual / base.residual_scale).square().mean(1)
    center = float(gap.flatten().kthvalue(max(1, int(0.99 * gap.numel()))).values)
    reconstruction = replace(config.reconstruction, fusion_center=center, fusion_width=center / 4)
    base.config = replace(config, reconstruction=reconstruction)


def _depth_scale(base: LiteBase, latents: Tensor, outside: Tensor, config: LiteConfig) -> Tensor:
    """Mean root energy of normal latents after each number of probes, relative to that after all of them: ``[K]``."""
    means = []
    for count in range(1, len(config.reconstruction.timesteps) + 1):
        some = replace(config.reconstruction, timesteps=config.reconstruction.timesteps[:count], adaptive=False, fusion="none")
        base.config = replace(config, reconstruction=some)
        residual = torch.cat([part - base.rebuild(part).latent for part in latents.split(ENCODE_BATCH)])
        means.append(base.energy(residual, outside).sqrt().mean())
    return torch.stack(means) / means[-1]


def _position_profile(energy: Tensor) -> Tensor:
    """Mean energy per position ``[1, 1, h, w]``, smoothed over 3x3 cells: parts never lie exactly alike."""
    return pool(energy.mean(0, keepdim=True), 3)


def _choose_evidence(base: LiteBase, normal: _Residuals, damaged: _Residuals, config: LiteConfig) -> LiteConfig:
    """Choose pooling, outside weight and position share by how well synthetic defects stand out from normal images.

    Which of them helps differs between products: pooling helps textures, the outside energy objects, the position profile parts that are
    always placed alike. Each setting is judged by the AUROC between images with and without a synthetic defect, scored as at inspection.
    Among nearly equal poolings the smallest wins, because it places defects best.
    """
    pools = [(window,) for window in POOLING] if not config.scales else [config.scales]
    weights = OUTSIDE_WEIGHTS if config.outside_weight is None else (config.outside_weight,)
    shares = POSITION_SHARES if config.position_share is None else (config.position_share,)
    labels = np.r_[np.zeros(len(normal.residual)), np.ones(len(damaged.residual))]
    even, odd = slice(0, None, 2), slice(1, None, 2)

    def quality(candidate: LiteConfig) -> float:
        base.config = candidate
        energies = [base.energy(part.residual, part.outside) for part in (normal, damaged)]
        scores = np.zeros(len(labels))
        for own, other in ((even, odd), (odd, even)):  # the profile of one half judges the other
            profile = _position_profile(energies[0][other if len(energies[0]) > 1 else own])
            base.position_energy.copy_(profile / profile.mean())
            for offset, energy in zip((0, len(energies[0])), energies, strict=True):
                maps = base.anomaly_map(energy[own])
                scores[offset : offset + len(energy)][own] = top_k_mean(maps, candidate.top_k).numpy()
        return auroc(scores, labels)

    best: dict[tuple[int, ...], tuple[float, LiteConfig]] = {}
    for scales in pools:
        for weight in weights:
            for share in shares:
                candidate = replace(config, scales=scales, outside_weight=weight, position_share=share)
                found = quality(candidate)
                if scales not in best or found > best[scales][0] + 1e-9:
                    best[scales] = (found, candidate)
    top = max(found for found, _ in best.values())
    return next(candidate for found, candidate in best.values() if found >= top - NEARLY_EQUAL)
