"""The networks behind the algorithm: a Stable-Diffusion-like latent denoiser and a patch feature extractor, as a diffusers pipeline.

`GladPipeline` provides the four callables of `gladad.algorithm.Networks` and keeps everything an inspection needs in one folder. The
text encoder is used once, when a base is adopted; its two embeddings are stored with the model and it is not needed again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from gladad.algorithm import Schedule, ScoringConfig, anomaly_map, velocity_to_noise
from gladad.errors import ConfigError, ModelFormatError
from gladad.features import DinoFeatures, imagenet_normalise

DEFAULT_FEATURES = "facebook/dino-vitb8"
DEFAULT_PROMPT = "a photo of sks"
CONDITIONING = Path("conditioning") / "prompt_embeds.safetensors"
BASE_COMPONENTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


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
        features: DinoFeatures,
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
        for network in (self.vae, self.unet, self.features):
            network.eval().requires_grad_(False)

    # -------------------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str],
        features: str | os.PathLike[str] | None = None,
        *,
        prompt: str = DEFAULT_PROMPT,
        revision: str | None = None,
        local_files_only: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Adopt a text-to-image base as an untrained GLAD model.

        Args:
            base: Stable Diffusion folder or Hub id with ``vae``, ``unet``, ``text_encoder``, ``tokenizer`` and ``scheduler``; or a folder
                that holds such a base as ``sd`` and a feature extractor as ``dino``.
            features: ViT folder or Hub id. Default: ``base/dino`` where that exists, else DINO ViT-B/8.
            prompt: What the denoiser is conditioned on; the paper's stand-in word by default.
            revision: Hub revision of ``base``.
            local_files_only: Never ask the Hub; use its local cache.
            torch_dtype: Dtype of the networks; None means float32.

        Raises:
            ModelFormatError: ``base`` or ``features`` cannot be found, or lacks a component.
        """
        root = Path(base)
        if (root / "sd").is_dir() and not (root / "unet").is_dir():
            features = features or (root / "dino" if (root / "dino").is_dir() else None)
            root = root / "sd"
        folder = _resolve(root if root.is_dir() else str(base), BASE_COMPONENTS, revision, local_files_only)
        features_folder = _resolve(features or DEFAULT_FEATURES, (), None, local_files_only)
        dtype = torch_dtype or torch.float32
        return cls(
            vae=_load_component(AutoencoderKL, folder / "vae", use_safetensors=True, dtype=dtype),
            unet=_load_component(UNet2DConditionModel, folder / "unet", use_safetensors=True, dtype=dtype),
            scheduler=_load_component(DDIMScheduler, folder / "scheduler"),
            features=_load_component(DinoFeatures, features_folder, dtype=dtype),
            prompt_embeds=embed_prompts(folder, (prompt, "")),
            prompt=prompt,
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved model, from a folder or the Hub; takes diffusers' keyword arguments. Only safetensors are read.

        Raises:
            ModelFormatError: The folder is missing or is not a GLAD model.
        """
        resolved = _resolve(folder, ("",), kwargs.pop("revision", None), kwargs.pop("local_files_only", False))
        if not (resolved / CONDITIONING).is_file():
            raise ModelFormatError(f"{folder} is not a saved GLAD model: it has no {CONDITIONING}; a plain base is read by from_base")
        try:
            embeds = load_file(resolved / CONDITIONING)
            kwargs["dtype"] = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or torch.float32
            kwargs |= {"use_safetensors": True, "prompt_embeds": torch.cat([embeds["prompt"], embeds["empty"]])}
            return super().from_pretrained(str(resolved), **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelFormatError(f"{folder} is not a complete GLAD model: {_first_line(error)}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write every component and the prompt embeddings, as safetensors; takes diffusers' keyword arguments.

        Raises:
            ConfigError: Pickled weights were asked for.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ConfigError("models are saved as safetensors only; leave safe_serialization on")
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONDITIONING
        path.parent.mkdir(parents=True, exist_ok=True)
        prompt, empty = self.prompt_embeds.detach().cpu().chunk(2)
        save_file({"prompt": prompt.contiguous(), "empty": empty.contiguous()}, path)

    # ----------------------------------------------------------------------------------------- the algorithm's contract

    @property
    def schedule(self) -> Schedule:
        """The denoiser's noise schedule, on the pipeline's device."""
        return Schedule(self.scheduler.alphas_cumprod.to(self.device, torch.float32))

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, image: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents of images.

        Args:
            image: ``[B, 3, H, W]`` in [0, 1]; sides are multiples of `latent_factor`.
            generators: One CPU generator per image: sample the posterior. None takes its mean.

        Returns:
            ``[B, C, H / f, W / f]`` float32, scaled to about unit variance.

        Raises:
            ConfigError: A side is not a multiple of `latent_factor`.
        """
        height, width = image.shape[-2:]
        if height % self.latent_factor or width % self.latent_factor:
            raise ConfigError(
                f"the autoencoder needs image sides that are multiples of {self.latent_factor}, got {height}x{width} (height x width)"
            )
        posterior = self.vae.encode((image * 2 - 1).to(self.vae.dtype)).latent_dist
        latent: Tensor = posterior.mean.float()
        if generators is not None:
            draws = [torch.randn(latent.shape[1:], generator=generator) for generator in generators]
            latent = latent + posterior.std.float() * torch.stack(draws).to(latent.device)
        return latent * float(self.vae.config.scaling_factor)

    def decode(self, latent: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` float32 of latents ``[B, C, h, w]``. Nominally in [0, 1], but not clipped: nor does the paper's code."""
        unscaled = latent / float(self.vae.config.scaling_factor)
        image: Tensor = self.vae.decode(unscaled.to(self.vae.dtype)).sample
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

    def denoise(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """One call of the denoiser under text embeddings ``[B or 1, L, D]``, as a noise prediction. Gradients flow."""
        context = prompt_embeds.to(latent.device, self.unet.dtype).expand(len(latent), -1, -1)
        output: Tensor = self.unet(latent.to(self.unet.dtype), timestep, encoder_hidden_states=context).sample.float()
        if self.scheduler.config.prediction_type == "v_prediction":
            return velocity_to_noise(latent, output, self.schedule.alpha_bar(timestep))
        return output

    def latent_features(self, latent: Tensor) -> Tensor:
        """What the step search compares: the extractor's last block, ``[B, D, h', w']``, on the decoded latent at full resolution.

        Without ImageNet normalisation, as published.
        """
        last: Tensor = self.features(self.decode(latent), layers=self.features.default_layers[-1:], imagenet=False)[0]
        return last

    # -------------------------------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def score_maps(
        self,
        image: Tensor,
        reconstruction: Tensor,
        scoring: ScoringConfig,
        feature_size: tuple[int, int],
        foreground: Tensor | None = None,
    ) -> Tensor:
        """Where images and their reconstructions differ (section 3.5).

        Args:
            image: ``[B, 3, H, W]`` in [0, 1].
            reconstruction: The same shape, not necessarily clipped.
            scoring: How features become a map.
            feature_size: ``(height, width)`` both are resized to before feature extraction; also the size of the map.
            foreground: ``[B, 1, H', W']`` in [0, 1]: how much each place counts (`gladad.algorithm.soft_foreground` of a mask).

        Returns:
            Anomaly maps ``[B, 1, *feature_size]``.
        """
        pair = [_resize(x.float(), feature_size) for x in (image, reconstruction)]
        difference = (imagenet_normalise(pair[0]) - imagenet_normalise(pair[1])).abs().mean(dim=1, keepdim=True)
        ours, theirs = (self.features(x) for x in pair)
        return anomaly_map(ours, theirs, feature_size, scoring, pixel_difference=difference, foreground=foreground)


def embed_prompts(folder: Path, prompts: Sequence[str]) -> Tensor:
    """Text embeddings ``[len(prompts), L, D]`` from the CLIP text encoder of a Stable Diffusion folder."""
    tokenizer = _load_component(CLIPTokenizer, folder / "tokenizer")
    encoder = _load_component(CLIPTextModel, folder / "text_encoder", use_safetensors=True, dtype=torch.float32)
    length = encoder.config.max_position_embeddings
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeds: Tensor = encoder.eval()(tokens.input_ids).last_hidden_state
    return embeds


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if image.shape[-2:] == size else F.interpolate(image, size, mode="bilinear", align_corners=True)


def _load_component(kind: Any, folder: Path, **kwargs: Any) -> Any:
    """One component, or one sentence on what is wrong with its folder."""
    if not folder.is_dir():
        raise ModelFormatError(f"{folder.parent} has no folder {folder.name!r}; a base holds {', '.join(BASE_COMPONENTS)}")
    try:
        return kind.from_pretrained(folder, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelFormatError(f"{folder} cannot be read as {kind.__name__} (safetensors only): {_first_line(error)}") from error


def _resolve(source: str | os.PathLike[str], parts: Sequence[str], revision: str | None, local_files_only: bool) -> Path:
    """The local folder of a model: itself, or the Hub's snapshot of the parts named (all when there are none)."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    complaint = f"{source} is neither a folder nor a reachable Hugging Face repository; check the name, or download it and give its folder"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ModelFormatError(complaint)
    kinds = ("*.json", "*.txt", "*.safetensors")
    patterns = [f"{part}/{kind}" if part else kind for part in (parts or ("",)) for kind in kinds]
    try:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*.non_ema.*"],
            )
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ModelFormatError(complaint) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
