"""What people see of a training of ``lite`` while it runs. Nothing is drawn at random here, so that the model is the same unwatched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gladad.core.records import Watch
from gladad.core.tensors import to_pixels, to_tensor
from gladad.data.samples import evenly
from gladad.models.feature_diffusion.material import Material, Part
from gladad.models.feature_diffusion.model import FeatureDiffusion
from gladad.models.feature_diffusion.past import COPY

Pixels = NDArray[np.uint8]
DEFECTS = 3  # pictures with made-up defects that are shown


@dataclass(frozen=True)
class Losses:
    """Passes losses on to who looks on, if anybody does."""

    watch: Watch | None
    prefix: str = ""  # before the names of stages

    def add(self, stage: str, step: int, loss: Tensor) -> None:
        """Of a step, counted from 1."""
        if self.watch is not None:
            self.watch.loss(self.prefix + stage, step, float(loss.detach()))


UNSEEN = Losses(None)


@torch.no_grad()
def show_drawn(watch: Watch, step: int, model: FeatureDiffusion, part: Part) -> None:
    """Show a good part beside what the decoder draws of its latent so far."""
    place = int(part.trained[0])
    drawn = model.decoded(part.latents[place : place + 1].float().to(model.device))
    watch.show("picture decoder", step, {"good-part-and-drawing": _beside(part.images[place], drawn)})


@torch.no_grad()
def show_mended(watch: Watch, model: FeatureDiffusion, material: Material) -> None:
    """Show made-up defects, or good parts where there are none, beside what the first scale makes of them."""
    images = material.synthetic or [pixels for pixels, sort in zip(material.images, material.sort.tolist(), strict=True) if sort != COPY]
    scale, pictures = model.all_scales()[0], {}
    for number, place in enumerate(evenly(len(images), DEFECTS).tolist(), 1):
        latent = scale.encode(to_tensor(images[place])[None].to(model.device))
        pictures[f"input-and-reconstruction-{number}"] = _beside(images[place], model.decoded(scale.rebuild(latent).latent))
    watch.show("reconstruction", 1, pictures)


def _beside(pixels: Pixels, picture: Tensor) -> Pixels:
    return np.concatenate([pixels, to_pixels(picture[0].cpu())], axis=1)
