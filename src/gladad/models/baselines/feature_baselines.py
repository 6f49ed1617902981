"""Baselines on the features of the ``lite`` model, so that a difference between them and it is the diffusion's.

* ``memory-bank``: distance to the nearest of many feature vectors of good images, after PatchCore (Roth et al., CVPR 2022), with a random
  sample in place of its coreset.
* ``padim``: Mahalanobis distance to a Gaussian for each place (Defard et al., ICPR 2021).
* ``pca``: what the principal components of the features leave over.

Images, sizes, blur and score are those of ``lite`` at its finest scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gladad.algorithm import gaussian_blur, top_k_mean
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels
from gladad.core.records import Inspection, Progress, no_progress
from gladad.core.settings import from_json, to_json, validated
from gladad.core.tensors import load_tensors, save_tensors, tensors_digest, to_tensor
from gladad.core.threads import one_thread
from gladad.features.extractor import DEFAULT_EXTRACTOR, Identity, load_extractor
from gladad.features.memory import Index
from gladad.features.space import FeatureSpace
from gladad.features.stack import FeatureStack
from gladad.models.settings import FitSettings

Pixels = NDArray[np.uint8]
Method = Literal["memory-bank", "padim", "pca"]
METHODS: tuple[Method, ...] = ("memory-bank", "padim", "pca")
WEIGHTS_FILE = "baseline.safetensors"
RIDGE = 0.01  # of PaDiM: added to the variances of every place


@validated
class FeatureBaselineSettings(FitSettings):
    """Settings of the baselines; those that ``lite`` has too have the same values there."""

    features: str = DEFAULT_EXTRACTOR  # the extractor's name, see `gladad.features.extractor.load_extractor`
    size: Annotated[int, Field(ge=1)] | None = None  # None = 80 000 vectors of a bank, 100 channels of PaDiM, 80 components of PCA
    blur_sigma: Annotated[float, Field(gt=0)] = 0.5  # Gaussian blur of the map, in cells
    top_k: Annotated[int, Field(ge=1)] = 16  # cells averaged into the image score


DEFAULT_SIZE: dict[Method, int] = {"memory-bank": 80_000, "padim": 100, "pca": 80}


@validated
class FeatureBaselineConfig:
    """What a fitted baseline is."""

    method: Method = "memory-bank"
    settings: FeatureBaselineSettings = field(default_factory=FeatureBaselineSettings)
    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels that every image is resized to
    extractor: Identity | None = None  # whose features; set by fitting

    @property
    def size(self) -> int:
        """Of what is kept."""
        return self.settings.size or DEFAULT_SIZE[self.method]


class FeatureBaseline:
    """A fitted baseline behind the interface that `gladad.detector.glad` uses.

    Args:
        config: Method, shape and scoring.
        stack: Its features.
        learnt: ``mean`` and ``std`` ``[C]`` of the features, and by method ``rows [M, C]`` of standardised vectors; or ``place_mean
            [h w, c]``, ``whitener [h w, c, c]`` and ``channels [c]``; or ``basis [D, C]``.
    """

    def __init__(self, config: FeatureBaselineConfig, stack: FeatureStack, learnt: dict[str, Tensor]):
        self.config, self.stack, self.learnt, self.kind = config, stack, learnt, config.method
        self._index = Index(learnt["rows"]) if config.method == "memory-bank" else None

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core, because each runs on one thread."""
        return max(1, torch.get_num_threads())

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    def distances(self, rows: Tensor) -> Tensor:
        """Distance ``[h w]`` of each of the standardised vectors ``[h w, C]`` of an image."""
        learnt = self.learnt
        if self._index is not None:
            return self._index.nearest(rows)[0].sqrt()
        if self.kind == "padim":
            centred = rows[:, learnt["channels"]] - learnt["place_mean"]
            return torch.bmm(learnt["whitener"], centred[:, :, None]).square().sum((1, 2)).sqrt()
        return (rows - rows @ learnt["basis"].T @ learnt["basis"]).square().sum(1).sqrt()

    @torch.inference_mode()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one ``[H, W, 3]`` uint8 image of any size, in units of the method's distance."""
        settings = self.config.settings
        with one_thread():
            features = self.stack(to_tensor(resize_pixels(pixels, self.image_size))[None])[0]
            rows = (features.flatten(1).T - self.learnt["mean"]) / self.learnt["std"]
            cells = self.distances(rows).view(1, 1, *features.shape[1:])
            cells = gaussian_blur(cells, settings.blur_sigma, 2 * math.ceil(4 * settings.blur_sigma) + 1)
            score = float(top_k_mean(cells, min(settings.top_k, cells.numel())))
            maps = F.interpolate(cells, self.image_size, mode="bilinear", align_corners=False)
        return Inspection(map=maps[0, 0].numpy(), score=score, step=0, latent=None)

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> None:
        """A baseline rebuilds nothing."""

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config."""
        return {"config": to_json(self.config)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and what was learned."""
        return tensors_digest(to_json(self.config), self.learnt)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what was learned into a folder; returns the JSON-ready config."""
        save_tensors(folder / WEIGHTS_FILE, self.learnt)
        return to_json(self.config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> FeatureBaseline:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Folder and description do not fit together, or the features are not those it was fitted with.
        """
        learnt = load_tensors(folder / WEIGHTS_FILE)
        try:
            parsed = from_json(FeatureBaselineConfig, config)
            extractor = load_extractor(parsed.settings.features)
            if parsed.extractor is not None:
                extractor.identity.check(parsed.extractor, folder)
            return cls(parsed, FeatureStack(extractor.fast(), parsed.image_size), learnt)
        except (KeyError, ConfigError) as error:
            raise ModelFormatError(f"{folder}: its weights and its description do not fit together ({error})") from error


@torch.inference_mode()
def fit_feature_baseline(images: Sequence[Pixels], config: FeatureBaselineConfig, *, progress: Progress = no_progress) -> FeatureBaseline:
    """Learn good images ``[H, W, 3]`` uint8; the same images and seed give the same baseline.

    Raises:
        ConfigError: More channels or components are asked for than there are.
    """
    extractor = load_extractor(config.settings.features)
    stack = FeatureStack(extractor.fast(), config.image_size)
    if config.method != "memory-bank" and config.size >= stack.channels:
        raise ConfigError(f"size must be from 1 to {stack.channels - 1} for {config.method}, not {config.size}")
    features = []
    for pixels in images:
        features.append(stack(to_tensor(resize_pixels(pixels, config.image_size))[None]).half())
        progress("features", len(features), len(images))
    space = FeatureSpace(stack.channels, config.size if config.method == "pca" else 1, 0.0)
    space.fit(batch.float() for batch in features)
    mean, std = space.mean.flatten(), space.std.flatten()
    rows = torch.cat(features).permute(0, 2, 3, 1).flatten(1, 2)  # [N, h w, C] float16
    generator = torch.Generator().manual_seed(config.settings.seed)
    learnt = {"mean": mean, "std": std}
    if config.method == "memory-bank":
        every = rows.flatten(0, 1)
        kept = torch.randperm(len(every), generator=generator)[: config.size]
        learnt["rows"] = ((every[kept].float() - mean) / std).half()
    elif config.method == "padim":
        channels = torch.randperm(stack.channels, generator=generator)[: config.size].sort().values
        learnt |= _gaussians(((rows[..., channels].float() - mean[channels]) / std[channels]).transpose(0, 1)) | {"channels": channels}
    else:
        learnt["basis"] = space.basis.clone()
    return FeatureBaseline(replace(config, extractor=extractor.identity), stack, learnt)


def _gaussians(places: Tensor) -> dict[str, Tensor]:
    """Mean ``[P, c]`` and whitening matrix ``[P, c, c]`` of the vectors ``[P, N, c]`` of every place."""
    mean = places.mean(1, keepdim=True)
    ridge = RIDGE * torch.eye(places.shape[2])
    whiteners = []
    for own, centre in zip(places, mean, strict=True):
        covariance = (own - centre).T @ (own - centre) / max(1, len(own) - 1) + ridge
        whiteners.append(torch.linalg.inv(torch.linalg.cholesky(covariance)))
    return {"place_mean": mean[:, 0].contiguous(), "whitener": torch.stack(whiteners)}
