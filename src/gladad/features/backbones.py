"""Backbones of transformers as feature extractors: whatever its ``AutoBackbone`` knows, from a folder or the Hub, safetensors only.

Which maps are taken follows from their strides, which one pass without data tells. A plain vision transformer has a single one: its maps
are the outputs at each third of its depth. Any other backbone gives, for each of the strides 4, 8 and 16 that it has, the last map of
that stride. So there are three levels as a rule, as many as EfficientNet-Lite0 has.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoBackbone, AutoConfig

from gladad.core.errors import ModelFormatError
from gladad.core.inference import fast_dtype
from gladad.features.extractor import IMAGENET_MEAN, IMAGENET_STD, Extractor, Identity, Level, files_sha256, missing_weights

STRIDES = (4, 8, 16)
PROBE_SIDE = 448
"""Pixels per side of the image that tells the strides: a multiple of the usual patches and windows."""
WEIGHTS = "model*.safetensors"


class TransformersBackbone(Extractor):
    """A frozen backbone of transformers, from a folder with ``config.json`` and safetensors.

    ``preprocessor_config.json`` tells mean and deviation of images, ImageNet's if absent.

    Raises:
        ModelFormatError: The folder does not hold a complete backbone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path, identity: Identity, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.identity, self._folder = identity, folder
        try:
            self.network, self.levels = _load(folder, dtype)
            processor = folder / "preprocessor_config.json"
            usual = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
            stated = usual | (json.loads(processor.read_text(encoding="utf-8")) if processor.is_file() else {})
            for name in ("mean", "std"):
                self.register_buffer(name, torch.tensor(stated[f"image_{name}"]).view(1, 3, 1, 1), persistent=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelFormatError(f"{identity.name} cannot be read as a feature extractor (safetensors only): {reason}") from error
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps of ``[B, 3, H, W]`` RGB in [0, 1], sides multiples of `size_multiple`: one ``[B, channels, h, w]`` per level."""
        pixels = (image.float() - self.mean) / self.std
        return list(self.network(pixels.to(self.network.dtype)).feature_maps)

    def fast(self) -> Self:
        """A copy in `gladad.core.inference.fast_dtype`; read again, because transformers knows what has to stay float32."""
        return type(self)(self._folder, self.identity, fast_dtype(self.mean.device)).to(self.mean.device)


def load_backbone(name: str, revision: str | None = None, offline: bool = False) -> TransformersBackbone:
    """Find and load a backbone; arguments and errors as of `gladad.features.extractor.load_extractor`."""
    folder, commit = Path(name), None
    if not folder.is_dir():
        which = f"{name} at revision {revision}" if revision else name
        where = "in the local cache of the Hub" if offline else "a reachable Hugging Face repository"
        complaint = f"{which} is neither a folder nor {where}; check the name of the features"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ModelFormatError(complaint)
        try:
            wanted = ["config.json", "preprocessor_config.json", "model.safetensors.index.json", WEIGHTS]
            folder = Path(snapshot_download(name, revision=revision, local_files_only=offline, allow_patterns=wanted))
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise ModelFormatError(complaint) from error
        commit = folder.name
    weights = sorted(folder.glob(WEIGHTS))
    if not weights:
        raise ModelFormatError(f"{name} holds no {WEIGHTS}; features are read from safetensors only")
    return TransformersBackbone(folder, Identity(name=name, revision=commit, sha256=files_sha256(weights)))


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, tuple[Level, ...]]:
    """The model, told which of its maps to give, and their levels."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.out_indices = list(range(len(getattr(config, "stage_names", ()))))
    with torch.device("meta"), torch.no_grad():
        try:
            probe = cast(Any, AutoBackbone).from_config(config).eval()
        except ValueError as error:
            raise ValueError(f"its type {config.model_type!r} is not a backbone of transformers") from error
        shapes = [tuple(maps.shape) for maps in probe(torch.empty(1, 3, PROBE_SIDE, PROBE_SIDE)).feature_maps]
    levels = [Level(channels, round(PROBE_SIDE / width)) for _, channels, _, width in shapes]
    strides = [level.stride for level in levels]
    if len(set(strides)) == 1:
        depth = len(levels) - 1  # the first map is of the patches, before any layer
        chosen = sorted({max(1, round(depth * third / 3)) for third in (1, 2, 3)})
    else:
        chosen = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES if stride in strides]
    if not chosen:
        raise ValueError(f"its maps have strides of {', '.join(map(str, strides))} pixels, and none of 4, 8 or 16")
    config.out_indices = chosen
    network, info = type(probe).from_pretrained(
        folder, config=config, use_safetensors=True, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    if missing := missing_weights(info):
        raise ValueError(missing)
    return network, tuple(levels[index] for index in chosen)
