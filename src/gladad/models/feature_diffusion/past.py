"""What a ``lite`` model keeps of its training, so that it can go on later: latents of some normal images and of synthetic anomalies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gladad.core.errors import ModelFormatError
from gladad.core.tensors import load_tensors, save_tensors
from gladad.data.samples import evenly

if TYPE_CHECKING:
    from gladad.models.feature_diffusion.material import Part

PAST_FILE = "latents.safetensors"
KEPT = 64
"""Latents that are kept of each sort and scale: at 256x256 pixels 0.2 MB each."""


@dataclass(frozen=True)
class Past:
    """Latents of one scale, ``[., D, h, w]`` float16 on the CPU.

    Attributes:
        normal: Of images that the denoiser is shown, their copies included.
        owner: The photograph that each is of, as the memory numbers them.
        usual: Of images that no denoiser is shown: by them is measured what is usual.
        usual_owner: Likewise.
        anomalous: Of synthetic anomalies.
        source: Number in ``normal`` of what each was made of.
    """

    normal: Tensor
    owner: Tensor
    usual: Tensor
    usual_owner: Tensor
    anomalous: Tensor
    source: Tensor

    @classmethod
    def of(cls, part: Part) -> Past:
        """A choice of what a training has learnt from, evenly spread."""
        normal, usual = spread(part.trained, KEPT), spread(part.measured, KEPT)
        known = torch.nonzero(torch.isin(part.source, normal)).flatten() if len(part.anomalous) else part.source[:0]
        chosen = spread(known, KEPT)
        place = torch.searchsorted(normal, part.source[chosen])
        anomalous = part.anomalous[chosen] if len(chosen) else part.latents[:0]
        return cls(part.latents[normal], part.owner[normal], part.latents[usual], part.owner[usual], anomalous, place)

    def joined(self, new: Past) -> Past:
        """Both, this one first."""
        moved = {"source": new.source + len(self.normal)}
        return Past(**{f.name: torch.cat([getattr(self, f.name), moved.get(f.name, getattr(new, f.name))]) for f in fields(Past)})

    def thinned(self) -> Past:
        """Without the synthetic anomalies that are too many; normal latents all stay."""
        chosen = torch.from_numpy(evenly(len(self.source), KEPT))
        return replace(self, anomalous=self.anomalous[chosen], source=self.source[chosen])


def spread(numbers: Tensor, most: int) -> Tensor:
    """At most ``most`` of ``[N]`` numbers, evenly spread, in their order."""
    return numbers[torch.from_numpy(evenly(len(numbers), most))]


def save_past(path: Path, past: Sequence[Past]) -> None:
    """Write one of each scale."""
    save_tensors(path, {f"{number}.{f.name}": getattr(own, f.name) for number, own in enumerate(past) for f in fields(Past)})


def load_past(path: Path, scales: int) -> list[Past]:
    """Read what `save_past` wrote.

    Raises:
        ModelFormatError: The file is damaged, or of another model.
    """
    found = load_tensors(path)
    try:
        return [Past(**{f.name: found[f"{number}.{f.name}"] for f in fields(Past)}) for number in range(scales)]
    except KeyError as error:
        raise ModelFormatError(f"{path}: has no {error}; it is of another model") from error
