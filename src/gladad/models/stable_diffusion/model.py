"""Bases in the paper's form: a diffusers folder or Hub id with autoencoder, UNet and scheduler, and a DINO extractor.

This is the shell around `GladPipeline` that gives it the same face as the ``lite`` base: fit, inspect, picture, save, load.
A model whose denoiser carries an adapter is saved as that adapter and a reference to its base; all models of one base share its networks.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gladad.algorithm import Reconstruction, ReconstructionConfig, ScoringConfig, image_noise, image_score, reconstruct, soft_foreground
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels, to_pixels, to_tensor
from gladad.core.records import Inspection, Progress, no_progress
from gladad.core.settings import from_json, to_json, validated
from gladad.core.storage import read_json, write_json
from gladad.data.synthesis import Foreground, foreground_mask
from gladad.models.stable_diffusion.adapters import Adapter, Layers, attach_adapter, detach_adapter, merge_adapter, switched_on
from gladad.models.stable_diffusion.components import Components as Networks
from gladad.models.stable_diffusion.components import Located, Origin, load_networks, locate_base, shared_networks
from gladad.models.stable_diffusion.device import choose_device
from gladad.models.stable_diffusion.pipeline import GladPipeline, read_embeds
from gladad.models.stable_diffusion.training import FinetuneConfig, finetune_denoiser
from gladad.models.stable_diffusion.training import TrainedProduct as Product
from gladad.training.loop import DTYPES, Precision, TrainingRun, divided

Pixels = NDArray[np.uint8]
UNREACHABLE = 1e9
"""A delta that no gap reaches: the chain then runs its whole search."""
STEP_SEARCH_IMAGES = 32
ORIGIN_FILE = "origin.json"
BASE_VARIABLE = "GLADAD_BASE"
"""Environment variable: where the base of models with an adapter is now, if it is not where it was."""


@validated
class PaperConfig:
    """How a diffusers base inspects. Guidance is off and delta calibrated by default; the paper's constants are options."""

    image_size: tuple[int, int] = (512, 512)  # (H, W) pixels; multiples of the autoencoder's stride
    feature_size: tuple[int, int] = (512, 512)  # (H, W) at which input and reconstruction are compared
    guidance_scale: float = 1.0  # classifier-free guidance; 1 = off, the paper uses 9
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    foreground: Foreground = "all"  # where the map counts
    seed: int = 0  # of the noise added at inspection, the same for every image
    precision: Precision = "float32"  # of the networks
    adapter_rank: int = 0  # of the denoiser's adapter; 0 = it has none
    adapter_layers: Layers = "attention"  # that it adapts


class PaperBase:
    """A diffusers base behind the interface that `gladad.detector.glad` uses.

    Args:
        config: How to inspect.
        pipeline: The networks, in the dtype of the config's precision; its denoiser may be shared with other bases.
        adapter: What was trained, if it is an adapter.
        adapter_name: Its name in the pipeline's denoiser.
        networks: Kept alive as long as this base is, if they are shared.
    """

    kind = "diffusers"
    workers = 1  # its networks fill the cores by themselves

    def __init__(
        self,
        config: PaperConfig,
        pipeline: GladPipeline,
        adapter: Adapter | None = None,
        adapter_name: str | None = None,
        networks: Networks | None = None,
    ):
        self.config, self.pipeline = config, pipeline
        self.adapter, self.adapter_name, self.networks = adapter, adapter_name, networks
        pipeline.guidance_scale = config.guidance_scale

    @torch.no_grad()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Inspect one ``[H, W, 3]`` uint8 image of any size; see `gladad.core.records.Inspection`."""
        with switched_on(self.pipeline.unet, self.adapter_name):
            return self._inspect(pixels)

    def _inspect(self, pixels: Pixels) -> Inspection:
        config, pipeline = self.config, self.pipeline
        image = to_tensor(resize_pixels(pixels, config.image_size))[None].to(pipeline.device)
        rebuilt = self.rebuild(image, config.reconstruction)
        picture = pipeline.decode(rebuilt.latent)
        weight = None
        mask = foreground_mask(resize_pixels(pixels, config.feature_size), config.foreground)
        if mask is not None:
            weight = soft_foreground(torch.from_numpy(mask)[None, None], config.scoring).to(rebuilt.latent)
        maps = pipeline.score_maps(image, picture, config.scoring, config.feature_size, weight)
        score = float(image_score(maps, config.scoring))
        return Inspection(map=maps[0, 0].float().cpu().numpy(), score=score, step=int(rebuilt.step), latent=picture.float().cpu())

    @torch.no_grad()
    def rebuild(self, image: Tensor, reconstruction: ReconstructionConfig) -> Reconstruction:
        """The anomaly-free counterpart of images ``[B, 3, H, W]`` in [0, 1]; every image gets the same noise."""
        with switched_on(self.pipeline.unet, self.adapter_name):
            latent = self.pipeline.encode(image)
            noise = image_noise(latent.shape[1:], self.config.seed).to(latent).expand_as(latent)
            return reconstruct(self.pipeline, latent, noise, self.pipeline.schedule, reconstruction)

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels:
        """The reconstruction at the size of ``pixels``; ``threshold`` is not needed here."""
        return resize_pixels(to_pixels(inspection.latent[0]), (pixels.shape[0], pixels.shape[1]))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write everything that is this model's own into a folder; returns the JSON-ready config.

        With an adapter that is the adapter, and where its base is from; otherwise the whole pipeline.
        """
        origin = self.pipeline.origin
        if self.adapter is None:
            self.pipeline.save_pretrained(folder)
        else:
            self.adapter.save(folder)
            self.pipeline.save_own(folder)
        if origin is not None:
            write_json(folder / ORIGIN_FILE, to_json(origin))
        return to_json(self.config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> PaperBase:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Folder and description do not fit together, or the base of an adapter is not there.
        """
        try:
            parsed = from_json(PaperConfig, config)
            origin = from_json(Origin, read_json(folder / ORIGIN_FILE)) if (folder / ORIGIN_FILE).is_file() else None
        except ConfigError as error:
            raise ModelFormatError(f"{folder}: its description is damaged ({error})") from error
        device, dtype = choose_device(), DTYPES[parsed.precision]
        if not parsed.adapter_rank:
            base = cls(parsed, GladPipeline.from_pretrained(folder, torch_dtype=dtype).to(device))
        elif origin is None:
            raise ModelFormatError(f"{folder / ORIGIN_FILE}: missing; the model folder is incomplete")
        else:
            adapter = Adapter.load(folder, parsed.adapter_rank, parsed.adapter_layers)
            networks = shared_networks(*find_base(origin), dtype, device)
            pipeline = GladPipeline.of(networks, read_embeds(folder))
            pipeline.load_own(folder)
            name = attach_adapter(networks.unet, adapter)
            base = cls(parsed, pipeline, adapter, name, networks)
            weakref.finalize(base, detach_adapter, networks.unet, name).atexit = False
        base.pipeline.origin = origin
        return base

    def standalone(self) -> PaperBase:
        """This model with its adapter added to weights of its own, so that it needs its base no more.

        Raises:
            ConfigError: There is no adapter.
            ModelFormatError: The base is not there any more.
        """
        origin = self.pipeline.origin
        if self.adapter is None or origin is None:
            raise ConfigError("this model has no adapter to merge: its denoiser is its own already")
        networks = load_networks(*find_base(origin))  # in float32: rounded once, after the sum
        merge_adapter(networks.unet, attach_adapter(networks.unet, self.adapter))
        for network in (networks.vae, networks.unet, networks.features):
            network.to(choose_device(), DTYPES[self.config.precision])
        base = PaperBase(replace(self.config, adapter_rank=0), GladPipeline.of(networks, self.pipeline.prompt_embeds))
        base.pipeline.origin = origin
        base.pipeline.tune_scoring(self.pipeline.tuned_weights())
        return base


def find_base(origin: Origin) -> tuple[Located, Located, Located | None]:
    """The base that a model's adapter belongs to, on this machine.

    Raises:
        ModelFormatError: It is not there, or is another one.
    """
    moved = os.environ.get(BASE_VARIABLE)
    features: str | None = origin.features.source
    if moved and Path(origin.features.source).is_absolute() and not Path(origin.features.source).is_dir():
        features = None  # it was a part of the base, and has moved with it
    try:
        found = locate_base(
            moved or origin.base.source,
            features,
            None if origin.vae is None else origin.vae.source,
            revision=None if moved else origin.base.revision,
            features_revision=origin.features.revision,
            vae_revision=None if origin.vae is None else origin.vae.revision,
        )
    except ModelFormatError as error:
        raise ModelFormatError(f"the model's base cannot be found ({error}); set {BASE_VARIABLE} to where it is now") from error
    for now, then in zip(found, (origin.base, origin.features, origin.vae), strict=True):
        if now is not None and then is not None and now.part.fingerprint != then.fingerprint:
            raise ModelFormatError(f"{now.folder}: is not the one that the model was made with ({then.source}); its files differ")
    return found


def fit_paper(
    pipelines: Mapping[str, GladPipeline],
    images: Mapping[str, Sequence[Pixels]],
    configs: Mapping[str, PaperConfig],
    training: FinetuneConfig,
    steps: int,
    *,
    seed: int = 0,
    textures: Sequence[Pixels] = (),
    foregrounds: Mapping[str, Foreground],
    calibrate_step: bool = True,
    run: TrainingRun | None = None,
    progress: Progress = no_progress,
) -> dict[str, PaperBase]:
    """Fine-tune a diffusers base on normal images of one or more products, and set the delta of each one's step search.

    Delta is the largest gap that the search, let run to its end, meets on training images on its way down to ``min_step`` (its 90 %
    quantile over images): a normal image is then usually given the least noise.

    Args:
        pipelines: Product -> pipeline, all over the same networks, which are trained in place; the denoiser in float32 if it is to be
            trained as a whole.
        images: Product -> ``[H, W, 3]`` uint8, already at the ``image_size`` of the config.
        configs: Product -> inspection settings.
        training: How to train.
        steps: Optimiser steps; 0 adopts the denoiser as it is.
        seed: Of the training.
        textures: Images of the same size that synthetic anomalies take content from.
        foregrounds: Product -> where synthetic anomalies may appear.
        calibrate_step: Set delta; False keeps that of the config, for reproducing published results.
        run: Checkpoints, logs and examples.
        progress: Told of every step.
    """
    first = next(iter(pipelines.values()))
    for pipeline in pipelines.values():
        pipeline.to(choose_device())
    adapter, name = None, None
    if steps:
        products = {key: Product(own, pipelines[key].prompt_embeds[:1], foregrounds[key]) for key, own in images.items()}
        origin = None if first.origin is None else to_json(first.origin)
        known = {"origin": _without_places(origin), "prompts": {key: pipeline.prompt for key, pipeline in pipelines.items()}}
        trained = finetune_denoiser(
            first, products, training, steps, seed=seed, textures=textures, run=run, identity=known, progress=progress
        )
        adapter, name = trained.adapter, trained.adapter_name
    first.unet.to(DTYPES[training.precision])
    bases = {}
    for key, pipeline in pipelines.items():
        config = replace(
            configs[key], precision=training.precision, adapter_rank=training.rank if adapter else 0, adapter_layers=training.layers
        )
        base = PaperBase(config, pipeline, adapter, name)
        if config.reconstruction.adaptive and calibrate_step:
            told = _counted(progress, f"{key}: step search" if key else "step search")
            delta = usual_gap(base, images[key], told)
            base.config = replace(config, reconstruction=replace(config.reconstruction, step_threshold=delta))
        bases[key] = base
    return bases


def _counted(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def usual_gap(base: PaperBase, images: Sequence[Pixels], progress: Callable[[int, int], None]) -> float:
    """The 90 % quantile of the largest gap that the step search meets on normal images, see `fit_paper`."""
    search = replace(base.config.reconstruction, step_threshold=UNREACHABLE)

    def peak(number: int) -> float:
        trace = base.rebuild(to_tensor(images[number])[None].to(base.pipeline.device), search).trace.nan_to_num(0)
        return float(trace[0, :-1].max()) if trace.shape[1] > 1 else float(trace.max())

    return float(np.quantile(divided(peak, min(len(images), STEP_SEARCH_IMAGES), progress), 0.9))


def _without_places(origin: dict[str, Any] | None) -> dict[str, Any]:
    """What of an origin decides a result: the files, not where they lie."""
    return {part: entry["fingerprint"] for part, entry in (origin or {}).items() if entry is not None}
