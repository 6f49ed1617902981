"""The ``lite`` model: GLAD in feature space, trained from scratch in minutes on a laptop.

What diffuses here is not an autoencoder's latent but the standardised, partly whitened principal components of frozen features. Such a
latent is already what one wants to compare, so ``latent_features`` is the identity, the step search costs almost nothing, and no pixels
are generated. The contract is the one of every model (`gladad.algorithm.Networks`).

A denoiser call rebuilds the normal latent; the residual, taken back to the features and compared with what is usual on normal images, is
the anomaly map. The decoder serves people only: it shows what the model thinks the part should look like.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gladad.algorithm import Reconstruction, gaussian_blur, image_noise, top_k_mean
from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels, to_pixels, to_tensor
from gladad.core.inference import inference_copy
from gladad.core.records import Inspection
from gladad.core.settings import from_json, to_json
from gladad.core.storage import content_digest, load_tensors, save_tensors
from gladad.core.threads import one_thread
from gladad.features.extractor import load_extractor
from gladad.features.space import FeatureSpace
from gladad.features.stack import FeatureStack
from gladad.models.feature_diffusion.methods import Method, method_of
from gladad.models.feature_diffusion.networks import LatentDecoder, LatentDenoiser
from gladad.models.feature_diffusion.settings import RECIPES, FeatureDiffusionConfig, Recipe

Pixels = NDArray[np.uint8]
WEIGHTS_FILE = "lite.safetensors"
LEVELS = 1 + max(level for recipe in RECIPES.values() for level in recipe.levels)
"""Of a stack of features, that the recipes count on."""


class FeatureDiffusion(nn.Module):
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

    def __init__(self, config: FeatureDiffusionConfig, stack: FeatureStack):
        super().__init__()
        self.stack = stack
        channels, latent = stack.channels, config.settings.latent
        if len(stack.levels) < LEVELS:
            raise ConfigError(f"features: {stack.extractor.identity.name} gives {len(stack.extractor.levels)} levels; lite needs three")
        if latent.dimensions >= channels:
            raise ConfigError(f"latent.dimensions must be from 1 to {channels - 1}, not {latent.dimensions}")
        self.config = config
        self.space = FeatureSpace(channels, latent.dimensions, latent.whitening)
        self.denoiser = self._empty_denoiser()
        self.decoder = LatentDecoder(latent.dimensions)
        self.register_buffer("residual_scale", torch.ones(1, latent.dimensions, 1, 1))
        self.register_buffer("usual_energy", torch.ones(2, channels))
        self.register_buffer("position_energy", torch.ones(1, 1, *self.grid))
        self.register_buffer("depth_scale", torch.ones(len(self.method.depths())))
        self._fast: list[LatentDenoiser] = []  # a bfloat16 copy; in a list so that it is no part of the saved state

    @property
    def config(self) -> FeatureDiffusionConfig:
        """What the model is."""
        return self._config

    @config.setter
    def config(self, config: FeatureDiffusionConfig) -> None:
        self._config = config
        self.method: Method = method_of(config.settings.reconstruction)

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """``(h, w)`` of the latent."""
        return self.stack.grid

    @property
    def device(self) -> torch.device:
        """Where its networks are."""
        return self.residual_scale.device

    @property
    def recipe(self) -> Recipe:
        """How its kind of product is rebuilt."""
        return self.config.recipe

    # -- the contract -------------------------------------------------------------------------------------------

    def features(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> stacked features ``[B, C, h, w]``."""
        return self.stack(image)

    def encode(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] -> latent ``[B, D, h, w]``."""
        latent: Tensor = self.space(self.features(image))[0]
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Latent -> ``[B, 3, H, W]`` picture in [0, 1]."""
        picture = self.decoder(latent)
        return F.interpolate(picture, self.image_size, mode="bilinear", align_corners=False).clamp(0, 1)

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """What the method makes of the denoiser's output."""
        output = self._fast_denoiser()(latent.to(torch.bfloat16), timestep, self.labels(len(latent)))
        return self.method.prediction(latent, output, timestep)

    def latent_features(self, latent: Tensor) -> Tensor:
        """The latent itself."""
        return latent

    def refresh(self) -> None:
        """Drop the fast copy of the denoiser; to be called after its weights changed."""
        self._fast = []

    def labels(self, count: int) -> Tensor | None:
        """What the denoiser is told of the product, for that many latents: ``[count]`` int64, or None if it knows one only."""
        config = self.config
        if not config.categories:
            return None
        return torch.full((count,), config.categories.index(config.category), device=self.device)

    def _empty_denoiser(self) -> LatentDenoiser:
        settings = self.config.settings
        return LatentDenoiser(settings.latent.dimensions, self.grid, settings.widths, len(self.config.categories))

    def on(self, device: torch.device) -> FeatureDiffusion:
        """The model itself, with all its networks moved to a device."""
        self.stack.extractor.to(device)
        self.refresh()
        return self.to(device)

    def _fast_denoiser(self) -> LatentDenoiser:
        if not self._fast:
            self._fast = [inference_copy(self.denoiser, self._empty_denoiser().to(self.device))]
        return self._fast[0]

    # -- inspection ---------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core, because each runs on one thread; one on a GPU."""
        return max(1, torch.get_num_threads()) if self.device.type == "cpu" else 1

    def rebuild(self, latent: Tensor) -> Reconstruction:
        """Anomaly-free latents of ``[B, D, h, w]``."""
        settings = self.config.settings
        noise = _kept_noise((settings.latent.dimensions, *self.grid), settings.seed, self.method.draws).to(latent)
        return self.method.reconstruct(self, latent, noise[None].expand(len(latent), -1, -1, -1, -1), self.residual_scale)

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

    def _level_energy(self, difference: Tensor, usual: Tensor) -> Tensor:
        recipe, total = self.recipe, torch.zeros_like(difference[:, :1])
        for channels in (self.stack.levels[level] for level in recipe.levels):
            pooled = pool(difference[:, channels], recipe.window).square()
            total = total + (pooled / usual[channels].view(1, -1, 1, 1)).mean(1, keepdim=True)
        return total / len(recipe.levels)

    def anomaly_map(self, energy: Tensor) -> Tensor:
        """Energy per cell -> map ``[B, 1, H, W]``: position-normalised, square root, upsampled, blurred."""
        scoring = self.config.settings.scoring
        share, sigma = scoring.position_share or 0.0, scoring.blur_sigma
        expected = share * self.position_energy + (1 - share)
        raw = (energy / expected).sqrt()
        upsampled = F.interpolate(raw, self.image_size, mode="bilinear", align_corners=False)
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
        settings = self.config.settings
        with one_thread():
            image = to_tensor(resize_pixels(pixels, self.image_size))[None].to(self.device)
            latent, outside = self.space(self.features(image))
            rebuilt = self.rebuild(latent)
            maps = self.anomaly_map(self.energy(latent - rebuilt.latent, outside))
            maps = maps / self.depth_scale[self.method.depth(int(rebuilt.step))]
            score = float(top_k_mean(maps, settings.scoring.top_k))
        return Inspection(map=maps[0, 0].cpu().numpy(), score=score, step=int(rebuilt.step), latent=rebuilt.latent)

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
        decoded = resize_pixels(to_pixels(self.decode(inspection.latent.clone())[0].cpu()), size)
        maps = torch.from_numpy(inspection.map)[None, None]
        weight = F.interpolate(maps, size, mode="bilinear", align_corners=False)[0, 0] / threshold
        share = ((weight - 0.6) / 0.4).clamp(0, 1).numpy()[..., None]
        return np.rint(share * decoded + (1 - share) * pixels).astype(np.uint8)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights into a folder; returns the JSON-ready config for the model file."""
        save_tensors(folder / WEIGHTS_FILE, self.state_dict())
        return to_json(self.config)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config with everything resolved."""
        return {"config": to_json(self.config)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and all weights."""
        return content_digest(to_json(self.config), self.state_dict())

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> FeatureDiffusion:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Config or weights do not fit.
        """
        try:
            parsed = from_json(FeatureDiffusionConfig, config)
            extractor = load_extractor(parsed.settings.features)
            if parsed.extractor is not None:
                extractor.identity.check(parsed.extractor, folder)
            model = cls(parsed, FeatureStack(extractor.fast(), parsed.image_size))
            tensors = load_tensors(folder / WEIGHTS_FILE)
            model.depth_scale = tensors["depth_scale"]  # its length has changed with versions where there is no search
            # version 0.1 kept the extractor's weights with the model
            model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("trunk.")})
        except (TypeError, KeyError, RuntimeError, ConfigError) as error:
            raise ModelFormatError(f"{folder}: its weights and its description do not fit together ({error})") from error
        return model.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def _kept_noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """`image_noise`, made once: every image is given the same."""
    return image_noise(shape, seed, count)


def pool(x: Tensor, window: int) -> Tensor:
    """Mean over ``window`` x ``window`` cells, borders counted by what is there."""
    return x if window == 1 else F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)
