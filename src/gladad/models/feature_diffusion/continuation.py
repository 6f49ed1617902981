"""A training of ``lite`` that goes on: further good images join what the model knows, and latents of the old ones are replayed.

The feature space stays, so that old latents, memory and denoisers keep their meaning. New vectors join the memory, the denoisers go on from
their weights with as many old latents as new ones in a step, and what is usual is measured anew on images that no denoiser was shown.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gladad.core.errors import DataError
from gladad.core.records import Progress, prefixed
from gladad.data.foreground import Foreground
from gladad.data.samples import apart_of
from gladad.data.synthesis import Draw
from gladad.features.memory import covering
from gladad.models.feature_diffusion.material import Part, _shown, features_of, measured_of, with_defects, with_variants
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.past import IMAGE, KEPT, VARIANT, Past, spread
from gladad.models.feature_diffusion.scale import Scale
from gladad.models.feature_diffusion.settings import FeatureDiffusionSettings
from gladad.models.feature_diffusion.training import FITTED, MIN_STEPS, _measure_by, _train_denoiser, budget

Pixels = NDArray[np.uint8]
SHARE = 0.2
"""Of the steps, or minutes, of a training from the start."""
APART = 5
"""Of so many new images the denoisers are not shown one, by which is measured what is usual."""
SAME = 0.1
"""Squared distance per dimension up to which a vector of the memory is one of an image: another machine rounds otherwise."""


@dataclass(frozen=True)
class Learning:
    """How new images become what is learnt.

    Attributes:
        settings: As the user chose them.
        place: Where synthetic anomalies may appear.
        textures: Images of the model's size that these take content from.
        progress: Told of every stage.
    """

    settings: FeatureDiffusionSettings
    place: Foreground
    textures: Sequence[Pixels]
    progress: Progress


def extended(model: FeatureDiffusion, new: Sequence[Pixels], old: Sequence[Pixels] | None, learning: Learning) -> FeatureDiffusion:
    """A copy of a model that has learnt further images.

    None of the images that thresholds are made from may be among those given: they must be as new to the networks as a part that
    comes in later, or the thresholds promise nothing.

    Args:
        model: Of one product; it is not changed.
        new: ``[H, W, 3]`` uint8 good images of the model's size, one or more.
        old: All images that it was trained on, in their order; needed where it keeps no latents of them.
        learning: How.

    Returns:
        The model, which keeps latents of old and new images.

    Raises:
        DataError: The old images are not those of the training.
        TrainingError: A loss or a statistic is not finite.
    """
    started, settings = time.monotonic(), learning.settings
    past = model.past() if old is None else _of_old(model, old, learning)
    kept = [part for scale in model.all_scales() for part in (scale.stack, scale.space)]
    made = copy.deepcopy(model, {id(part): part for part in (*kept, model.decoder, model.extractor)})
    made.config = replace(model.config, settings=settings)
    known = [each.owner for each in past] + [each.usual_owner for each in past] + [scale.memory.owner for scale in model.all_scales()]
    first = 1 + max(int(own.max()) for own in known if len(own))
    owners, count = torch.arange(first, first + len(new)), KEPT if made.all_scales()[0].learns_repairs else 0
    apart = torch.arange(len(new)) % APART == APART - 1
    fresh = _encoded(made, new, owners, apart, count, learning)
    whole = budget(settings.training, 1, 1)
    minutes = None if whole.minutes is None else SHARE * whole.minutes
    planned = replace(whole, steps=max(MIN_STEPS, round(SHARE * whole.steps)), minutes=minutes)
    generator = torch.Generator().manual_seed(settings.seed + first)
    joined = [before.joined(after) for before, after in zip(past, fresh, strict=True)]
    for number, scale in enumerate(made.all_scales()):
        told = prefixed(learning.progress, f"scale {number + 1}: ")
        _remember(scale, fresh[number], settings.seed)
        part = _part(scale, joined[number], len(past[number].normal), told)
        _train_denoiser([part], planned.until(number, settings.scales), generator, started, told)
        own = joined[number]
        fitted = spread(torch.arange(len(own.normal)), FITTED)
        usual, normal = (each.float().to(made.device) for each in (own.usual, own.normal[fitted]))
        _measure_by(made, number, (usual, own.usual_owner, own.usual_varied), (normal, own.owner[fitted]))
        told("usual residuals", 1, 1)
    made.keep([each.thinned() for each in joined])
    return made.requires_grad_(False).eval()


def _encoded(
    model: FeatureDiffusion, images: Sequence[Pixels], owners: Tensor, apart: Tensor, count: int, learning: Learning
) -> list[Past]:
    """Latents at every scale of images, of their copies as the model has learnt them, and of ``count`` synthetic anomalies."""
    trained = [pixels for pixels, out in zip(images, apart.tolist(), strict=True) if not out]
    measured = [pixels for pixels, out in zip(images, apart.tolist(), strict=True) if out]
    settings = learning.settings
    config = replace(model.config, settings=settings)
    shown, of, _ = with_variants(trained, config)
    usual_shown, usual_of, usual_sort = with_variants(measured, replace(config, turned=None))
    draws = [Draw((settings.seed, int(owners[0]), index)) for index in range(count)]
    synthetic, places = with_defects(
        shown, range(len(shown)), draws, settings.training.synthesis, learning.textures, learning.place, learning.progress
    )
    own, usual_own, found = owners[~apart][of], owners[apart][usual_of], []
    for number, scale in enumerate(model.all_scales()):
        normal, usual, anomalous = (_latents(scale, each) for each in (shown, usual_shown, synthetic))
        found.append(Past(normal, own, usual, usual_own, usual_sort == VARIANT, anomalous, places))
        learning.progress("features", number + 1, settings.scales)
    return found


@torch.no_grad()
def _latents(scale: Scale, images: Sequence[Pixels]) -> Tensor:
    """``[N, D, h, w]`` float16 on the CPU."""
    if not images:
        return torch.empty(0, scale.dimensions, *scale.grid, dtype=torch.float16)
    return torch.cat([scale.space(one[None].float().to(scale.device)).half().cpu() for one in features_of(scale, images)])


def _of_old(model: FeatureDiffusion, images: Sequence[Pixels], learning: Learning) -> list[Past]:
    """What a training would have kept of its images, made anew."""
    apart = torch.from_numpy(apart_of(len(images), learning.settings.training.apart))
    measured = spread(measured_of(apart, torch.full(apart.shape, IMAGE)), KEPT)
    trained = spread(torch.nonzero(~apart).flatten(), KEPT)
    chosen = torch.cat([trained, measured])  # where none is apart, they are the same
    out = torch.arange(len(chosen)) >= len(trained)
    count = KEPT if model.all_scales()[0].learns_repairs else 0
    found = _encoded(model, [images[place] for place in chosen.tolist()], chosen, out, count, learning)
    if not learning.settings.tolerate:  # then nearly all vectors of an image may be those of its variants
        for scale, past in zip(model.all_scales(), found, strict=True):
            _check_owners(scale, past)
    return found


def _check_owners(scale: Scale, past: Past) -> None:
    """Refuse images in another order than that of the training: the memory's numbers would mean others."""
    for latent, owner in zip(past.usual, past.usual_owner, strict=True):
        rows = scale.memory.rows[scale.memory.owner == int(owner)].float().cpu()
        cells = latent.float().flatten(1).T
        if len(rows) and float(torch.cdist(rows, cells).amin(1).median()) ** 2 > SAME * scale.dimensions:
            raise DataError("the images that the model was trained on have other names or another order now; give them as they were")


def _remember(scale: Scale, new: Past, seed: int) -> None:
    """Let the memory cover the new latents too."""
    if not scale.config.settings.memory:
        return
    latents = torch.cat([new.normal, new.usual])
    owner = torch.cat([new.owner, new.usual_owner]).repeat_interleave(latents[0, 0].numel())
    rows = torch.cat([scale.memory.rows.cpu(), latents.permute(0, 2, 3, 1).flatten(0, 2)])
    owner = torch.cat([scale.memory.owner.cpu(), owner.int()])
    chosen = covering(rows, scale.capacity, torch.Generator().manual_seed(seed))
    scale.memory.remember(rows[chosen].to(scale.device), owner[chosen].to(scale.device))


def _part(scale: Scale, past: Past, old: int, progress: Progress) -> Part:
    """What the denoiser of a scale goes on with; the first ``old`` normal latents are replayed, and half of those drawn are new."""
    shown = anomalous_shown = torch.empty(0)
    if scale.config.settings.memory:
        shown = _shown(scale, past.normal, past.owner, progress)
        anomalous_shown = _shown(scale, past.anomalous, past.owner[past.source], progress)
    new = torch.arange(old, len(past.normal))
    trained = torch.cat([torch.arange(old), new.repeat(max(1, old // max(1, len(new))))])
    none = torch.empty(0, dtype=torch.int64)
    return Part(scale, [], past.owner, none, past.normal, shown, trained, none, past.anomalous, anomalous_shown, past.source)
