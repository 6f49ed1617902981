"""A model in the paper's form: a diffusers folder or Hub id with autoencoder, UNet and scheduler, and a DINO extractor.

This is the shell around `GladPipeline` that gives it the face of every model: inspect, picture, save, load.
A model whose denoiser carries an adapter is saved as that adapter and a reference to its base; all models of one base share its networks.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gladad.algorithm import Reconstruction, ReconstructionConfig, image_noise, image_score, reconstruct, soft_foreground
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels, to_pixels, to_tensor
from gladad.core.records import Inspection
from gladad.core.settings import from_json, to_json
from gladad.core.storage import content_digest, read_json, write_json
from gladad.data.foreground import foreground_mask
from gladad.models.stable_diffusion.adapters import Adapter, attach_adapter, detach_adapter, merge_adapter, switched_on
from gladad.models.stable_diffusion.components import Components, Located, Origin, load_networks, locate_base, shared_networks
from gladad.models.stable_diffusion.device import choose_device
from gladad.models.stable_diffusion.pipeline import GladPipeline, read_embeds
from gladad.models.stable_diffusion.presets import load_preset
from gladad.models.stable_diffusion.settings import StableDiffusionConfig
from gladad.training.loop import DTYPES

Pixels = NDArray[np.uint8]
ORIGIN_FILE = "origin.json"
BASE_VARIABLE = "GLADAD_BASE"
"""Environment variable: where the base of models with an adapter is now, if it is not where it was."""


class StableDiffusion:
    """A Stable Diffusion behind the interface of `gladad.models.family.Model`.

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
        config: StableDiffusionConfig,
        pipeline: GladPipeline,
        adapter: Adapter | None = None,
        adapter_name: str | None = None,
        networks: Components | None = None,
    ):
        self.config, self.pipeline = config, pipeline
        self.adapter, self.adapter_name, self.networks = adapter, adapter_name, networks
        pipeline.guidance_scale = config.settings.guidance_scale

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    @torch.no_grad()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Inspect one ``[H, W, 3]`` uint8 image of any size; see `gladad.core.records.Inspection`."""
        with switched_on(self.pipeline.unet, self.adapter_name):
            return self._inspect(pixels)

    def _inspect(self, pixels: Pixels) -> Inspection:
        config, pipeline = self.config, self.pipeline
        image = to_tensor(resize_pixels(pixels, config.image_size))[None].to(pipeline.device)
        settings = config.settings
        rebuilt = self.rebuild(image, settings.reconstruction)
        picture = pipeline.decode(rebuilt.latent)
        weight = None
        mask = foreground_mask(resize_pixels(pixels, config.feature_size), settings.scoring_foreground)
        if mask is not None:
            weight = soft_foreground(torch.from_numpy(mask)[None, None], settings.scoring).to(rebuilt.latent)
        maps = pipeline.score_maps(image, picture, settings.scoring, config.feature_size, weight)
        score = float(image_score(maps, settings.scoring))
        return Inspection(map=maps[0, 0].float().cpu().numpy(), score=score, step=int(rebuilt.step), latent=picture.float().cpu())

    @torch.no_grad()
    def rebuild(self, image: Tensor, reconstruction: ReconstructionConfig) -> Reconstruction:
        """The anomaly-free counterpart of images ``[B, 3, H, W]`` in [0, 1]; every image gets the same noise."""
        with switched_on(self.pipeline.unet, self.adapter_name):
            latent = self.pipeline.encode(image)
            noise = image_noise(latent.shape[1:], self.config.settings.seed).to(latent).expand_as(latent)
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

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config, the published constants it started from, and where the networks are from."""
        settings, origin = self.config.settings, self.pipeline.origin
        found = {"config": to_json(self.config)}
        if settings.preset is not None:
            tuned = bool(self.pipeline.tuned_weights())
            found["preset"] = load_preset(settings.preset).describe(tuned_features=tuned, tuned_autoencoder=settings.vae is not None)
        return found if origin is None else found | {"origin": to_json(origin)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and what was learned, with the fingerprints of the base that an adapter belongs to."""
        origin = self.pipeline.origin
        learned = self.pipeline.unet.state_dict() if self.adapter is None else self.adapter.weights
        own = {**learned, **self.pipeline.tuned_weights(), "prompt_embeds": self.pipeline.prompt_embeds}
        return content_digest([to_json(self.config), {} if origin is None else origin_fingerprints(origin)], own)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> StableDiffusion:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Folder and description do not fit together, or the base of an adapter is not there.
        """
        try:
            parsed = from_json(StableDiffusionConfig, config)
            origin = from_json(Origin, read_json(folder / ORIGIN_FILE)) if (folder / ORIGIN_FILE).is_file() else None
        except ConfigError as error:
            raise ModelFormatError(f"{folder}: its description is damaged ({error})") from error
        training = parsed.settings.training
        device, dtype = choose_device(), DTYPES[training.precision]
        if not parsed.adapted:
            base = cls(parsed, GladPipeline.from_pretrained(folder, torch_dtype=dtype).to(device))
        elif origin is None:
            raise ModelFormatError(f"{folder / ORIGIN_FILE}: missing; the model folder is incomplete")
        else:
            adapter = Adapter.load(folder, training.rank, training.layers)
            networks = shared_networks(*find_base(origin), dtype, device)
            pipeline = GladPipeline.of(networks, read_embeds(folder))
            pipeline.load_own(folder)
            name = attach_adapter(networks.unet, adapter)
            base = cls(parsed, pipeline, adapter, name, networks)
            weakref.finalize(base, detach_adapter, networks.unet, name).atexit = False
        base.pipeline.origin = origin
        return base

    def standalone(self) -> StableDiffusion:
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
            network.to(choose_device(), DTYPES[self.config.settings.training.precision])
        base = StableDiffusion(replace(self.config, adapted=False), GladPipeline.of(networks, self.pipeline.prompt_embeds))
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


def origin_fingerprints(origin: Origin) -> dict[str, Any]:
    """What of an origin decides a result: the files, not where they lie."""
    return {part: entry["fingerprint"] for part, entry in to_json(origin).items() if entry is not None}
