"""How much memory training and inspection with a diffusers base need, computed before anything is loaded.

No rule of thumb: the real networks take one real step on tensors without content (`faked`), while every storage that is alive is
counted. What no tensor shows is not in the numbers: the program itself, scratch space inside of an operation, buffers through which
processes exchange gradients, and what an allocator holds back. ``scripts/check_memory_plan.py`` compares with real trainings on a CPU:
they need up to 2 % more in float32, and in bfloat16 another 40 to 100 MiB, whatever the size of images, for kernels compiled on the way.
glibc in its ordinary settings holds back 60 to 110 MiB more.

The computation runs as on a CPU, since torch fakes a GPU's autograd only where it was built for one. For a GPU, what differs by design is
added: autocast keeps norms in float32 there, and AdamW treats all weights at once. Both have kernels for attention that never hold the
matrix of all pairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from gladad.algorithm import Schedule, ScoringConfig, add_noise, denoising_target, mix_anomaly, patch_distance, predict_x0
from gladad.core.errors import ConfigError
from gladad.core.storage import read_json
from gladad.models.stable_diffusion.adapters import Layers, add_adapter
from gladad.models.stable_diffusion.architectures import DINO_CONFIG
from gladad.models.stable_diffusion.components import latent_factor
from gladad.models.stable_diffusion.faked import (
    Config,
    LiveMemory,
    build_features,
    build_unet,
    build_vae,
    cast,
    faked,
    keep_norms_in_float32,
    parameter_bytes,
)
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.training.loop import DTYPES, Precision
from gladad.training.optimizers import OptimizerName

Training = Literal["lora", "full"]

TOKENS = 77  # of a prompt, in every Stable Diffusion 1.x and 2.x
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # bitsandbytes: smaller weights keep moments of 32 bits; the others have a scale per block


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A training whose memory is asked for.

    Full training has weights, gradients and moments in float32 and runs under autocast. LoRA has the denoiser frozen in ``precision``, and
    only the adapter's weights, gradients and moments in float32.
    """

    image_size: tuple[int, int] = (512, 512)  # (H, W) pixels
    training: Training = "lora"
    batch_size: int = 4  # images per forward and backward pass
    accumulation: int = 1  # such passes per step of the optimiser; from 2 on, gradients are there during all of them
    lora_rank: int = 16
    lora_layers: Layers = "attention"  # that are adapted
    gradient_checkpointing: bool = True
    precision: Precision = "bfloat16"
    optimizer: OptimizerName = "adamw"
    ema: bool = False  # an averaged copy of the trained weights

    def __post_init__(self) -> None:
        choices = {"training": Training, "lora_layers": Layers, "precision": Precision, "optimizer": OptimizerName}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")
        for name in ("batch_size", "accumulation", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the moment when most memory is in use.

    Attributes:
        parameters: Weights of all networks that stay loaded.
        gradients: Of all trained weights.
        optimizer: Its moments.
        activations: What the peak holds beyond the rest: results kept for the backward pass, copies of weights in the precision of the
            arithmetic, intermediate results. If the peak comes before all gradients are there, what is missing of them is taken off.
        ema: The averaged weights.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    ema: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.ema

    def rows(self) -> list[tuple[str, int]]:
        """What to print: names and bytes, without what is not there; the total is last."""
        rows = [("weights", self.parameters), ("gradients", self.gradients), ("optimizer", self.optimizer)]
        rows += [("averaged weights", self.ema), ("activations", self.activations)]
        return [(name, size) for name, size in rows if size] + [("total", self.total)]


@dataclass(frozen=True)
class BaseConfigs:
    """Configurations of the networks of a base, as their folders hold them."""

    unet: Config
    vae: Config
    features: Config


def read_configs(base: Path, features: Path | None = None, vae: Path | None = None) -> BaseConfigs:
    """Read what a base is made of; its weights need not be there.

    Args:
        base: Folder with ``unet`` and ``vae``, and perhaps the extractor as ``features`` or ``dino``; or one with such a folder as ``sd``.
        features: Folder of the extractor. Default: the one in ``base``, else the configuration of DINO ViT-B/8.
        vae: Folder of an autoencoder that replaces the base's.

    Raises:
        ModelFormatError: A configuration is missing or damaged.
    """
    root = base / "sd" if (base / "sd").is_dir() and not (base / "unet").is_dir() else base
    if features is None:
        features = next((folder for folder in (base / "features", base / "dino") if folder.is_dir()), None)
    if vae is None or (vae / "vae").is_dir():
        vae = (vae or root) / "vae"
    return BaseConfigs(
        unet=read_json(root / "unet" / "config.json"),
        vae=read_json(vae / "config.json"),
        features=DINO_CONFIG if features is None else read_json(features / "config.json"),
    )


# -------------------------------------------------------------------------------------------------------- training


def plan_training(
    unet_config: Config,
    request: PlanRequest,
    *,
    vae_config: Config | None = None,
    vit_config: Config | None = None,
    device_type: str = "cpu",
) -> MemoryPlan:
    """What training the denoiser needs at its peak, on each device; takes seconds.

    One step is run without content: forward and backward pass, clipping and optimiser, with the moments of the steps before. Between
    steps, images are encoded and example pictures decoded, one at a time; if that needs more, it is the peak.

    Args:
        unet_config: Of the denoiser.
        request: The training.
        vae_config: Of the autoencoder, which stays loaded; None counts none, and takes 8 pixels per latent cell.
        vit_config: Of the extractor, which stays loaded; None counts none.
        device_type: Whose arithmetic: "cuda", or anything else for that of a CPU.

    Raises:
        ConfigError: The image size does not suit the autoencoder.
        ModelFormatError: A configuration describes no network.
    """
    dtype = DTYPES[request.precision]
    unet = build_unet(unet_config)
    if request.training == "lora":
        cast(unet, dtype)
        add_adapter(unet, request.lora_rank, request.lora_layers)
    else:
        unet.requires_grad_(True)
    vae = None if vae_config is None else cast(build_vae(vae_config), dtype)
    extractor = None if vit_config is None else cast(build_features(vit_config), dtype)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    parameters = sum(parameter_bytes([*net.parameters(), *net.buffers()]) for net in (unet, vae, extractor) if net is not None)
    gradients = parameter_bytes(trained)
    optimizer = moments(trained, request.optimizer)
    peak = _step_peak(unet, request, _latent_size(vae, request.image_size), device_type)
    if vae is not None:
        peak = max(peak, optimizer + _picture_peak(vae, request.image_size))
    return MemoryPlan(parameters, gradients, optimizer, peak - gradients - optimizer, gradients if request.ema else 0)


def moments(trained: Sequence[Tensor], optimizer: OptimizerName) -> int:
    """Bytes that ``torch.optim.AdamW`` or bitsandbytes' ``AdamW8bit`` keep between steps for float32 weights."""
    sizes = [weight.numel() for weight in trained]
    if optimizer == "adamw":
        return sum(8 * size + 4 for size in sizes)  # the 4 count the steps
    return sum(8 * size if size < SMALLEST_8BIT else 2 * size + 8 * math.ceil(size / BLOCK_8BIT) for size in sizes)


def _latent_size(vae: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    factor = 8 if vae is None else latent_factor(vae)
    height, width = image_size
    if min(image_size) < factor or height % factor or width % factor:
        raise ConfigError(f"the autoencoder needs image sides that are multiples of {factor}, got {height}x{width} (height x width)")
    return height // factor, width // factor


def _step_peak(unet: Any, request: PlanRequest, latent_size: tuple[int, int], device_type: str) -> int:
    """Bytes beyond the weights at the peak of a step: gradients, moments and activations."""
    live = LiveMemory()
    with faked():
        unet.to_empty(device="cpu").train()
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        if device_type == "cuda" and request.precision != "float32":
            keep_norms_in_float32(unet)
        if request.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        weights = live.watch_weights(unet)
        # AdamW8bit has no intermediate results, and is not always installed
        optimizer = torch.optim.AdamW(trained, foreach=device_type == "cuda") if request.optimizer == "adamw" else None
        with live:
            if optimizer is not None:
                _fill_gradients(trained)
                optimizer.step()  # makes the moments
                optimizer.zero_grad(set_to_none=True)
            if request.accumulation > 1:
                _fill_gradients(trained)
            live.restart()
            with _autocast(request.precision):
                loss = _loss(unet, request.batch_size, latent_size)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            if optimizer is not None:
                optimizer.step()
    return live.peak - weights + (0 if optimizer is not None else moments(trained, request.optimizer))


def _fill_gradients(trained: Sequence[Tensor]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)


def _autocast(precision: Precision) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", DTYPES[precision])


def _loss(unet: Any, batch_size: int, latent_size: tuple[int, int]) -> Tensor:
    """The loss of `gladad.algorithm`, part 2, as `gladad.models.stable_diffusion.training` computes it, on tensors of any content."""
    schedule = Schedule.scaled_linear()
    z_normal, z_anomalous, noise = (torch.empty(batch_size, unet.config.in_channels, *latent_size) for _ in range(3))
    prompts = torch.empty(batch_size, TOKENS, unet.config.cross_attention_dim)
    timestep = torch.zeros(batch_size, dtype=torch.int64)
    alpha_bar = schedule.alpha_bar(timestep)
    x_t = add_noise(mix_anomaly(z_normal, z_anomalous, timestep, schedule.num_timesteps), noise, alpha_bar)
    noise_pred = unet(x_t.to(unet.dtype), timestep, encoder_hidden_states=prompts.to(unet.dtype)).sample
    return F.mse_loss(noise_pred.float(), denoising_target(x_t, z_normal, alpha_bar))


def _picture_peak(vae: Any, image_size: tuple[int, int]) -> int:
    """Bytes beyond the weights while an image is encoded or an example picture is decoded."""
    live = LiveMemory()
    with faked(), torch.no_grad():
        weights = live.watch_weights(vae.to_empty(device="cpu").eval())
        with live:
            latent = vae.encode(torch.empty(1, vae.config.in_channels, *image_size, dtype=vae.dtype)).latent_dist.mean
            vae.decode(latent)
    return live.peak - weights


# ------------------------------------------------------------------------------------------------------ inspection


def plan_inspection(
    unet_config: Config,
    vae_config: Config,
    vit_config: Config,
    image_size: tuple[int, int],
    precision: Precision,
    guidance: bool,
    feature_size: tuple[int, int] | None = None,
) -> MemoryPlan:
    """What the inspection of one image needs at its peak, with all networks loaded in ``precision``; takes seconds.

    Args:
        unet_config: Of the denoiser.
        vae_config: Of the autoencoder.
        vit_config: Of the extractor.
        image_size: ``(H, W)`` pixels at which the image is rebuilt.
        precision: Of weights and arithmetic.
        guidance: Classifier-free guidance, which doubles the denoiser's batch.
        feature_size: ``(H, W)`` pixels at which image and reconstruction are compared; None means ``image_size``.

    Raises:
        ConfigError: A size does not suit autoencoder or extractor, or the precision is unknown.
        ModelFormatError: A configuration describes no network.
    """
    if precision not in DTYPES:
        raise ConfigError(f"precision must be one of {', '.join(DTYPES)}, not {precision!r}")
    networks = [
        cast(network, DTYPES[precision]) for network in (build_vae(vae_config), build_unet(unet_config), build_features(vit_config))
    ]
    live = LiveMemory()
    with faked(), torch.no_grad():
        weights = sum(live.watch_weights(network.to_empty(device="cpu")) for network in networks)
        vae, unet, extractor = networks
        prompts = torch.empty(2, TOKENS, unet.config.cross_attention_dim)
        scheduler = DDIMScheduler()  # type: ignore[no-untyped-call]
        pipeline = GladPipeline(vae, unet, scheduler, extractor, prompts, guidance_scale=2.0 if guidance else 1.0)
        with live:
            _inspect(pipeline, image_size, feature_size or image_size)
    return MemoryPlan(parameters=weights, gradients=0, optimizer=0, activations=live.peak - weights)


def _inspect(pipeline: GladPipeline, image_size: tuple[int, int], feature_size: tuple[int, int]) -> None:
    """An inspection with one step of its search, as further ones need the same memory again.

    `gladad.algorithm.reconstruct` itself decides by the content of tensors, which is not there.
    """
    schedule = Schedule.scaled_linear()
    image = torch.empty(1, 3, *image_size)
    latent = pipeline.encode(image)
    noise = torch.empty_like(latent)
    timestep = torch.zeros(1, dtype=torch.int64)
    alpha_bar = schedule.alpha_bar(timestep)
    x_t = add_noise(latent, noise, alpha_bar)
    noise_pred = pipeline.predict_noise(x_t, timestep)
    generated = predict_x0(x_t, noise_pred, alpha_bar)
    reference = predict_x0(add_noise(latent, noise, alpha_bar), noise_pred, alpha_bar)
    patch_distance(pipeline.latent_features(reference), pipeline.latent_features(generated))
    pipeline.score_maps(image, pipeline.decode(generated), ScoringConfig(), feature_size)
