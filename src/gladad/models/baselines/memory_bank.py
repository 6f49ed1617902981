"""Baseline: a memory bank of feature vectors, after PatchCore (Roth et al., CVPR 2022), on the features of the ``lite`` base by default.

A random sample of the standardised feature vectors of the good images is the memory. The anomaly map is the distance of every vector of an
image to its nearest one in memory, upsampled and blurred; the score is the mean of the largest pixels. Images, sizes, features, blur and
score are those of ``lite``, so that a difference between the two is the diffusion's. PatchCore's coreset is replaced by the random sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gladad.algorithm import gaussian_blur, top_k_mean
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels, to_tensor
from gladad.core.records import Inspection, Progress, no_progress
from gladad.core.settings import from_json, to_json, validated
from gladad.core.storage import content_digest, load_tensors, save_tensors
from gladad.core.threads import one_thread
from gladad.features.extractor import DEFAULT_EXTRACTOR, Identity, load_extractor
from gladad.features.stack import FeatureStack
from gladad.models.settings import FitSettings

Pixels = NDArray[np.uint8]
WEIGHTS_FILE = "memory_bank.safetensors"


@validated
class MemoryBankSettings(FitSettings):
    """Settings of the memory bank; those that ``lite`` has too have the same values there."""

    features: str = DEFAULT_EXTRACTOR  # the extractor's name, see `gladad.features.extractor.load_extractor`
    memory: Annotated[int, Field(ge=1)] = 20_000  # feature vectors kept at most
    blur_sigma: Annotated[float, Field(gt=0)] = 4.0  # Gaussian blur of the map, pixels
    top_k: Annotated[int, Field(ge=1)] = 250  # pixels averaged into the image score


@validated
class MemoryBankConfig:
    """What a fitted memory bank is."""

    settings: MemoryBankSettings = field(default_factory=MemoryBankSettings)
    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels that every image is resized to; multiples of 32 (of 28 for patches of 14)
    extractor: Identity | None = None  # whose features are remembered; set by fitting


class FeatureExtractor:
    """Stacked features of one image or many, in the precision in which the ``lite`` base inspects.

    Args:
        image_size: ``(H, W)`` in pixels that images are resized to.
        features: The extractor's name.
    """

    def __init__(self, image_size: tuple[int, int], features: str = DEFAULT_EXTRACTOR):
        self.image_size = image_size
        self.stack = FeatureStack(load_extractor(features).fast(), image_size)
        self.identity = self.stack.extractor.identity
        self.channels = self.stack.channels

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> ``[B, C, h, w]`` float32."""
        return self.stack(images)

    def prepare(self, pixels: Pixels) -> Tensor:
        """``uint8 [H, W, 3]`` of any size -> ``[1, 3, H, W]`` in [0, 1] at the working size."""
        return to_tensor(resize_pixels(pixels, self.image_size))[None]


class MemoryBank:
    """A fitted memory bank behind the interface that `gladad.detector.glad` uses.

    Args:
        config: Shape and scoring.
        extract: Its features.
        memory: ``[M, C]`` standardised feature vectors of good images.
        mean: ``[C]`` of the features on good images.
        std: ``[C]`` of them.
    """

    kind = "memory-bank"

    def __init__(self, config: MemoryBankConfig, extract: FeatureExtractor, memory: Tensor, mean: Tensor, std: Tensor):
        self.config, self.extract, self.memory, self.mean, self.std = config, extract, memory, mean, std
        self._squares = memory.square().sum(1)

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core, because each runs on one thread."""
        return max(1, torch.get_num_threads())

    @torch.inference_mode()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one ``[H, W, 3]`` uint8 image of any size, in units of standardised feature distance."""
        settings = self.config.settings
        with one_thread():
            features = self.extract(self.extract.prepare(pixels))[0]
            rows = (features.flatten(1).T - self.mean) / self.std
            # A thousand rows at a time: the distances of a large image would not fit.
            nearest = torch.cat([(self._squares - 2 * part @ self.memory.T).amin(dim=1) for part in rows.split(1024)])
            squared = nearest + rows.square().sum(1)
            cells = squared.clamp_min(0).sqrt().view(1, 1, *features.shape[1:])
            upsampled = F.interpolate(cells, self.image_size, mode="bilinear", align_corners=False)
            maps = gaussian_blur(upsampled, settings.blur_sigma, 2 * math.ceil(4 * settings.blur_sigma) + 1)
            score = float(top_k_mean(maps, settings.top_k))
        return Inspection(map=maps[0, 0].numpy(), score=score, step=0, latent=None)

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> None:
        """A memory bank rebuilds nothing."""

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config."""
        return {"config": to_json(self.config)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and what was learned."""
        return content_digest(to_json(self.config), {"memory": self.memory, "mean": self.mean, "std": self.std})

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the memory into a folder; returns the JSON-ready config."""
        save_tensors(folder / WEIGHTS_FILE, {"memory": self.memory, "mean": self.mean, "std": self.std})
        return to_json(self.config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> MemoryBank:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Folder and description do not fit together, or the features are not those it was fitted with.
        """
        tensors = load_tensors(folder / WEIGHTS_FILE)
        try:
            parsed = from_json(MemoryBankConfig, config)
            extract = FeatureExtractor(parsed.image_size, parsed.settings.features)
            if parsed.extractor is not None:
                extract.identity.check(parsed.extractor, folder)
            return cls(parsed, extract, tensors["memory"], tensors["mean"], tensors["std"])
        except (KeyError, ConfigError) as error:
            raise ModelFormatError(f"{folder}: its memory and its description do not fit together ({error})") from error


@torch.inference_mode()
def fit_memory_bank(images: Sequence[Pixels], config: MemoryBankConfig, *, progress: Progress = no_progress) -> MemoryBank:
    """Remember good images; the same images and seed give the same memory.

    Args:
        images: ``[H, W, 3]`` uint8 normal images.
        config: Shape and scoring.
        progress: Told of every image.
    """
    extract = FeatureExtractor(config.image_size, config.settings.features)
    parts = []
    for pixels in images:
        parts.append(extract(extract.prepare(pixels))[0].flatten(1).T.half())
        progress("features", len(parts), len(images))
    rows = torch.cat(parts)
    total, squares = torch.zeros(extract.channels, dtype=torch.float64), torch.zeros(extract.channels, dtype=torch.float64)
    for part in parts:
        total += part.double().sum(0)
        squares += part.double().square().sum(0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp_min(0).sqrt() + 1e-5
    kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.settings.seed))[: config.settings.memory]
    memory = ((rows[kept].double() - mean) / std).float()
    return MemoryBank(replace(config, extractor=extract.identity), extract, memory, mean.float(), std.float())
