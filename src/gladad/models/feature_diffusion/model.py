"""The ``lite`` model: GLAD in feature space, trained from scratch in minutes on a laptop.

What diffuses here is not an autoencoder's latent but the standardised, partly whitened principal components of frozen features. Such a
latent is already what one wants to compare, so no pixels are generated. The denoiser is shown, beside the noisy latent, the nearest normal
latent that a memory of the good images holds: the memory knows rare normal detail, the denoiser knows what belongs where.

What a residual counts depends on what it is a residual of: a smooth surface is rebuilt better than an edge. How those of similar normal
latents vary is what it is measured by.

All this is done at several scales, the image itself and its halves, and at each both the largest cells and the mean of all are a score. How
far a score lies above those of normal images, in their standard deviations, is what scores are compared by: where a texture's grain makes
those of the fine scale vary, it silences itself.
The decoder serves people only: it shows what the model thinks the part should look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels
from gladad.core.records import Inspection
from gladad.core.settings import from_json, to_json
from gladad.core.tensors import load_tensors, save_tensors, tensors_digest, to_pixels, to_tensor
from gladad.core.threads import one_thread, side_by_side
from gladad.features.extractor import Extractor, load_extractor
from gladad.features.stack import size_multiple
from gladad.models.feature_diffusion.networks import LatentDecoder
from gladad.models.feature_diffusion.past import PAST_FILE, Past, Stored, save_past
from gladad.models.feature_diffusion.placement import reason
from gladad.models.feature_diffusion.scale import Scale
from gladad.models.feature_diffusion.settings import FeatureDiffusionConfig, FeatureDiffusionSettings
from gladad.models.pictures import where_anomalous

Pixels = NDArray[np.uint8]
WEIGHTS_FILE = "lite.safetensors"
MARGIN = 2  # cells beside ignored places that do not count either: evidence is blurred over a cell, and features see further


def working_multiple(settings: FeatureDiffusionSettings, extractor: Extractor) -> int:
    """Image sides are multiples of this number of pixels, so that every scale's are what the extractor needs."""
    return size_multiple(extractor) << (settings.scales - 1)


class FeatureDiffusion(nn.Module):
    """A ``lite`` model: its scales, and inspection."""

    kind = "lite"
    scales: nn.ModuleList

    def __init__(self, config: FeatureDiffusionConfig, extractor: Extractor):
        super().__init__()
        multiple = working_multiple(config.settings, extractor)
        if any(side % multiple or side < 2 * multiple for side in config.image_size):
            needed = f"two multiples of {multiple}, each at least {2 * multiple}"
            name, count = extractor.identity.name, config.settings.scales
            raise ConfigError(f"image_size must be {needed} for {count} scales of the features of {name}, not {config.image_size}")
        self._extractor = [extractor]  # in a list so that its weights are no part of the saved state
        self.scales = nn.ModuleList(Scale(config, number, extractor) for number in range(config.settings.scales))
        self.decoder = LatentDecoder(self.all_scales()[0].dimensions)
        self.config = config
        self._past: list[Past] | Stored | None = None

    @property
    def config(self) -> FeatureDiffusionConfig:
        """What the model is."""
        return self._config

    @config.setter
    def config(self, config: FeatureDiffusionConfig) -> None:
        self._config = config
        for scale in self.all_scales():
            scale.configure(config)

    def all_scales(self) -> list[Scale]:
        """From the image's own size down."""
        return [scale for scale in self.scales if isinstance(scale, Scale)]

    @property
    def extractor(self) -> Extractor:
        """The frozen feature network, which all scales share."""
        return self._extractor[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    @property
    def device(self) -> torch.device:
        """Where its networks are."""
        return next(self.decoder.parameters()).device

    def on(self, device: torch.device) -> FeatureDiffusion:
        """The model itself, with all its networks moved to a device."""
        self.extractor.to(device)
        for scale in self.all_scales():
            scale.memory.remember(scale.memory.rows, scale.memory.owner)
        return self.to(device)

    # -- inspection ---------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core, because each runs on one thread; one on a GPU."""
        return max(1, torch.get_num_threads()) if self.device.type == "cpu" else 1

    def anomaly_map(self, evidence: Sequence[Tensor]) -> Tensor:
        """Evidence ``[B, 1, h, w]`` of every scale as one map ``[B, 1, H, W]``.

        Energies add up, each shared among the cells of the finest scale that its own cell covers.
        """
        total = torch.zeros(evidence[0].shape[0], 1, *self.image_size, device=self.device)
        for number, cells in enumerate(evidence):
            total = total + F.interpolate(cells, self.image_size, mode="bilinear", align_corners=False).square() / 4**number
        return total.sqrt()

    def image_score(self, scores: Sequence[Tensor]) -> Tensor:
        """Scores of the scales, ``[K, B]`` each, as one ``[B]`` > 0: the one that is the least usual.

        A score relative to the geometric mean of those of normal images, to the power that makes all vary alike.
        """
        usual = torch.cat([scale.usual_scores for scale in self.all_scales()])  # [S K, 2]
        spread = usual[:, 1].log().mean().exp()
        power = spread / usual[:, 1]
        return ((torch.cat(list(scores)).clamp_min(1e-12).log() - usual[:, :1]) * power[:, None]).amax(0).exp()

    def summary(self, evidence: Sequence[Tensor], counted: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Map ``[B, 1, H, W]`` and score ``[B]`` from the evidence of all scales, and which cells of each count (all, if not given)."""
        everywhere: list[Tensor | None] = [None] * len(evidence)
        scales = zip(self.all_scales(), evidence, counted or everywhere, strict=True)
        return self.anomaly_map(evidence), self.image_score([scale.scores(cells, where) for scale, cells, where in scales])

    def inspect(self, pixels: Pixels) -> Inspection:
        """Inspect one image, see `inspect_where`; everything counts."""
        return self.inspect_where(pixels, None)

    def inspect_where(self, pixels: Pixels, counted: NDArray[np.bool_] | None) -> Inspection:
        """Inspect one image where it counts.

        Images go through the networks one at a time and each scale on one thread: neither the shapes nor the order of a sum, and so no bit
        of the result, depends on the batch or on the number of cores. The scales of an image are inspected side by side where cores are
        free; several images are best inspected by as many threads, see `Glad.predict`.

        Args:
            pixels: ``[H, W, 3]`` uint8 of any size.
            counted: ``[H, W]`` over the image, of any size: at each scale nothing shows where it does not count and in the cells next to
                it, whose features see what is there; None is all.

        Returns:
            Map and score in the model's own units, and what is needed for a picture of the reconstruction.
        """
        cores = self.workers
        with torch.inference_mode(), one_thread():
            image = to_tensor(resize_pixels(pixels, self.image_size))[None].to(self.device)
            rebuilt, evidence = zip(*side_by_side(lambda scale: scale.inspect(image), self.all_scales(), cores), strict=True)
            far: list[Tensor] = []
            if counted is not None:
                where = torch.from_numpy(counted.astype(np.float32)).to(self.device)[None, None]
                far = [self._far_enough(where, cells) for cells in evidence]
                evidence = tuple(cells * own for cells, own in zip(evidence, far, strict=True))
            maps, score = self.summary(evidence, far)
        return Inspection(map=maps[0, 0].cpu().numpy(), score=float(score), step=int(rebuilt[0].step), latent=rebuilt[0].latent)

    def _far_enough(self, counted: Tensor, cells: Tensor) -> Tensor:
        """Which cells ``[1, 1, h, w]`` count with all their neighbours."""
        ignored = (F.interpolate(counted, cells.shape[2:], mode="area") < 1).float()
        return 1 - F.max_pool2d(ignored, 2 * MARGIN + 1, 1, MARGIN)

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
        return where_anomalous(to_pixels(self.decoded(inspection.latent.clone())[0].cpu()), pixels, inspection.map / threshold)

    def decoded(self, latent: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1] of what latents of the first scale show."""
        return F.interpolate(self.decoder(latent), self.image_size, mode="bilinear", align_corners=False).clamp(0, 1)

    # -- what is kept of the training ---------------------------------------------------------------------------

    def keep(self, past: Sequence[Past]) -> None:
        """Keep latents, one `Past` of each scale, with the model; they are no part of what inspects, nor of its ID."""
        self._past = list(past)

    @property
    def has_past(self) -> bool:
        """Whether it keeps latents of its training."""
        return self._past is not None

    def past(self) -> list[Past]:
        """The latents that are kept, of each scale; none if there are none."""
        return self._past.read(len(self.scales)) if isinstance(self._past, Stored) else list(self._past or ())

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights into a folder; returns the JSON-ready config for the model file."""
        # the denoisers' weights are bfloat16 numbers since the end of their training
        compact = {name: value.bfloat16() if ".denoiser." in name else value for name, value in self.state_dict().items()}
        save_tensors(folder / WEIGHTS_FILE, compact)
        if self.has_past:
            self.keep(self.past())  # the folder that it lies in may be the one that is replaced
            save_past(folder / PAST_FILE, self.past())
        return to_json(self.config)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config with everything resolved, and whether turned copies of the good images were learnt."""
        return {"config": to_json(self.config), "copies": reason(self.config.turned)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and all weights."""
        return tensors_digest(to_json(self.config), self.state_dict())

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
            model = cls(parsed, extractor.fast())
            tensors = load_tensors(folder / WEIGHTS_FILE)
            for number, scale in enumerate(model.all_scales()):  # their sizes are what they are
                tensors.setdefault(f"scales.{number}.usual_level", torch.zeros(5))  # an earlier version wrote none
                scale.memory.remember(*(tensors[f"scales.{number}.memory.{name}"] for name in ("rows", "owner")))
                scale.gaussians.hold(*(tensors[f"scales.{number}.gaussians.{name}"] for name in ("centres", "means", "whiteners")))
            model.load_state_dict(tensors)
            model._past = Stored.at(folder / PAST_FILE) if (folder / PAST_FILE).is_file() else None
        except (TypeError, KeyError, RuntimeError, ConfigError) as error:
            reason = f"its weights and its description do not fit together ({error}); fit it anew if an earlier version wrote it"
            raise ModelFormatError(f"{folder}: {reason}") from error
        return model.eval().requires_grad_(False)
