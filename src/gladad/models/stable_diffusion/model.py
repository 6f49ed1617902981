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

import torch
from torch import Tensor

from gladad.algorithm import Reconstruction, ReconstructionConfig, image_noise, image_score, reconstruct, soft_foreground
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels
from gladad.core.records import Inspection
from gladad.core.settings import from_json, to_json
from gladad.core.storage import read_json, write_json
from gladad.core.tensors import tensors_digest, to_pixels, to_tensor
from gladad.data.foreground import foreground_mask
from gladad.models.family import Pixels
from gladad.models.stable_diffusion.adapters import Adapter, attach_adapter, detach_adapter, merge_adapter, switched_on
from gladad.models.stable_diffusion.components import Base, Components, Origin, Sources, load_networks, locate_base, shared_networks
from gladad.models.stable_diffusion.device import choose_device, inference_dtype
from gladad.models.stable_diffusion.pipeline import GladPipeline, read_embeds
from gladad.models.stable_diffusion.presets import load_preset
from gladad.models.stable_diffusion.settings import StableDiffusionConfig, StableDiffusionSettings
from gladad.training.loop import DTYPES

ORIGIN_FILE = "origin.json"
BASE_VARIABLE = "GLADAD_BASE"  # environment variable: where the base of models with an adapter is now, if it has moved


class StableDiffusion:
    """A Stable Diffusion behind the interface of `gladad.models.family.Model`.

    Args:
        config: How to inspect.
        pipeline: The networks, in the dtype of the config's precision; its denoiser may be shared with other models.
        adapter: What was trained, if it is an adapter.
        adapter_name: Its name in the pipeline's denoiser.
        networks: Kept alive as long as this model is, if they are shared.
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
        self.config, self.pipeline, self.image_size = config, pipeline, config.image_size
        self.adapter, self.adapter_name, self.networks = adapter, adapter_name, networks
        pipeline.guidance_scale = config.settings.guidance

    @property
    def speed(self) -> str:
        """Of its inspections."""
        return self.config.settings.speed

    @torch.no_grad()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Inspect one ``[H, W, 3]`` uint8 image of any size; see `gladad.core.records.Inspection`."""
        config, settings, pipeline = self.config, self.config.settings, self.pipeline
        image = to_tensor(resize_pixels(pixels, config.image_size))[None].to(pipeline.device)
        rebuilt = self.rebuild(image, config.chain)
        picture = pipeline.decode(rebuilt.latent)
        mask = foreground_mask(resize_pixels(pixels, config.feature_size), settings.scoring_foreground)
        weight = None
        if mask is not None:
            weight = soft_foreground(torch.from_numpy(mask)[None, None], settings.scoring).to(rebuilt.latent)
        own = () if settings.reference == "input" else (pipeline.decode(pipeline.encode(image)),)
        references = own if settings.reference == "decoded" else (image, *own)
        found = [pipeline.score_maps(each, picture, settings.scoring, config.feature_size, weight) for each in references]
        maps = torch.stack(found).sum(dim=0)
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
        """Write the adapter and where its base is from, or without an adapter the whole pipeline; returns the JSON-ready config."""
        if self.adapter is None:
            self.pipeline.save_pretrained(folder)
        else:
            self.adapter.save(folder)
            self.pipeline.save_own(folder)
        if self.pipeline.origin is not None:
            write_json(folder / ORIGIN_FILE, to_json(self.pipeline.origin))
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
        if origin is None and self.config.settings.autoencoder is not None:  # no file's fingerprint tells it
            own |= {f"vae.{name}": value for name, value in self.pipeline.vae.state_dict().items()}
        return tensors_digest([to_json(self.config), {} if origin is None else origin.fingerprints()], own)

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
        device = choose_device()
        dtype = inference_dtype(training.precision, device)
        if not parsed.adapted:
            model = cls(parsed, GladPipeline.from_pretrained(folder, torch_dtype=dtype).to(device))
        elif origin is None:
            raise ModelFormatError(f"{folder / ORIGIN_FILE}: missing; the model folder is incomplete")
        else:
            adapter = Adapter.load(folder, training.rank, training.layers)
            networks = shared_networks(find_base(origin), dtype, device)
            pipeline = GladPipeline.of(networks, read_embeds(folder))
            pipeline.load_own(folder)
            name = attach_adapter(networks.unet, adapter)
            model = cls(parsed, pipeline, adapter, name, networks)
            weakref.finalize(adapter, detach_adapter, networks.unet, name).atexit = False  # adjusted models share it
        model.pipeline.origin = origin
        return model

    def adjusted(self, settings: StableDiffusionSettings) -> StableDiffusion:
        """A model over the same networks that inspects as other settings say."""
        old = self.pipeline
        pipeline = GladPipeline.of(Components(old.vae, old.unet, old.scheduler, old.features), old.prompt_embeds, old.prompt)
        pipeline.origin = old.origin
        pipeline.tune_scoring(old.tuned_weights())
        return StableDiffusion(replace(self.config, settings=settings), pipeline, self.adapter, self.adapter_name, self.networks)

    def at_speed(self, speed: Any) -> StableDiffusion:
        """A model over the same networks that inspects at another speed, with the delta that was calibrated for it.

        Raises:
            ConfigError: There is no such speed, or no delta for it.
        """
        other = self.adjusted(replace(self.config.settings, speed=speed))
        other.config.chain  # noqa: B018 (refused now rather than at the first image)
        return other

    def standalone(self) -> StableDiffusion:
        """This model with its adapter added to weights of its own, so that it needs its base no more.

        Raises:
            ConfigError: There is no adapter.
            ModelFormatError: The base is not there any more.
        """
        origin = self.pipeline.origin
        if self.adapter is None or origin is None:
            raise ConfigError("this model has no adapter to merge: its denoiser is its own already")
        networks = load_networks(find_base(origin))  # in float32: rounded once, after the sum
        merge_adapter(networks.unet, attach_adapter(networks.unet, self.adapter))
        for network in (networks.vae, networks.unet, networks.features):
            network.to(choose_device(), DTYPES[self.config.settings.training.precision])
        pipeline = GladPipeline.of(networks, self.pipeline.prompt_embeds)
        pipeline.origin = origin
        pipeline.tune_scoring(self.pipeline.tuned_weights())
        return StableDiffusion(replace(self.config, adapted=False), pipeline)


def find_base(origin: Origin) -> Base:
    """The base that a model's adapter belongs to, on this machine.

    Raises:
        ModelFormatError: It is not there, or is another one.
    """
    base, features, vae, moved = origin.base, origin.features, origin.vae, os.environ.get(BASE_VARIABLE)
    part_of_base = moved and Path(features.source).is_absolute() and not Path(features.source).is_dir()  # and has moved with it
    sources = Sources(
        moved or base.source,
        None if part_of_base else features.source,
        None if vae is None else vae.source,
        revision=None if moved else base.revision,
        features_revision=features.revision,
        vae_revision=None if vae is None else vae.revision,
    )
    try:
        found = locate_base(sources)
    except ModelFormatError as error:
        raise ModelFormatError(f"the model's base cannot be found ({error}); set {BASE_VARIABLE} to where it is now") from error
    now = found.origin
    for folder, part, then in ((found.folder, now.base, base), (found.features, now.features, features), (found.vae, now.vae, vae)):
        if part is not None and then is not None and part.fingerprint != then.fingerprint:
            raise ModelFormatError(f"{folder}: is not the one that the model was made with ({then.source}); its files differ")
    return found
