"""Baselines: anomalib's PatchCore and PaDiM on exactly the features of the ``lite`` base.

anomalib (extra ``gladad[anomalib]``) brings the models; they are built, filled and asked through its own classes. Only the backbone is
replaced by the features that ``lite`` and our memory bank use, so that all of them see the same. Scores and maps are theirs; threshold and
metrics are ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from gladad.core.errors import ConfigError, MissingExtraError, ModelFormatError
from gladad.core.images import resize_pixels
from gladad.core.records import Inspection, Progress, no_progress
from gladad.core.settings import from_json, to_json, validated
from gladad.core.tensors import load_tensors, save_tensors, tensors_digest, to_tensor
from gladad.core.threads import one_thread
from gladad.features.extractor import load_extractor
from gladad.features.stack import FeatureStack
from gladad.models.settings import FitSettings

Pixels = NDArray[np.uint8]
Method = Literal["patchcore", "padim"]
WEIGHTS_FILE = "anomalib.safetensors"
LAYER = "features"


@validated
class AnomalibSettings(FitSettings):
    """Settings of anomalib's models."""

    coreset: Annotated[float, Field(gt=0, le=1)] = 0.01  # share of the vectors that PatchCore keeps (its paper: 25 %, 10 % and 1 %)
    neighbours: Annotated[int, Field(ge=1)] = 9  # of PatchCore's re-weighting of the score
    dimensions: Annotated[int, Field(ge=1)] = 100  # random feature dimensions that PaDiM keeps (its paper: 100 with ResNet-18)


@validated
class AnomalibConfig:
    """Which model, its settings, and its size."""

    method: Method = "patchcore"
    settings: AnomalibSettings = field(default_factory=AnomalibSettings)
    image_size: tuple[int, int] = (256, 256)  # (H, W) in pixels; multiples of 32


class _Features(nn.Module):
    """Our features in the form in which anomalib's models ask for them."""

    def __init__(self, image_size: tuple[int, int]):
        super().__init__()
        self.extract = FeatureStack(load_extractor().fast(), image_size)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {LAYER: self.extract(images)}


class AnomalibModel:
    """A model of anomalib behind the interface that `gladad.detector.glad` uses.

    Args:
        config: Which model.

    Raises:
        MissingExtraError: anomalib is not installed.
    """

    def __init__(self, config: AnomalibConfig):
        self.config = config
        try:
            from anomalib.models.image.padim.torch_model import PadimModel
            from anomalib.models.image.patchcore.torch_model import PatchcoreModel
        except ImportError as error:
            raise MissingExtraError(f"the base anomalib-{config.method}", "'gladad[anomalib]'") from error
        self.features = _Features(config.image_size)
        # The models ask their backbone for its channels only; the features themselves come from ours.
        shape = nn.Sequential(OrderedDict([(LAYER, nn.Conv2d(3, self.features.extract.channels, 1))]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.settings.seed)
            if config.method == "patchcore":
                self.model: Any = PatchcoreModel(layers=[LAYER], backbone=shape, num_neighbors=config.settings.neighbours)
            else:
                self.model = PadimModel(layers=[LAYER], backbone=shape, n_features=config.settings.dimensions)
        self.model.feature_extractor = self.features

    @property
    def kind(self) -> str:
        """The base's name."""
        return f"anomalib-{self.config.method}"

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core, because each runs on one thread."""
        return max(1, torch.get_num_threads())

    @torch.inference_mode()
    def inspect(self, pixels: Pixels) -> Inspection:
        """The model's own map and score of one ``[H, W, 3]`` uint8 image of any size."""
        with one_thread():
            result = self.model(to_tensor(resize_pixels(pixels, self.image_size))[None])
        maps = result.anomaly_map.reshape(self.config.image_size).float().numpy()
        return Inspection(map=maps, score=float(result.pred_score), step=0, latent=None)

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> None:
        """These models rebuild nothing."""

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config."""
        return {"config": to_json(self.config)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and what was learned."""
        return tensors_digest(to_json(self.config), {name: getattr(owner, attribute) for name, owner, attribute in self._learned()})

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what was learned into a folder; returns the JSON-ready config."""
        save_tensors(folder / WEIGHTS_FILE, {name: getattr(owner, attribute) for name, owner, attribute in self._learned()})
        return to_json(self.config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> AnomalibModel:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Folder and description do not fit together.
            MissingExtraError: anomalib is not installed.
        """
        tensors = load_tensors(folder / WEIGHTS_FILE)
        try:
            base = cls(from_json(AnomalibConfig, config))
            for name, owner, attribute in base._learned():
                setattr(owner, attribute, tensors[name])
        except (KeyError, ConfigError) as error:
            raise ModelFormatError(f"{folder}: its tensors and its description do not fit together ({error})") from error
        base.model.eval()
        return base

    def _learned(self) -> list[tuple[str, Any, str]]:
        """``(name in the file, object, attribute)`` of every tensor that fitting sets."""
        if self.config.method == "patchcore":
            return [("memory_bank", self.model, "memory_bank")]
        gaussian = self.model.gaussian
        return [("idx", self.model, "idx"), ("mean", gaussian, "mean"), ("inv_covariance", gaussian, "inv_covariance")]


@torch.no_grad()
def fit_anomalib(images: Sequence[Pixels], config: AnomalibConfig, *, progress: Progress = no_progress) -> AnomalibModel:
    """Fit a model of anomalib on good images; the same images and seed give the same model.

    Args:
        images: ``[H, W, 3]`` uint8 normal images.
        config: Which model.
        progress: Told of every image.

    Raises:
        MissingExtraError: anomalib is not installed.
    """
    base = AnomalibModel(config)
    base.model.train()
    for done, pixels in enumerate(images, start=1):
        base.model(to_tensor(resize_pixels(pixels, config.image_size))[None])
        progress("features", done, len(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.settings.seed)
        state = np.random.get_state()  # noqa: NPY002 (their random projection draws from it)
        np.random.seed(config.settings.seed)  # noqa: NPY002
        try:
            if config.method == "patchcore":
                base.model.subsample_embedding(config.settings.coreset)
            else:
                base.model.fit()
        finally:
            np.random.set_state(state)  # noqa: NPY002
    for _, owner, attribute in base._learned():  # as they will be after loading: the order of sums follows the layout
        setattr(owner, attribute, getattr(owner, attribute).contiguous())
    base.model.eval()
    return base
