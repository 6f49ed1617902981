"""What a frozen feature extractor is, and how one is found by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from gladad.core.errors import ModelFormatError
from gladad.core.settings import validated

PACKAGED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
"""Whose weights come in Python packages; the first one's with this one."""
DEFAULT_EXTRACTOR = PACKAGED[0]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNTRAINED = "hidden_states_norms"
"""Norms of the maps, which no checkpoint holds: they start as plain standardisation of each place, and stay so."""


@validated
class Identity:
    """Which weights features come from. Two extractors are the same if their weights are."""

    name: str  # what they are loaded by: a name of ours, a Hub id, or a folder
    revision: str | None = None  # commit of the Hub, or version of the package
    sha256: str = ""  # SHA-256 of the weight files; empty = not known

    def check(self, expected: Identity, model: Path) -> None:
        """Refuse to serve a model, in the folder ``model``, that was fitted with other weights than these.

        Raises:
            ModelFormatError: Both are known, and they differ.
        """
        if expected.sha256 and self.sha256 and expected.sha256 != self.sha256:
            theirs, ours = (f"{one.name} (SHA-256 {one.sha256[:12]}...)" for one in (expected, self))
            raise ModelFormatError(f"{model} was fitted with the features of {theirs}, and {ours} is found; provide those, or fit again")


@dataclass(frozen=True)
class Level:
    """One of the maps that an extractor gives."""

    channels: int
    stride: int  # pixels of the image per cell


class Extractor(nn.Module):
    """A frozen network that turns images into feature maps. It is always in inference mode, and normalises images itself."""

    identity: Identity  # of its weights
    levels: tuple[Level, ...]  # of the maps, finest first

    @property
    def size_multiple(self) -> int:
        """Image sides are multiples of this, so that every stride divides them."""
        return max(level.stride for level in self.levels)

    def forward(self, image: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` RGB in [0, 1] -> one ``[B, channels, H / stride, W / stride]`` for each of `levels`."""
        raise NotImplementedError

    def fast(self) -> Self:
        """What inspects, on the same device: itself, or a copy that takes much less time and rounds more."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Nothing: a frozen network has one mode."""
        return super().train(False)


def load_extractor(name: str = DEFAULT_EXTRACTOR, revision: str | None = None, offline: bool = False) -> Extractor:
    """A feature extractor with its trained weights, in float32 on the CPU.

    Args:
        name: ``efficientnet-lite0``, which comes with the package; ``efficientnet-lite1`` or ``-lite2``, whose weights are packages to be
            installed; or folder or Hub id of a backbone of transformers: DINOv2, DINOv3, ConvNeXt V2, ResNet, Swin and others, see
            `gladad.features.backbones`.
        revision: Branch, tag or commit of the Hub.
        offline: Never ask the Hub; use its local cache.

    Raises:
        ModelFormatError: There are no such weights within reach, or they are not those of an extractor.
        MissingExtraError: The package of the weights is not installed.
    """
    found: Extractor
    if name in PACKAGED:
        from gladad.features.efficientnet import pretrained

        found = pretrained(name)
    else:
        from gladad.features.backbones import load_backbone  # brings transformers, which takes seconds

        found = load_backbone(name, revision, offline)
    return found.eval().requires_grad_(False)


def missing_weights(loading_info: Mapping[str, Any]) -> str:
    """What a checkpoint lacks, by the loading info of transformers, which alone would draw it at random and go on; empty if nothing."""
    keys = map(str, [*loading_info["missing_keys"], *loading_info["mismatched_keys"]])
    missing = sorted(key for key in keys if not key.startswith(UNTRAINED))
    return f"{len(missing)} weights are missing or misshapen, such as {missing[0]}" if missing else ""


def files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 (hexadecimal) of the contents of files, one after the other. A file is not read again while it stays the same."""
    return _sha256(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=32)
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    found = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: found)
    return found.hexdigest()
