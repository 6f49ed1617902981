"""Training of ``lite`` from good images alone: features, memories, denoisers, decoder, and what is usual on normal images."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gladad.core.errors import DataError, TrainingError
from gladad.core.inference import fast_autocast, fast_dtype
from gladad.core.records import Progress, Watch, no_progress, prefixed
from gladad.core.tensors import to_tensor
from gladad.data.foreground import Foreground
from gladad.data.samples import apart_of
from gladad.features.extractor import Extractor, load_extractor
from gladad.features.memory import ClusterGaussians
from gladad.models.feature_diffusion.material import Part, fit_scale, make_material, measured_of, with_variants
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.past import COPY, VARIANT, Past, spread
from gladad.models.feature_diffusion.scale import Scale
from gladad.models.feature_diffusion.settings import (
    DEFAULT_STEPS,
    FeatureDiffusionConfig,
    FeatureDiffusionSettings,
    FeatureTrainingSettings,
)
from gladad.models.feature_diffusion.watching import UNSEEN, Losses, show_drawn, show_mended
from gladad.training.optimizers import Muon

Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")
TIMING_STEPS = 10
MIN_STEPS = 20
BATCH_CELLS = 1536
"""Of latents that are larger, fewer make a batch, so that a step takes little longer."""
FITTED = 100
"""Images at most by which the Gaussians are fitted."""
BAND, STEEPEST = 2, 2
"""Standard deviations about the mean in which the level of an image is usual, and the most that the largest cells may grow with it."""
SMALLEST_SPREAD = 0.01
"""Of the logarithm of scores: images that are all but alike must not make a scale infinitely sure."""


def train_models(
    images: Mapping[str, Sequence[Pixels]],
    config: FeatureDiffusionConfig,
    *,
    textures: Sequence[Pixels] = (),
    foregrounds: Mapping[str, Foreground] | None = None,
    share: int = 1,
    photographs: Sequence[int] | None = None,
    copies: int = 0,
    extractor: Extractor | None = None,
    device: torch.device = CPU,
    progress: Progress = no_progress,
    watch: Watch | None = None,
) -> dict[str, FeatureDiffusion]:
    """Train the denoisers for one product or several, which are told apart by class; everything else is each product's own.

    The same images, settings and machine give the same weights, unless ``minutes`` sets the budget.

    Args:
        images: Product -> ``[H, W, 3]`` uint8 normal images, already at ``config.image_size``.
        config: The settings, and the products by name where there are several; what the settings leave open is resolved here.
        textures: Images of the same size that synthetic anomalies take content from; generated textures when there are none.
        foregrounds: Product -> where synthetic anomalies may appear; None means everywhere.
        share: Number of trainings that the default budget is divided among.
        photographs: Number of the photograph that each image is, or is a copy or a tile of; None = each is one.
        copies: Number of images, the last ones, that are copies of others.
        extractor: The frozen feature network; None loads that of the settings.
        device: To train and to stay on. Everything random is drawn on the CPU, so that all devices draw the same.
        progress: Told of every stage.
        watch: Told of every loss, and shown a few examples of the first product.

    Returns:
        Product -> its model. All hold the same denoisers.

    Raises:
        DataError: A product has fewer than two images.
        TrainingError: The loss is not finite.
    """
    _check_counts(images)
    started = time.monotonic()
    planned = budget(config.settings.training, len(images), share)
    generator = torch.Generator().manual_seed(config.settings.seed)
    extractor = (load_extractor(config.settings.features) if extractor is None else extractor).fast()
    models = {product: _untrained(replace(config, category=product if config.categories else ""), extractor, device) for product in images}
    materials = {}
    for product, model in models.items():
        count, place = planned.pool // len(images) if model.all_scales()[0].learns_repairs else 0, (foregrounds or {}).get(product, "all")
        materials[product] = make_material(model, images[product], photographs, copies, place, count, textures, progress)
    for number in range(config.settings.scales):
        told, seen = prefixed(progress, f"scale {number + 1}: "), Losses(watch, f"scale {number + 1}: ")
        learnt = [fit_scale(model, number, materials[product], told) for product, model in models.items()]
        _train_denoiser(learnt, planned.until(number, config.settings.scales), generator, started, told, seen)
        for model, part in zip(models.values(), learnt, strict=True):
            if number == 0:
                _train_decoder(model, part, generator, progress, Losses(watch))
            _measure(model, number, part.images, part.owner, part.sort, part.measured, part.trained[part.sort[part.trained] != COPY])
            _keep(model, part)
        if number == 0 and watch is not None:
            show_mended(watch, *next(zip(models.values(), materials.values(), strict=True)))
    return {product: model.requires_grad_(False) for product, model in models.items()}


def _keep(model: FeatureDiffusion, part: Part) -> None:
    """Keep latents of a scale, where that is wanted."""
    if model.config.settings.training.keep_latents:
        model.keep([*model.past(), Past.of(part)])


def _untrained(config: FeatureDiffusionConfig, extractor: Extractor, device: torch.device) -> FeatureDiffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.settings.seed)
        return FeatureDiffusion(replace(config, extractor=extractor.identity), extractor).on(device).eval()


def _check_counts(images: Mapping[str, Sequence[Pixels]]) -> None:
    for product, own in images.items():
        if len(own) < 2:
            of = f" of {product}" if product else ""
            raise DataError(f"training needs at least 2 good images{of} besides the held-out ones, there are {len(own)}; add good images")


@dataclass(frozen=True)
class Budget:
    """Of one training: optimiser steps, or minutes that choose them by the machine's speed; and synthetic anomalies."""

    steps: int
    minutes: float | None
    pool: int

    def until(self, scale: int, scales: int) -> Budget:
        """That of one scale: its minutes are those from the start on."""
        return self if self.minutes is None else replace(self, minutes=self.minutes * (scale + 1) / scales)


def budget(training: FeatureTrainingSettings, products: int, share: int) -> Budget:
    """The budget of one of ``share`` trainings for so many products.

    Steps that were set are those of each training. The default ones grow with the square root of the number of products and are divided,
    as the synthetic anomalies are; minutes are those of all trainings together. A short training makes no more anomalies than it needs.
    """
    if training.steps is not None:
        drawn = math.ceil(training.steps * training.batch_size * training.anomaly_share)
        return Budget(training.steps, None, min(training.pool, drawn))
    steps = max(1, round(DEFAULT_STEPS * math.sqrt(products)) // share)
    return Budget(steps, None if training.minutes is None else training.minutes / share, max(1, training.pool // share))


def adjusted(model: FeatureDiffusion, settings: FeatureDiffusionSettings, images: Sequence[Pixels], progress: Progress) -> FeatureDiffusion:
    """A copy that inspects as other settings say: what is measured after the training is measured anew.

    Args:
        model: It is not changed; the copy has its networks.
        settings: Their networks and training are those of the model.
        images: Those the model was trained on.
        progress: Told of every stage.
    """
    kept = [part for scale in model.all_scales() for part in (scale.stack, scale.denoiser, scale.memory)]
    other = copy.deepcopy(model, {id(part): part for part in (*kept, model.decoder, model.extractor)})
    other.config = replace(model.config, settings=settings)
    shown, owner, sort = with_variants(images, replace(other.config, turned=None))  # nothing is measured on turned copies
    apart = torch.from_numpy(apart_of(len(images), settings.training.apart))[owner]
    for number in range(settings.scales):
        _measure(other, number, shown, owner, sort, measured_of(apart, sort), torch.nonzero(~apart).flatten())
        progress("usual residuals", number + 1, settings.scales)
    return other


def _train_denoiser(
    parts: Sequence[Part], planned: Budget, generator: torch.Generator, started: float, progress: Progress, seen: Losses = UNSEEN
) -> None:
    """Train the denoiser by the method, and keep the average of its weights."""
    denoiser, method, training = parts[0].scale.denoiser, parts[0].scale.method, parts[0].scale.config.settings.training
    device = parts[0].scale.device
    denoiser.train().requires_grad_(True)
    parameters = list(denoiser.parameters())
    optimizer = Muon(parameters, training.learning_rate, training.weight_decay, dtype=fast_dtype(device))
    averaged = [p.detach().clone() for p in parameters]
    step, steps, times = 0, planned.steps, [time.monotonic()]
    while step < steps:
        z_normal, z_input, shown, timestep, label = _draw_batch(parts, training, generator, device)
        x_t, target, weight = method.example(z_normal, z_input, timestep, generator, training)
        with fast_autocast(device):
            output = denoiser(torch.cat([x_t, shown], dim=1), timestep, label)
        loss = ((output - target).square() * weight).mean()
        if not loss.isfinite():
            raise TrainingError(f"the loss of the denoiser is {float(loss.detach())} at step {step + 1}; lower training.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / 50) * _cosine(step / steps)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, [p.data for p in parameters], 1 - min(training.ema, (1 + step) / (10 + step)))
        step += 1
        times.append(time.monotonic())
        if planned.minutes is not None and step == TIMING_STEPS:
            steps = _affordable_steps(planned.minutes, started, times)
        progress("denoiser", step, steps)
        seen.add("denoiser", step, loss)
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average.bfloat16())  # as files keep them
    denoiser.eval().requires_grad_(False)
    for part in parts:
        part.scale.denoiser = denoiser


def _cosine(progress: float) -> float:
    """The learning rate's course from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def _affordable_steps(minutes: float, started: float, times: Sequence[float]) -> int:
    """Steps that fit a budget, from the median of the first ones; an eighth is kept for what follows."""
    per_step = float(np.median(np.diff(times)))
    left = minutes * 60 * 0.875 - (times[-1] - started)
    return max(MIN_STEPS, TIMING_STEPS + int(left / per_step))


def _draw_batch(
    parts: Sequence[Part], training: FeatureTrainingSettings, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Normal latents, the latents to be repaired into them and what is shown beside them, timesteps ``[B]``, labels ``[B]`` of products.

    The first three are ``[B, D, h, w]`` float32; without a memory the third has no channels.
    """
    size = max(1, round(training.batch_size * min(1.0, BATCH_CELLS / math.prod(parts[0].scale.grid))))
    counts = [size]
    if len(parts) > 1:
        counts = torch.randint(len(parts), (size,), generator=generator).bincount(minlength=len(parts)).tolist()
    drawn, timesteps, labels = [], [], []
    for part, count in zip(parts, counts, strict=True):
        if count:
            drawn.append(_draw(part, count, training.anomaly_share, generator))
            timesteps.append(torch.randint(*part.scale.method.trained_timesteps(training), (count,), generator=generator))
            labels.append(part.scale.labels(count))
    known = [label for label in labels if label is not None]
    z_normal, z_input, shown = (torch.cat(side).float().to(device) for side in zip(*drawn, strict=True))
    return z_normal, z_input, shown, torch.cat(timesteps).to(device), torch.cat(known) if known else None


def _draw(part: Part, size: int, anomaly_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``size`` normal latents, the latents to be repaired into them, and what is shown beside those."""
    own = part.trained[torch.randint(len(part.trained), (size,), generator=generator)]
    known = len(part.shown) > 0
    if not len(part.anomalous):
        z_normal = part.latents[own]
        return z_normal, z_normal, part.shown[own] if known else z_normal[:, :0]
    from_pool = torch.randint(len(part.anomalous), (size,), generator=generator)
    repaired = torch.rand(size, generator=generator) < anomaly_share
    normal, mask = part.latents[torch.where(repaired, part.source[from_pool], own)], repaired.view(-1, 1, 1, 1)
    z_input = torch.where(mask, part.anomalous[from_pool], normal)
    return normal, z_input, torch.where(mask, part.anomalous_shown[from_pool], part.shown[own]) if known else normal[:, :0]


def _train_decoder(model: FeatureDiffusion, part: Part, generator: torch.Generator, progress: Progress, seen: Losses = UNSEEN) -> None:
    """Train the picture decoder on the same normal images, by absolute error at its own size."""
    decoder, steps = model.decoder.train().requires_grad_(True), model.config.settings.training.decoder_steps
    size = (4 * part.latents.shape[-2], 4 * part.latents.shape[-1])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, fused=True)
    for step in range(steps):
        rows = part.trained[torch.randint(len(part.trained), (8,), generator=generator)]
        shown = torch.stack([to_tensor(part.images[row]) for row in rows.tolist()]).to(model.device)
        target = F.interpolate(shown, size, mode="area")
        with fast_autocast(model.device):
            picture = decoder(part.latents[rows].float().to(model.device))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * _cosine(step / steps)
        loss = F.l1_loss(picture.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("picture decoder", step + 1, steps)
        seen.add("picture decoder", step + 1, loss)
        if seen.watch is not None and step + 1 in {1, steps // 4, steps}:
            show_drawn(seen.watch, step + 1, model, part)
    decoder.eval().requires_grad_(False)


@torch.no_grad()
def _measure(
    model: FeatureDiffusion, number: int, images: Sequence[Pixels], owner: Tensor, sort: Tensor, measured: Tensor, trained: Tensor
) -> None:
    """Measure at one scale how residuals vary and what is usual on normal images, as if the memory did not know them.

    The images held out for the decision threshold are not among them: its guarantee needs that.

    Args:
        model: Whose scale it is.
        number: Of the scale.
        images: ``[H, W, 3]`` uint8 normal images.
        owner: ``[N]`` the photograph that each is of.
        sort: ``[N]``, see `Material`.
        measured: Numbers of the images by which is measured what is usual.
        trained: Numbers of the images by which the Gaussians are fitted, if they are not too many.

    Raises:
        TrainingError: A statistic is not finite.
    """
    scale = model.all_scales()[number]
    if (sort[trained] == VARIANT).any():  # their sorts take turns, so an even choice might leave one out
        trained = trained[torch.randperm(len(trained), generator=torch.Generator().manual_seed(model.config.settings.seed))]
    fitted = spread(trained, FITTED)

    def encoded(places: Tensor) -> Tensor:  # one by one, as in inspection
        return torch.cat([scale.encode(to_tensor(images[place])[None].to(model.device)) for place in places.tolist()])

    _measure_by(model, number, (encoded(measured), owner[measured], sort[measured] == VARIANT), (encoded(fitted), owner[fitted]))


@torch.no_grad()
def _measure_by(model: FeatureDiffusion, number: int, measured: tuple[Tensor, Tensor, Tensor], fitted: tuple[Tensor, Tensor]) -> None:
    """`_measure` by latents ``[N, D, h, w]`` float32 of both choices of images, their owners ``[N]``, and which ``[N]`` are variants."""
    scale, settings = model.all_scales()[number], model.config.settings
    (latents, owner, varied), (trained, trained_owner) = measured, fitted
    plain = replace(settings, reconstruction=scale.method.plain())
    _inspect_by(model, plain)
    scale.residual_scale.fill_(1.0)
    clean, _ = _rebuilt(scale, latents, owner)
    scale.residual_scale.copy_((latents - clean).square().mean((0, 2, 3), keepdim=True).sqrt())
    if settings.gaussians:
        shown, _ = _rebuilt(scale, trained, trained_owner)
        scale.gaussians.fit(shown, trained - shown, trained_owner, settings.seed)
    learnt = bool(torch.isin(owner, trained_owner).any())
    magnitude = _magnitude(scale, latents, clean, owner, learnt)
    scale.usual_energy.copy_(magnitude.square().mean())
    if number == 0 and settings != plain:  # the step search and the fusion mask, now that the scale is known
        deltas = _rebuilt(scale, latents, owner)[1].quantile(settings.training.step_quantile, dim=0).tolist()
        gap = ((latents - clean) / scale.residual_scale).square().mean(1).flatten()
        centre = float(gap.kthvalue(max(1, int(0.99 * gap.numel()))).values)
        _inspect_by(model, settings)
        settings = replace(settings, reconstruction=scale.method.settled(deltas, centre))
    _inspect_by(model, settings)
    if settings != plain:
        magnitude = _magnitude(scale, latents, _rebuilt(scale, latents, owner)[0], owner, learnt)
    evidence = scale.evidence(magnitude)
    scale.usual_level.zero_()
    if varied.any():
        scale.usual_level.copy_(_usual_level(scale, evidence, varied))
    scores = scale.scores(evidence).log()
    scale.usual_scores = torch.stack([scores.mean(1), scores.std(1, correction=0).clamp_min(SMALLEST_SPREAD)], dim=1)
    for name in ("residual_scale", "usual_energy", "usual_level", "usual_scores"):
        if not getattr(scale, name).isfinite().all():
            raise TrainingError(f"the statistic {name} of normal residuals is not finite; are the good images all of one colour?")


def _usual_level(scale: Scale, evidence: Tensor, varied: Tensor) -> Tensor:
    """`Scale.usual_level` from the evidence ``[N, 1, h, w]`` of normal images, of which ``[N]`` are tolerated variants; so far it has none.

    The regression's penalty is that of as many images as far beyond the usual levels as these vary: without it a few that are hardly beyond
    them would decide.
    """
    level = scale.level(evidence).log()
    plain = level[~varied]
    spread_of_plain = plain.std(correction=0).clamp_min(SMALLEST_SPREAD)
    lowest, highest = (plain.mean() + side * BAND * spread_of_plain for side in (-1, 1))
    least, most = level.min().minimum(lowest), level.max().maximum(highest)
    beyond, largest = level - level.clamp(lowest, highest), scale.scores(evidence)[0].log()
    deviation = beyond - beyond.mean()
    slope = (deviation * largest).mean() / (deviation.square().mean() + spread_of_plain.square())
    return torch.stack([lowest, highest, least, most, slope.clamp(0, STEEPEST)])


def _rebuilt(scale: Scale, latents: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Normal latents ``[N, D, h, w]`` rebuilt as if the memory did not know the images ``[N]``, and the traces of that."""
    own = owner.to(latents.device)
    found = [scale.rebuild(latents[i : i + 1], own[i : i + 1]) for i in range(len(latents))]
    return torch.cat([each.latent for each in found]), torch.cat([each.trace for each in found])


def _magnitude(scale: Scale, latents: Tensor, rebuilt: Tensor, owner: Tensor, learnt: bool) -> Tensor:
    """That of normal latents as if the Gaussians had not learnt them: where they have, by others fitted to half of the images."""
    half = owner.unique(return_inverse=True)[1] % 2
    if not (learnt and scale.config.settings.gaussians and half.any()):
        return scale.magnitude(latents, rebuilt)
    found = torch.empty_like(latents[:, :1])
    for side in (0, 1):
        own, others = half == side, ClusterGaussians(scale.dimensions)
        others.fit(rebuilt[~own], (latents - rebuilt)[~own], owner[~own], scale.config.settings.seed)
        found[own] = others(rebuilt[own], (latents - rebuilt)[own])
    return found


def _inspect_by(model: FeatureDiffusion, settings: FeatureDiffusionSettings) -> None:
    model.config = replace(model.config, settings=settings)
