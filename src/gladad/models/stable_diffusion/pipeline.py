"""The networks behind the algorithm: a Stable-Diffusion-like latent denoiser and a patch feature extractor, as a diffusers pipeline.

`GladPipeline` provides the four callables of `gladad.algorithm.Networks` and keeps everything an inspection needs in one folder. The
text encoder is used once, when a base is adopted; its two embeddings are stored with the model and it is not needed again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from gladad.algorithm import Schedule, ScoringConfig, anomaly_map, velocity_to_noise
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.storage import read_json
from gladad.core.tensors import load_tensors, save_tensors
from gladad.features.pyramid import PyramidFeatures
from gladad.features.vit import DinoFeatures, imagenet_normalise
from gladad.models.stable_diffusion import components
from gladad.models.stable_diffusion.components import Components, Origin, Source, Sources, first_line

DEFAULT_PROMPT = "a photo of sks"
CONDITIONING = Path("conditioning") / "prompt_embeds.safetensors"
TUNED_FILE = "tuned_features.safetensors"


class GladPipeline(DiffusionPipeline):
    """The components of a GLAD model, and the algorithm's view of them.

    Networks run in the pipeline's dtype; latents, noise predictions, images and features cross its border in float32.

    Args:
        vae: Autoencoder between images and latents.
        unet: Denoiser with text conditioning, for noise or velocity.
        scheduler: Holds the noise schedule; its own stepping is not used.
        features: Patch feature extractor.
        prompt_embeds: ``[2, L, D]`` text embeddings of the prompt and of the empty prompt.
        prompt: The prompt, for the record.
        guidance_scale: Weight of classifier-free guidance in `predict_noise`; 1 switches it off and halves the cost.
    """

    vae: Any
    unet: Any
    scheduler: Any
    features: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        features: DinoFeatures | PyramidFeatures,
        prompt_embeds: Tensor | None = None,
        prompt: str = DEFAULT_PROMPT,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if prompt_embeds is None:
            raise ModelFormatError("a GLAD model needs its prompt embeddings; load it with GladPipeline.from_pretrained or from_base")
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, features=features)  # type: ignore[no-untyped-call]
        if self.scheduler.config.prediction_type not in {"epsilon", "v_prediction"}:
            raise ModelFormatError(f"the denoiser must predict noise or velocity, not {self.scheduler.config.prediction_type!r}")
        self.register_to_config(prompt=prompt, guidance_scale=guidance_scale)  # type: ignore[no-untyped-call]
        self.prompt = prompt
        self.guidance_scale = guidance_scale  # later assignments reach the saved config too: diffusers sees to it
        self.prompt_embeds = prompt_embeds
        self.scoring_features: Any = features  # `tune_scoring` puts another one here
        self.origin: Origin | None = None  # where the networks are from, if that is known
        for network in (self.vae, self.unet, self.features):
            network.eval().requires_grad_(False)

    @classmethod
    def from_base(
        cls,
        base: Source,
        features: Source | None = None,
        *,
        vae: Source | None = None,
        prompt: str = DEFAULT_PROMPT,
        revision: str | None = None,
        local_files_only: bool = False,
        torch_dtype: torch.dtype | None = None,
        unet_dtype: torch.dtype | None = None,
    ) -> Self:
        """Adopt a text-to-image base as an untrained GLAD model.

        Args:
            base: Stable Diffusion 1.x or 2.x in diffusers form: ``sd14``, a Hub id or a folder with ``vae``, ``unet``, ``text_encoder``,
                ``tokenizer`` and ``scheduler``; or a folder that holds such a base as ``sd`` and a feature extractor as ``dino``.
            features: ViT or DINOv2 folder or Hub id. Default: ``base/dino`` where that exists, else DINO ViT-B/8.
            vae: Folder of an autoencoder that replaces the base's, such as a fine-tuned one.
            prompt: What the denoiser is conditioned on; the paper's stand-in word by default.
            revision: Hub revision of ``base``.
            local_files_only: Never ask the Hub; use its local cache.
            torch_dtype: Dtype of the networks; None means float32.
            unet_dtype: Dtype of the denoiser, if it differs.

        Raises:
            ModelFormatError: ``base``, ``features`` or ``vae`` cannot be found, or lacks a component.
        """
        sources = Sources(base, features, vae, revision, offline=local_files_only)
        return cls.for_prompts(sources, {"": prompt}, torch_dtype or torch.float32, unet_dtype)[""]

    @classmethod
    def for_prompts(
        cls, sources: Sources, prompts: Mapping[str, str], dtype: torch.dtype = torch.float32, unet_dtype: torch.dtype | None = None
    ) -> dict[str, Self]:
        """Adopt a base once for several products: pipelines over the same networks, each with the embeddings of its own prompt.

        Args:
            sources: Of the base; of a saved GLAD model the stored prompt is the only one there is.
            prompts: Name of the product -> prompt.
            dtype: Of the networks.
            unet_dtype: Of the denoiser, if it differs.

        Raises:
            ConfigError: The base is a saved model with another prompt.
            ModelFormatError: As for `from_base`.
        """
        base = components.locate_base(sources)
        networks = components.load_networks(base, dtype, unet_dtype)
        if saved := (base.folder / CONDITIONING).is_file():
            stored = str(read_json(base.folder / "model_index.json").get("prompt"))  # there is no text encoder for another
            if other := sorted(set(prompts.values()) - {stored, DEFAULT_PROMPT}):
                raise ConfigError(
                    f"{base.folder}: is a saved model for the prompt {stored!r} and cannot take {other[0]!r}; leave the prompt out"
                )
            prompts = dict.fromkeys(prompts, stored)
            embeds = dict.fromkeys(prompts, read_embeds(base.folder))
        else:
            *given, empty = components.embed_prompts(base.folder, (*prompts.values(), "")).split(1)
            embeds = {product: torch.cat([own, empty]) for product, own in zip(prompts, given, strict=True)}
        pipelines = {product: cls.of(networks, embeds[product], prompt) for product, prompt in prompts.items()}
        for pipeline in pipelines.values():
            if saved and sources.features is None:
                pipeline.load_own(base.folder)
            pipeline.origin = base.origin
        return pipelines

    @classmethod
    def of(cls, networks: Components, prompt_embeds: Tensor, prompt: str = DEFAULT_PROMPT) -> Self:
        """A pipeline over networks that others may use, too; it owns nothing but its prompt embeddings ``[2, L, D]``."""
        return cls(networks.vae, networks.unet, networks.scheduler, networks.features, prompt_embeds, prompt)

    @classmethod
    def from_pretrained(cls, folder: Source, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved model, from a folder or the Hub; takes diffusers' keyword arguments. Only safetensors are read.

        Raises:
            ModelFormatError: The folder is missing or is not a GLAD model.
        """
        resolved, _ = components.find_repository(folder, (), kwargs.pop("revision", None), kwargs.pop("local_files_only", False))
        if not (resolved / CONDITIONING).is_file():
            raise ModelFormatError(f"{folder} is not a saved GLAD model: it has no {CONDITIONING}; a plain base is read by from_base")
        try:
            kwargs["dtype"] = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or torch.float32
            kwargs |= {"use_safetensors": True, "prompt_embeds": read_embeds(resolved)}
            pipeline = super().from_pretrained(str(resolved), **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelFormatError(f"{folder} is not a complete GLAD model: {first_line(error)}") from error
        for network in (pipeline.vae, pipeline.unet, pipeline.features):
            components.move_to_boundaries(network)
        pipeline.load_own(resolved)
        return pipeline

    def save_pretrained(self, save_directory: Source, **kwargs: Any) -> None:  # type: ignore[override]
        """Write every component and the prompt embeddings, as safetensors; takes diffusers' keyword arguments.

        Raises:
            ConfigError: Pickled weights were asked for.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ConfigError("models are saved as safetensors only; leave safe_serialization on")
        super().save_pretrained(save_directory, **kwargs)
        self.save_own(Path(save_directory))

    def save_own(self, folder: Path) -> None:
        """Write what a pipeline owns even where others use its networks, too: prompt embeddings, and the tuned part of the extractor."""
        (folder / CONDITIONING).parent.mkdir(parents=True, exist_ok=True)
        prompt, empty = self.prompt_embeds.detach().cpu().chunk(2)
        save_tensors(folder / CONDITIONING, {"prompt": prompt, "empty": empty})
        if tuned := self.tuned_weights():
            save_tensors(folder / TUNED_FILE, tuned)

    def load_own(self, folder: Path) -> None:
        """Read what `save_own` wrote, but for the prompt embeddings, which the constructor takes."""
        if (folder / TUNED_FILE).is_file():
            self.tune_scoring(load_tensors(folder / TUNED_FILE))

    def tune_scoring(self, weights: Mapping[str, Tensor]) -> None:
        """Score with a copy of the extractor that has these weights (by name) of its own; the step search keeps the frozen one.

        Raises:
            ModelFormatError: The extractor has no such weight, or one of another shape.
        """
        frozen = self.features
        shared = {id(parameter): parameter for name, parameter in frozen.named_parameters() if name not in weights}
        tuned = copy.deepcopy(frozen, shared)  # what is not tuned is in memory once
        own = dict(tuned.named_parameters())
        for name, value in weights.items():
            if name not in own or own[name].shape != value.shape:
                raise ModelFormatError(f"{TUNED_FILE}: {name} is no weight of this extractor, or one of another shape")
            own[name].data = value.to(own[name], copy=True)  # at a boundary, see components.move_to_boundaries
        self.scoring_features = tuned.eval().requires_grad_(False) if weights else frozen

    def tuned_weights(self) -> dict[str, Tensor]:
        """The weights of the scoring extractor that are not the frozen one's; none if it was not tuned."""
        frozen = dict(self.features.named_parameters())
        return {name: own for name, own in self.scoring_features.named_parameters() if own is not frozen[name]}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the networks, as in diffusers, and the tuned part of the extractor with them."""
        super().to(*args, **kwargs)
        frozen = dict(self.features.named_parameters())
        for name, own in self.scoring_features.named_parameters():
            own.data = own.data.to(frozen[name])
        return self

    @property
    def schedule(self) -> Schedule:
        """The denoiser's noise schedule, on the pipeline's device."""
        return Schedule(self.scheduler.alphas_cumprod.to(self.device, torch.float32))

    def encode(self, image: Tensor) -> Tensor:
        """Latents ``[B, C, H / f, W / f]`` float32, of about unit variance, of images ``[B, 3, H, W]`` in [0, 1]: the posterior's mean.

        Raises:
            ConfigError: A side is not a multiple of the autoencoder's pixels per cell.
        """
        components.latent_size(self.vae, (image.shape[-2], image.shape[-1]))
        latent: Tensor = self.vae.encode((image * 2 - 1).to(_dtype(self.vae))).latent_dist.mean.float()
        return latent * float(self.vae.config.scaling_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 of latents ``[B, C, h, w]``. Nominally in [0, 1], but not clipped: nor does the paper's code."""
        unscaled = latent / float(self.vae.config.scaling_factor)
        image: Tensor = self.vae.decode(unscaled.to(_dtype(self.vae))).sample
        return image.float() / 2 + 0.5

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Noise prediction for noisy latents ``[B, C, h, w]`` at timesteps ``[B]``, with guidance where it is on.

        Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): ``eps_empty + g (eps_prompt - eps_empty)``.
        """
        prompt, empty = self.prompt_embeds.chunk(2)
        if self.guidance_scale == 1:
            return self.denoise(latent, timestep, prompt)
        both = torch.cat([empty.expand(len(latent), -1, -1), prompt.expand(len(latent), -1, -1)])
        without, given = self.denoise(latent.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
        return without + self.guidance_scale * (given - without)

    def denoise(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor, unet: nn.Module | None = None) -> Tensor:
        """One call of the denoiser, perhaps given wrapped, under text embeddings ``[B or 1, L, D]``, as a noise prediction."""
        dtype = self.unet.dtype  # read once: diffusers walks through the whole network for it
        context = prompt_embeds.to(latent.device, dtype).expand(len(latent), -1, -1)
        network: Any = self.unet if unet is None else unet
        output: Tensor = network(latent.to(dtype), timestep, encoder_hidden_states=context).sample.float()
        if self.scheduler.config.prediction_type == "v_prediction":
            return velocity_to_noise(latent, output, self.schedule.alpha_bar(timestep))
        return output

    def latent_features(self, latent: Tensor) -> Tensor:
        """What the step search compares: the extractor's last block, ``[B, D, h', w']``, on the decoded latent.

        At full resolution, or the nearest that the extractor takes: 518 px for 512 px and patches of 14. Without ImageNet
        normalisation, as published.
        """
        image, extractor = self.decode(latent), self.features
        image = _resize(image, extractor.nearest_size(image.shape[-2:]))
        return cast(Tensor, extractor(image, layers=extractor.default_layers[-1:], imagenet=False)[0])

    @torch.no_grad()
    def score_maps(
        self, image: Tensor, reconstruction: Tensor, scoring: ScoringConfig, feature_size: tuple[int, int], foreground: Tensor | None = None
    ) -> Tensor:
        """Anomaly maps ``[B, 1, *feature_size]``: where images and their reconstructions differ (section 3.5).

        Args:
            image: ``[B, 3, H, W]`` in [0, 1].
            reconstruction: The same shape, not necessarily clipped.
            scoring: How features become a map.
            feature_size: ``(height, width)`` of the map and of the pixel difference; features are extracted at the nearest size that
                the extractor takes.
            foreground: ``[B, 1, H', W']`` in [0, 1]: how much each place counts (`gladad.algorithm.soft_foreground` of a mask).
        """
        both, extractor = torch.cat([image, reconstruction]).float(), cast(Any, self.scoring_features)
        one, other = imagenet_normalise(_resize(both, feature_size)).chunk(2)
        difference = (one - other).abs().mean(dim=1, keepdim=True)
        layers = extractor(_resize(both, extractor.nearest_size(feature_size)))
        ours, theirs = zip(*(layer.chunk(2) for layer in layers), strict=True)
        return anomaly_map(ours, theirs, feature_size, scoring, pixel_difference=difference, foreground=foreground)


def read_embeds(folder: Path) -> Tensor:
    """Embeddings ``[2, L, D]`` of a saved model's prompt and of the empty one.

    Raises:
        ModelFormatError: The file is missing or damaged.
    """
    embeds = load_tensors(folder / CONDITIONING)
    if embeds.keys() != {"prompt", "empty"}:
        raise ModelFormatError(f"{folder / CONDITIONING}: holds {', '.join(sorted(embeds))} instead of prompt and empty")
    return torch.cat([embeds["prompt"], embeds["empty"]])


def _dtype(network: nn.Module) -> torch.dtype:
    """That of the first weight. The property of diffusers says the same after a walk through the whole network."""
    return next(network.parameters()).dtype


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if image.shape[-2:] == size else F.interpolate(image, size, mode="bilinear", align_corners=True)
