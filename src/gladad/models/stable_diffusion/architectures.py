"""What the networks of a base look like: their configuration files, and networks built of these that hold no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import AutoConfig

from gladad.core.errors import ModelFormatError
from gladad.core.storage import read_json
from gladad.features.vit import TRANSFORMERS, DinoFeatures
from gladad.models.stable_diffusion.components import Base, first_line


@dataclass(frozen=True)
class BaseConfigs:
    """The ``config.json`` of each network of a base."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    features: dict[str, Any]


SD14 = BaseConfigs(
    unet={"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "sample_size": 64},  # 859,520,964 parameters
    vae={  # 83,653,863 parameters
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    features={"model_type": "vit", "patch_size": 8},  # 85,807,872 parameters, without a pooling layer
)
"""The paper's base, Stable Diffusion v1-4 with DINO ViT-B/8, which need not be downloaded: where it differs from its classes' defaults."""


def read_configs(base: Base) -> BaseConfigs:
    """The configurations of a base; its weights need not be there.

    Raises:
        ModelFormatError: One is missing or damaged.
    """
    places = base.folder / "unet", base.vae, base.features
    return BaseConfigs(*(read_json(place / "config.json") for place in places))


def build_without_weights(configs: BaseConfigs, dtype: torch.dtype, unet_dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Denoiser, autoencoder and extractor on torch's meta device, where tensors have a shape and no content.

    Raises:
        ModelFormatError: A configuration describes no network.
    """

    def features() -> DinoFeatures:
        kind = TRANSFORMERS[configs.features["model_type"]]
        options = {"add_pooling_layer": False} if configs.features["model_type"] == "vit" else {}
        return DinoFeatures(kind(AutoConfig.for_model(**configs.features), **options))

    return (
        _built("denoiser", lambda: UNet2DConditionModel.from_config(configs.unet), unet_dtype),  # type: ignore[no-untyped-call]
        _built("autoencoder", lambda: AutoencoderKL.from_config(configs.vae), dtype),  # type: ignore[no-untyped-call]
        _built("feature extractor", features, dtype),
    )


def _built(name: str, build: Callable[[], Any], dtype: torch.dtype) -> Any:
    try:
        with torch.device("meta"):
            return nn.Module.to(build(), dtype)  # diffusers' own warns of modules to be kept in float32, though there are none
    except Exception as error:  # whatever a constructor stumbles over, the cause is the configuration
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelFormatError(f"the {name}'s config.json describes no network that can be built: {reason}") from error
