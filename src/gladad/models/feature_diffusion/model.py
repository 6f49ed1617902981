"""The ``lite`` base: GLAD in feature space, trained from scratch in minutes on a laptop.

What diffuses here is not an autoencoder's latent but the standardised, partly whitened principal components of frozen EfficientNet-Lite0
features. Such a latent is already what one wants to compare, so ``latent_features`` is the identity, the step search costs almost
nothing, and no pixels are generated. The contract is the one of every base (`gladad.algorithm.Networks`).

A denoiser call rebuilds the normal latent; the residual, taken back to the features and compared with what is usual on normal images, is
the anomaly map. The decoder serves people only: it shows what the model thinks the part should look like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn

from gladad.algorithm import (
    OneCallConfig,
    Reconstruction,
    Schedule,
    gaussian_blur,
    image_noise,
    reconstruct_one_call,
    top_k_mean,
    velocity_to_noise,
)
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels, to_pixels, to_tensor
from gladad.core.inference import channels_last, inference_copy
from gladad.core.records import Inspection
from gladad.core.settings import from_json, to_json, validated
from gladad.core.storage import load_tensors, save_tensors
from gladad.core.threads import one_thread
from gladad.features.efficientnet import EfficientNetLite0
from gladad.features.whitening import CELL, FEATURE_CHANNELS, LEVELS, SIDE_MULTIPLE, FeatureSpace, stack_features

Pixels = NDArray[np.uint8]
WEIGHTS_FILE = "lite.safetensors"
Product = Literal["object", "texture"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one kind of product is rebuilt, and which part of the residual counts."""

    timesteps: tuple[int, ...]  # of the denoiser calls at inspection, from high to low
    trained: tuple[int, int]  # training draws timesteps from here to below there
    levels: tuple[int, ...]  # of the stacked features, out of `gladad.features.whitening.LEVELS`; each has the same say
    window: int  # grid cells per side, odd, over which residuals are averaged before their energy is taken
    outside_share: float  # weight of the energy that includes what the latent cannot hold, in [0, 1]


RECIPES: dict[Product, Recipe] = {
    "object": Recipe(timesteps=(600, 400), trained=(200, 700), levels=(0, 1, 2), window=1, outside_share=0.5),
    "texture": Recipe(timesteps=(500, 300), trained=(100, 600), levels=(2, 3, 4), window=7, outside_share=0.0),
}
"""An object's structure can be predicted, so fine detail is evidence; a texture's grain cannot, so what is left on average is."""


@validated
class LiteConfig:
    """Shape and scoring of a ``lite`` model. Training settings are in `gladad.models.feature_diffusion.training`."""

    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels that every image is resized to; multiples of 32
    dimensions: int = 80  # principal components kept as the latent
    whitening: float = 0.5  # exponent: 0 = PCA, 1 = full whitening
    widths: tuple[int, ...] = (96, 128, 192)  # channels of the denoiser's levels
    reconstruction: OneCallConfig = field(default_factory=lambda: OneCallConfig(timesteps=()))  # no timesteps = set by training
    seed: int = 0  # of the noise added at inspection, the same for every image
    categories: tuple[str, ...] = ()  # products that share the denoiser, which is told which one it sees; none = it knows one only
    category: str = ""  # the product of this model, one of these
    product: Literal["auto", "object", "texture"] = "auto"  # which of RECIPES; "auto" = set by training
    position_share: float | None = None  # share of the per-position normal energy in the normalisation; None = set by training
    blur_sigma: float = 4.0  # Gaussian blur of the map, pixels
    top_k: int = 250  # pixels averaged into the image score

    def __post_init__(self) -> None:
        if any(side % SIDE_MULTIPLE or side < 64 for side in self.image_size):
            raise ConfigError(f"image_size must be two multiples of {SIDE_MULTIPLE}, each at least 64, not {self.image_size}")
        if not 1 <= self.dimensions < FEATURE_CHANNELS:
            raise ConfigError(f"dimensions must be from 1 to {FEATURE_CHANNELS - 1}, not {self.dimensions}")
        if self.categories and self.category not in self.categories:
            raise ConfigError(f"category must be one of {', '.join(self.categories)}, not {self.category!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)`` of the latent: one cell per 8x8 pixels."""
        return self.image_size[0] // CELL, self.image_size[1] // CELL


# -------------------------------------------------------------------------------------------------------- denoiser


class LatentDenoiser(nn.Module):
    """A small UNet over the 2x2 space-to-depth of the latent, with position channels; predicts the velocity.

    With ``classes`` it is told the product by an embedding that joins the timestep's.
    """

    position: Tensor

    def __init__(self, dimensions: int, grid: tuple[int, int], widths: Sequence[int], classes: int = 0):
        super().__init__()
        height, width = grid[0] // 2, grid[1] // 2
        y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
        x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
        waves = [wave(math.pi * c) for c in (y, x) for wave in (torch.sin, torch.cos)]
        self.register_buffer("position", torch.stack([y, x, *waves])[None], persistent=False)
        levels = len(widths)
        multiple = 2 ** (levels - 1)
        self.pad = (0, -width % multiple, 0, -height % multiple)
        self.unet: nn.Module = cast(Any, UNet2DModel)(
            sample_size=(height, width),
            in_channels=4 * dimensions + self.position.shape[1],
            out_channels=4 * dimensions,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            norm_num_groups=16,
            attention_head_dim=32,
            num_class_embeds=classes or None,
        )
        channels_last(self.unet)

    def forward(self, x_t: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """Velocity ``[B, D, h, w]`` float32 of noisy latents at timesteps ``[B]``, of products ``[B]`` int64 where there are classes."""
        packed = F.pixel_unshuffle(x_t, 2)
        packed = torch.cat([packed, self.position.to(packed.dtype).expand(len(packed), -1, -1, -1)], dim=1)
        if any(self.pad):
            packed = F.pad(packed, self.pad, mode="replicate")
        out: Tensor = self.unet(packed.to(memory_format=torch.channels_last), timestep, class_labels=label).sample
        height, width = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        return F.pixel_shuffle(out[..., :height, :width].contiguous(), 2).float()


class LatentDecoder(nn.Module):
    """Latent -> RGB picture at four times the grid's side, for people."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dimensions, 96, 3, padding=1), nn.SiLU(),
            nn.Conv2d(96, 4 * 32, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(32, 4 * 16, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, latent: Tensor) -> Tensor:
        """``[B, D, h, w]`` -> ``[B, 3, 4h, 4w]`` in [0, 1]."""
        picture: Tensor = self.net(latent)
        return picture


# ------------------------------------------------------------------------------------------------------------ base


class LiteBase(nn.Module):
    """A ``lite`` model: the four callables, the normal statistics of its residuals, and inspection.

    Buffers:
        residual_scale: ``[1, D, 1, 1]`` root mean square of the residual on normal images.
        usual_energy: ``[2, C]`` mean squared pooled residual of every feature on normal images, without and with what the latent
            cannot hold.
        position_energy: ``[1, 1, h, w]`` mean normalised energy per position, 1 on average.
        depth_scale: ``[K]`` mean map value on normal images decided at each probe, relative to the last: an estimate from fewer and
            noisier probes leaves larger residuals everywhere, which says nothing about the part.
    """

    kind = "lite"
    residual_scale: Tensor
    usual_energy: Tensor
    position_energy: Tensor
    depth_scale: Tensor

    def __init__(self, config: LiteConfig, trunk: EfficientNetLite0):
        super().__init__()
        self.config = config
        self.schedule = Schedule.scaled_linear()
        self.trunk = trunk
        self.space = FeatureSpace(config.dimensions, config.whitening)
        self.denoiser = self._empty_denoiser()
        self.decoder = LatentDecoder(config.dimensions)
        self.register_buffer("residual_scale", torch.ones(1, config.dimensions, 1, 1))
        self.register_buffer("usual_energy", torch.ones(2, FEATURE_CHANNELS))
        self.register_buffer("position_energy", torch.ones(1, 1, *config.grid))
        self.register_buffer("depth_scale", torch.ones(len(config.reconstruction.timesteps)))
        self._fast: list[nn.Module] = []  # bfloat16 copies; in a list so that they are no part of the saved state

    # -- the contract -------------------------------------------------------------------------------------------

    def features(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> stacked features ``[B, 328, h, w]``."""
        return stack_features(self._fast_networks()[0], image, self.config.grid)

    def encode(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> latent ``[B, D, h, w]``."""
        latent: Tensor = self.space(self.features(image))[0]
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Latent -> ``[B, 3, H, W]`` picture in [0, 1]."""
        picture = self.decoder(latent)
        return F.interpolate(picture, self.config.image_size, mode="bilinear", align_corners=False).clamp(0, 1)

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Noise implied by the denoiser's velocity."""
        velocity = self._fast_networks()[1](latent.to(torch.bfloat16), timestep, self.labels(len(latent)))
        return velocity_to_noise(latent, velocity, self.schedule.alpha_bar(timestep))

    def latent_features(self, latent: Tensor) -> Tensor:
        """The latent itself."""
        return latent

    def refresh(self) -> None:
        """Drop the fast copies of the networks; to be called after their weights changed."""
        self._fast = []

    def labels(self, count: int) -> Tensor | None:
        """What the denoiser is told of the product, for that many latents: ``[count]`` int64, or None if it knows one only."""
        config = self.config
        return torch.full((count,), config.categories.index(config.category)) if config.categories else None

    def _empty_denoiser(self) -> LatentDenoiser:
        config = self.config
        return LatentDenoiser(config.dimensions, config.grid, config.widths, len(config.categories))

    def _fast_networks(self) -> tuple[EfficientNetLite0, LatentDenoiser]:
        if not self._fast:
            self._fast = [inference_copy(self.trunk, EfficientNetLite0()), inference_copy(self.denoiser, self._empty_denoiser())]
        trunk, denoiser = self._fast
        return cast(EfficientNetLite0, trunk), cast(LatentDenoiser, denoiser)

    # -- inspection ---------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core, because each runs on one thread."""
        return max(1, torch.get_num_threads())

    def noise(self) -> Tensor:
        """``[K, D, h, w]``: the noise of every image's probes."""
        config = self.config
        return _kept_noise((config.dimensions, *config.grid), config.seed, len(config.reconstruction.timesteps))

    def rebuild(self, latent: Tensor) -> Reconstruction:
        """Anomaly-free latents of ``[B, D, h, w]``."""
        noise = self.noise()[None].expand(len(latent), -1, -1, -1, -1)
        return reconstruct_one_call(self, latent, noise, self.schedule, self.config.reconstruction, self.residual_scale)

    def energy(self, residual: Tensor, outside: Tensor) -> Tensor:
        """Evidence per grid cell: residual energy of the features relative to normal images, averaged over levels.

        Args:
            residual: ``[B, D, h, w]`` latent minus its reconstruction.
            outside: ``[B, C, h, w]`` what the latent does not hold of the features.

        Returns:
            ``[B, 1, h, w]`` >= 0, about 1 on average on normal images (before the position normalisation).
        """
        inside = self.space.to_features(residual)
        share = self.recipe.outside_share
        total = torch.zeros_like(inside[:, :1])
        for row, (weight, difference) in enumerate(((1 - share, inside), (share, inside + outside))):
            if weight:
                total = total + weight * self._level_energy(difference, self.usual_energy[row])
        return total

    @property
    def recipe(self) -> Recipe:
        """That of this kind of product (of an object, as long as the kind is not known)."""
        return RECIPES["object" if self.config.product == "auto" else self.config.product]

    def _level_energy(self, difference: Tensor, usual: Tensor) -> Tensor:
        recipe, total = self.recipe, torch.zeros_like(difference[:, :1])
        for channels in (LEVELS[level] for level in recipe.levels):
            pooled = pool(difference[:, channels], recipe.window).square()
            total = total + (pooled / usual[channels].view(1, -1, 1, 1)).mean(1, keepdim=True)
        return total / len(recipe.levels)

    def anomaly_map(self, energy: Tensor) -> Tensor:
        """Energy per cell -> map ``[B, 1, H, W]``: position-normalised, square root, upsampled, blurred."""
        share, sigma = self.config.position_share or 0.0, self.config.blur_sigma
        expected = share * self.position_energy + (1 - share)
        raw = (energy / expected).sqrt()
        upsampled = F.interpolate(raw, self.config.image_size, mode="bilinear", align_corners=False)
        return gaussian_blur(upsampled, sigma, 2 * math.ceil(4 * sigma) + 1)

    @torch.inference_mode()
    def inspect(self, pixels: Pixels) -> Inspection:
        """Inspect one image.

        Images go through the networks one at a time and on one thread: neither the shapes nor the order of a sum, and so no bit of the
        result, depends on the batch or on the number of cores. Several images are best inspected by as many threads, see `Glad.predict`.

        Args:
            pixels: ``[H, W, 3]`` uint8 of any size.

        Returns:
            Map and score in the model's own units, and what is needed for a picture of the reconstruction.
        """
        with one_thread():
            image = self.prepare(pixels)[None]
            latent, outside = self.space(self.features(image))
            rebuilt = self.rebuild(latent)
            maps = self.anomaly_map(self.energy(latent - rebuilt.latent, outside))
            maps = maps / self.depth_scale[self.config.reconstruction.timesteps.index(int(rebuilt.step))]
            score = float(top_k_mean(maps, self.config.top_k))
        return Inspection(map=maps[0, 0].numpy(), score=score, step=int(rebuilt.step), latent=rebuilt.latent)

    def prepare(self, pixels: Pixels) -> Tensor:
        """``uint8 [H, W, 3]`` -> ``[3, H, W]`` in [0, 1]."""
        return to_tensor(resize_pixels(pixels, self.config.image_size))

    @torch.inference_mode()
    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels:
        """The part as the model thinks it should be: decoded where the map is near or above its threshold, the input elsewhere.

        Args:
            inspection: Of these pixels.
            pixels: ``[H, W, 3]`` uint8.
            threshold: Map value of the pixel threshold.

        Returns:
            ``[H, W, 3]`` uint8.
        """
        size = (pixels.shape[0], pixels.shape[1])
        decoded = resize_pixels(to_pixels(self.decode(inspection.latent.clone())[0]), size)
        maps = torch.from_numpy(inspection.map)[None, None]
        weight = F.interpolate(maps, size, mode="bilinear", align_corners=False)[0, 0] / threshold
        share = ((weight - 0.6) / 0.4).clamp(0, 1).numpy()[..., None]
        return np.rint(share * decoded + (1 - share) * pixels).astype(np.uint8)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights into a folder; returns the JSON-ready config for the model file."""
        save_tensors(folder / WEIGHTS_FILE, self.state_dict())
        return to_json(self.config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> LiteBase:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Config or weights do not fit.
        """
        try:
            base = cls(from_json(LiteConfig, config), EfficientNetLite0())
            base.load_state_dict(load_tensors(folder / WEIGHTS_FILE))
        except (TypeError, KeyError, RuntimeError, ConfigError) as error:
            raise ModelFormatError(f"{folder}: its weights and its description do not fit together ({error})") from error
        return base.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def _kept_noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """`image_noise`, made once: every image is given the same."""
    return image_noise(shape, seed, count)


def pool(x: Tensor, window: int) -> Tensor:
    """Mean over ``window`` x ``window`` cells, borders counted by what is there."""
    return x if window == 1 else F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)
