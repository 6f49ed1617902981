"""What the denoisers of ``lite`` learn from: good images and their copies, synthetic anomalies, and the latents of both at each scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gladad.core.records import Progress
from gladad.core.tensors import to_tensor
from gladad.data.foreground import Foreground
from gladad.data.samples import apart_of
from gladad.data.synthesis import Draw, SynthesisConfig, synthesise
from gladad.data.tolerance import variants
from gladad.features.memory import covering
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.past import COPY, IMAGE, VARIANT
from gladad.models.feature_diffusion.placement import pays, try_turned, with_turned
from gladad.models.feature_diffusion.scale import Scale
from gladad.models.feature_diffusion.settings import FeatureDiffusionConfig

Pixels = NDArray[np.uint8]
ENCODE_BATCH = 16


@dataclass(frozen=True)
class Material:
    """The images of a product.

    Attributes:
        images: ``[H, W, 3]`` uint8 normal images, then copies of them.
        owner: ``[N]`` the photograph that each is, or is a copy or a tile of.
        apart: ``[N]`` bool, those that the denoisers are not shown.
        sort: ``[N]`` int8, `IMAGE`, `COPY` of another or tolerated `VARIANT` of an image.
        synthetic: Images with synthetic anomalies.
        source: ``[P]`` the normal image of each.
    """

    images: list[Pixels]
    owner: Tensor
    apart: Tensor
    sort: Tensor
    synthetic: list[Pixels]
    source: Tensor


@dataclass(frozen=True)
class Part:
    """What the denoiser of a scale learns of one product.

    Attributes:
        scale: The product's own.
        images: ``[H, W, 3]`` uint8, as in `Material`; ``owner`` and ``sort`` likewise.
        latents: ``[N, D, h, w]`` float16 of the normal images.
        shown: What the memory shows for them.
        trained: Numbers of those that the denoiser is shown.
        measured: Numbers of those by which is measured what is usual.
        anomalous: ``[P, D, h, w]`` float16 latents of synthetic anomalies.
        anomalous_shown: What the memory shows for them.
        source: ``[P]`` the normal image of each.
    """

    scale: Scale
    images: list[Pixels]
    owner: Tensor
    sort: Tensor
    latents: Tensor
    shown: Tensor
    trained: Tensor
    measured: Tensor
    anomalous: Tensor
    anomalous_shown: Tensor
    source: Tensor


def make_material(
    model: FeatureDiffusion,
    images: Sequence[Pixels],
    photographs: Sequence[int] | None,
    copies: int,
    foreground: Foreground,
    count: int,
    textures: Sequence[Pixels],
    progress: Progress,
) -> Material:
    """Decide which copies are shown, set images apart, and put synthetic anomalies into ``count`` of the others."""
    settings = model.config.settings
    owner = torch.arange(len(images)) if photographs is None else torch.tensor(photographs)
    apart = torch.from_numpy(apart_of(int(owner.max()) + 1, settings.training.apart))[owner]
    if settings.training.copies == "auto" and settings.memory and apart.any():
        rest, others = ([p for p, out in zip(images, apart.tolist(), strict=True) if out is side] for side in (False, True))
        coarse = model.all_scales()[-1]  # how a part is turned is seen best there, and soonest
        progress("trying turned copies", 0, 1)
        ratio = try_turned(
            rest, others, lambda chosen: features_of(coarse, chosen).to(model.device), coarse.space, coarse.capacity, settings.seed
        )
        progress("trying turned copies", 1, 1)
        ratio = round(ratio, 4)  # what is stored is what was decided by
        model.config = replace(model.config, turned=ratio)
    shown, places, sort = with_variants(images, model.config, copies)
    owner, apart = owner[places], apart[places]
    usable = torch.nonzero(~apart).flatten().tolist()
    draws = [Draw((settings.seed, index)) for index in range(count)]
    synthetic, source = with_defects(shown, usable, draws, settings.training.synthesis, textures, foreground, progress)
    return Material(shown, owner, apart, sort, synthetic, source)


def with_variants(images: Sequence[Pixels], config: FeatureDiffusionConfig, copies: int = 0) -> tuple[list[Pixels], Tensor, Tensor]:
    """Images with the turned copies and tolerated variants that a model learns, too.

    Args:
        images: The last ``copies`` of them are copies of others.
        config: What the model learns.
        copies: See there.

    Returns:
        All of them; ``[N]`` the number of the image that each is of; ``[N]`` `Material.sort`.
    """
    turned = config.turned is not None and pays(config.turned)
    shown, of = with_turned(images) if turned else (list(images), list(range(len(images))))
    sort = [IMAGE if number < len(images) - copies else COPY for number in range(len(shown))]
    if config.settings.tolerate:
        for pixels, number in variants(images, config.settings.tolerate, config.settings.seed):
            shown.append(pixels)
            of.append(number)
            sort.append(VARIANT if sort[number] == IMAGE else COPY)
    return shown, torch.tensor(of, dtype=torch.int64), torch.tensor(sort, dtype=torch.int8)


def with_defects(
    images: Sequence[Pixels],
    usable: Sequence[int],
    draws: Sequence[Draw],
    synthesis: SynthesisConfig,
    textures: Sequence[Pixels],
    foreground: Foreground,
    progress: Progress,
) -> tuple[list[Pixels], Tensor]:
    """A synthetic anomaly by each draw in one of the usable images, and the number of that image."""
    synthetic, source = [], []
    for index, draw in enumerate(draws):
        source.append(usable[draw.integer(0, len(usable) - 1)])
        synthetic.append(synthesise(images[source[-1]], draw, synthesis, textures, foreground)[0])
        progress("synthetic anomalies", index + 1, len(draws))
    return synthetic, torch.tensor(source, dtype=torch.int64)


def measured_of(apart: Tensor, sort: Tensor) -> Tensor:
    """Numbers of the images by which is measured what is usual, see `Material`, no copies: those apart, or if there are none, all."""
    return torch.nonzero((sort != COPY) & (apart | ~apart.any())).flatten()


@torch.no_grad()
def features_of(scale: Scale, images: Sequence[Pixels]) -> Tensor:
    """Features ``[N, C, h, w]`` float16 of images, in bounded memory."""
    device, found = scale.device, []
    for start in range(0, len(images), ENCODE_BATCH):
        batch = torch.stack([to_tensor(pixels) for pixels in images[start : start + ENCODE_BATCH]]).to(device)
        found.append(scale.features(batch).half().cpu())
    return torch.cat(found) if found else torch.empty(0)


@torch.no_grad()
def fit_scale(model: FeatureDiffusion, number: int, material: Material, progress: Progress) -> Part:
    """Fit the feature space of a scale and its memory; the denoiser is left to `_train_denoiser`."""
    scale, settings = model.all_scales()[number], model.config.settings
    device = model.device
    found = []
    for start in range(0, len(material.images), ENCODE_BATCH):
        found.append(features_of(scale, material.images[start : start + ENCODE_BATCH]))
        progress("features", min(len(material.images), start + ENCODE_BATCH), len(material.images))
    scale.space.fit(batch.to(device) for batch in found)
    latents = torch.cat([scale.space(batch.float().to(device)).half().cpu() for batch in found])
    del found
    anomalous = []
    for start in range(0, len(material.synthetic), ENCODE_BATCH):
        batch = features_of(scale, material.synthetic[start : start + ENCODE_BATCH])
        anomalous.append(scale.space(batch.float().to(device)).half().cpu())
        progress("features of synthetic anomalies", min(len(material.synthetic), start + ENCODE_BATCH), len(material.synthetic))
    synthetic = torch.cat(anomalous) if anomalous else torch.empty(0)
    shown, synthetic_shown = torch.empty(0), torch.empty(0)
    if settings.memory:
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        owner = material.owner.repeat_interleave(len(rows) // len(latents))
        kept = covering(rows, scale.capacity, torch.Generator().manual_seed(settings.seed))
        scale.memory.remember(rows[kept].to(device), owner[kept].to(device))
        shown = _shown(scale, latents, material.owner, progress)
        synthetic_shown = _shown(scale, synthetic, material.owner[material.source], progress)
    trained, measured = torch.nonzero(~material.apart).flatten(), measured_of(material.apart, material.sort)
    return Part(
        scale, material.images, material.owner, material.sort, latents, shown, trained, measured,
        synthetic, synthetic_shown, material.source,
    )  # fmt: skip


def _shown(scale: Scale, latents: Tensor, owner: Tensor, progress: Progress) -> Tensor:
    """What the memory shows for latents ``[N, D, h, w]`` float16 of images ``[N]``, their own vectors left out."""
    device, found = scale.device, []
    for start in range(0, len(latents), ENCODE_BATCH):
        part = slice(start, start + ENCODE_BATCH)
        found.append(scale.memory(latents[part].to(device), owner[part].to(device)).cpu())
        progress("neighbours", min(len(latents), start + ENCODE_BATCH), len(latents))
    return torch.cat(found) if found else torch.empty(0)
