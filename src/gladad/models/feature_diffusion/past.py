"""What a ``lite`` model keeps of its training, so that it can go on later: latents of some normal images and of synthetic anomalies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gladad.core.errors import ModelFormatError
from gladad.core.tensors import load_tensors, save_tensors
from gladad.data.samples import evenly

if TYPE_CHECKING:
    from gladad.models.feature_diffusion.material import Part

COPY, IMAGE, VARIANT = 0, 1, 2
"""Sorts of what is learnt from."""
PAST_FILE = "latents.safetensors"
KEPT = 64
"""Latents that a training keeps of each sort and scale: at 256x256 pixels 0.2 MB each."""
MOST = 128
"""Normal ones, and those by which is measured what is usual, that are kept of each scale however often the training goes on."""


@dataclass(frozen=True)
class Past:
    """Latents of one scale, ``[., D, h, w]`` float16 on the CPU.

    Attributes:
        normal: Of images that the denoiser is shown, their copies included.
        owner: The photograph that each is of, as the memory numbers them.
        usual: Of images that no denoiser is shown: by them is measured what is usual.
        usual_owner: Likewise.
        usual_varied: Which of them are tolerated variants of others.
        anomalous: Of synthetic anomalies.
        source: Number in ``normal`` of what each was made of.
    """

    normal: Tensor
    owner: Tensor
    usual: Tensor
    usual_owner: Tensor
    usual_varied: Tensor
    anomalous: Tensor
    source: Tensor

    @classmethod
    def of(cls, part: Part) -> Past:
        """A choice of what a training has learnt from, evenly spread."""
        normal, usual = spread(part.trained, KEPT), spread(part.measured, KEPT)
        chosen, place = _made_of(normal, part.source if len(part.anomalous) else part.source[:0])
        anomalous = part.anomalous[chosen] if len(chosen) else part.latents[:0]
        return cls(
            part.latents[normal], part.owner[normal], part.latents[usual], part.owner[usual], part.sort[usual] == VARIANT, anomalous, place
        )

    def joined(self, new: Past) -> Past:
        """Both, this one first."""
        moved = {"source": new.source + len(self.normal)}
        return Past(**{f.name: torch.cat([getattr(self, f.name), moved.get(f.name, getattr(new, f.name))]) for f in fields(Past)})

    def thinned(self) -> Past:
        """What is kept: at most `MOST` of either sort of normal ones, drawn at random, old and new alike, and `KEPT` anomalous ones."""
        normal, usual = _drawn(self.normal), _drawn(self.usual)
        chosen, place = _made_of(normal, self.source)
        kept = self.usual[usual], self.usual_owner[usual], self.usual_varied[usual]
        return Past(self.normal[normal], self.owner[normal], *kept, self.anomalous[chosen], place)


@dataclass(frozen=True)
class Stored:
    """Latents in the folder of a loaded model, which most have no use for, so that they are read when they are wanted."""

    path: Path
    identity: tuple[int, int, int]

    @classmethod
    def at(cls, path: Path) -> Stored:
        """Those that lie there now."""
        return cls(path, _identity(path))

    def read(self, scales: int) -> list[Past]:
        """All of them.

        Raises:
            ModelFormatError: They are not those any more that lay there when the model was loaded, or damaged.
        """
        try:
            unchanged = _identity(self.path) == self.identity
        except OSError:
            unchanged = False
        if not unchanged:
            raise ModelFormatError(f"{self.path}: was replaced or removed since the model was loaded; load the model again")
        return load_past(self.path, scales)


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _drawn(latents: Tensor) -> Tensor:
    """Numbers of at most `MOST` of ``[N, ...]`` latents, rising.

    They are those whose bytes have the smallest hashes. However often more join and it is drawn again, that is an even choice among all
    that there ever were, so that the oldest do not vanish.
    """
    hashes = [hashlib.sha256(latent.numpy().tobytes()).digest() for latent in latents]
    return torch.tensor(sorted(sorted(range(len(hashes)), key=hashes.__getitem__)[:MOST]), dtype=torch.int64)


def _made_of(normal: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """At most `KEPT` anomalous latents that were made of these normal ones, and the places of the latter."""
    chosen = spread(torch.nonzero(torch.isin(source, normal)).flatten(), KEPT)
    return chosen, torch.searchsorted(normal, source[chosen])


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
        for number in range(scales):  # an earlier version kept no variants
            found.setdefault(f"{number}.usual_varied", torch.zeros(len(found[f"{number}.usual"]), dtype=torch.bool))
        return [Past(**{f.name: found[f"{number}.{f.name}"] for f in fields(Past)}) for number in range(scales)]
    except KeyError as error:
        raise ModelFormatError(f"{path}: has no {error}; it is of another model") from error
