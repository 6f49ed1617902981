"""One of the house's extractors in place of a vision transformer: for bases in the paper's form that need nothing from the Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.storage import read_json, write_json
from gladad.core.tensors import load_tensors, save_tensors
from gladad.features.efficientnet import EfficientNetLite, pretrained
from gladad.features.extractor import PACKAGED

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "efficientnet-lite"


class PyramidFeatures(ModelMixin):
    """Feature maps of strides 4, 8 and 16, with the face of `gladad.features.vit.DinoFeatures`; "blocks" are those maps."""

    patch_size = 16  # the coarsest stride
    default_layers = (1, 2, 3)

    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network = network

    @classmethod
    def pretrained(cls) -> Self:
        """With the weights of the default extractor's package."""
        return cls(pretrained())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            ModelFormatError: It is not such a folder.
        """
        config = read_json(Path(folder) / CONFIG)
        if config.get("model_type") != MODEL_TYPE or config.get("name") not in PACKAGED:
            raise ModelFormatError(f"{folder} is no folder of {', '.join(PACKAGED)}")
        network = EfficientNetLite(config["name"])
        try:
            network.load_state_dict(load_tensors(Path(folder) / WEIGHTS))
        except RuntimeError as error:
            raise ModelFormatError(f"{folder}: its weights are not those of {config['name']} ({error})") from error
        nn.Module.to(network, kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32)
        return cls(network)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write configuration and weights."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, {"model_type": MODEL_TYPE, "name": self.network.identity.name})
        save_tensors(folder / WEIGHTS, dict(self.network.state_dict()))

    def nearest_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The ``(height, width)`` nearest to ``size`` in multiples of 16, one at least."""
        height, width = (max(1, (side + 8) // 16) * 16 for side in size)
        return height, width

    def mlp_parameters(self, blocks: Sequence[int]) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of the pointwise convolutions in the last blocks before some maps, counted from 1: the MLPs of each place.

        Raises:
            ConfigError: A map does not exist.
        """
        ends, found = sorted(self.network.taps), list[tuple[str, nn.Parameter]]()
        for block in sorted(set(blocks)):
            if not 1 <= block <= len(ends):
                raise ConfigError(f"MLPs to train: there are maps 1 to {len(ends)}, not {block}")
            name = f"network.blocks.{ends[block - 1]}"
            for part in ("expand", "project"):
                found += self.get_submodule(f"{name}.{part}").named_parameters(prefix=f"{name}.{part}")  # type: ignore[attr-defined]
        return found

    def forward(self, image: Tensor, layers: Sequence[int] | None = None, imagenet: bool = True) -> list[Tensor]:
        """Maps of an image.

        Args:
            image: ``[B, 3, H, W]`` RGB in [0, 1], sides multiples of 16.
            layers: Of the maps, counted from 1, finest first; None means all.
            imagenet: Nothing: the network has one normalisation.

        Returns:
            One float32 ``[B, D, h, w]`` per layer.
        """
        maps = self.network(image)
        return [maps[layer - 1].float() for layer in (self.default_layers if layers is None else layers)]
