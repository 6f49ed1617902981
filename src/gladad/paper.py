"""Bases in the paper's form: a diffusers folder or Hub id with autoencoder, UNet and scheduler, and a DINO extractor.

This is the shell around `gladad.pipeline.GladPipeline` that gives it the same face as the ``lite`` base: fit, inspect, picture, save, load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gladad.algorithm import ReconstructionConfig, ScoringConfig, image_noise, image_score, reconstruct, soft_foreground
from gladad.config import from_json, to_json
from gladad.errors import ConfigError, ModelFormatError
from gladad.finetune import FinetuneConfig, finetune_denoiser
from gladad.images import resize_pixels, to_pixels, to_tensor
from gladad.pipeline import GladPipeline
from gladad.synthesis import Foreground, SynthesisConfig, foreground_mask
from gladad.types import Inspection, Progress, no_progress

Pixels = NDArray[np.uint8]
UNREACHABLE = 1e9
"""A delta that no gap reaches: the chain then runs its whole search."""


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """How a diffusers base inspects. Guidance is off and delta calibrated by default; the paper's constants are options."""

    image_size: tuple[int, int] = (512, 512)  # (H, W) pixels; multiples of the autoencoder's and the extractor's strides
    feature_size: tuple[int, int] = (512, 512)  # (H, W) at which input and reconstruction are compared
    guidance_scale: float = 1.0  # classifier-free guidance; 1 = off, the paper uses 9
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    foreground: Foreground = "all"  # where the map counts
    seed: int = 0  # of the noise added at inspection, the same for every image


class PaperBase:
    """A diffusers base behind the interface that `gladad.detector` uses."""

    kind = "diffusers"
    workers = 1  # its networks fill the cores by themselves

    def __init__(self, config: PaperConfig, pipeline: GladPipeline):
        self.config = config
        self.pipeline = pipeline
        pipeline.guidance_scale = config.guidance_scale

    @torch.no_grad()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Inspect one ``[H, W, 3]`` uint8 image of any size; see `gladad.types.Inspection`."""
        config = self.config
        image = to_tensor(resize_pixels(pixels, config.image_size))[None].to(self.pipeline.device)
        latent = self.pipeline.encode(image)
        noise = image_noise(latent.shape[1:], config.seed).to(latent)
        rebuilt = reconstruct(self.pipeline, latent, noise, self.pipeline.schedule, config.reconstruction)
        picture = self.pipeline.decode(rebuilt.latent)
        weight = None
        mask = foreground_mask(resize_pixels(pixels, config.feature_size), config.foreground)
        if mask is not None:
            weight = soft_foreground(torch.from_numpy(mask)[None, None], config.scoring).to(latent)
        maps = self.pipeline.score_maps(image, picture, config.scoring, config.feature_size, weight)
        score = float(image_score(maps, config.scoring))
        return Inspection(map=maps[0, 0].float().cpu().numpy(), score=score, step=int(rebuilt.step), latent=picture.float().cpu())

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels:
        """The reconstruction at the size of ``pixels``; ``threshold`` is not needed here."""
        return resize_pixels(to_pixels(inspection.latent[0]), (pixels.shape[0], pixels.shape[1]))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the pipeline into a folder; returns the JSON-ready config."""
        self.pipeline.save_pretrained(folder)
        return to_json(self.config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> PaperBase:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Folder and description do not fit together.
        """
        try:
            return cls(from_json(PaperConfig, config), GladPipeline.from_pretrained(folder))
        except ConfigError as error:
            raise ModelFormatError(f"{folder}: its description is damaged ({error})") from error


def fit_paper(
    pipeline: GladPipeline,
    images: Sequence[Pixels],
    config: PaperConfig,
    training: FinetuneConfig,
    *,
    textures: Sequence[Pixels] = (),
    foreground: Foreground = "all",
    calibrate_step: bool = True,
    progress: Progress = no_progress,
) -> PaperBase:
    """Fine-tune a diffusers base on normal images and set the delta of its step search.

    Delta is the largest gap that the search, let run to its end, meets on training images on its way down to ``min_step`` (its 90 %
    quantile over images): a normal image is then usually given the least noise.

    Args:
        pipeline: The base; trained in place.
        images: ``[H, W, 3]`` uint8, already at ``config.image_size``.
        config: Inspection settings.
        training: Training budget.
        textures: Images of the same size that synthetic anomalies take content from.
        foreground: Where synthetic anomalies may appear.
        calibrate_step: Set delta; False keeps that of the config, for reproducing published results.
        progress: Told of every step.
    """
    finetune_denoiser(
        pipeline,
        images,
        training,
        SynthesisConfig(),
        textures,
        foreground,
        lambda done, total, loss: progress("denoiser", done, total),
    )
    if config.reconstruction.adaptive and calibrate_step:
        search = replace(config.reconstruction, step_threshold=UNREACHABLE)
        probe = PaperBase(config, pipeline)
        peaks = []
        chosen = images[:32]
        for done, pixels in enumerate(chosen, start=1):
            latent = probe.pipeline.encode(to_tensor(pixels)[None].to(pipeline.device))
            noise = image_noise(latent.shape[1:], config.seed).to(latent)
            trace = reconstruct(pipeline, latent, noise, pipeline.schedule, search).trace
            peaks.append(float(trace[0, :-1].nan_to_num(0).max()) if trace.shape[1] > 1 else float(trace.nan_to_num(0).max()))
            progress("step search", done, len(chosen))
        delta = float(np.quantile(peaks, 0.9))
        config = replace(config, reconstruction=replace(config.reconstruction, step_threshold=delta))
    return PaperBase(config, pipeline)
