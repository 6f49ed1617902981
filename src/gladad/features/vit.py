"""Patch features of a self-supervised vision transformer, as the paper compares images with.

Three architectures serve: DINO's ViT (arXiv 2104.14294), which the paper uses, DINOv2 (arXiv 2304.07193), and DINOv2 with registers
(arXiv 2309.16588). The extractor is the transformers model and nothing else: the folder it is saved to is a plain one of that model, and
any such folder loads. Three things differ from the model's own call: images are RGB in [0, 1] and are normalised inside; block outputs
are returned *before* the final layer norm, for the patches only; and a ViT's position embeddings are resized as the original DINO code
does it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import Dinov2Model, Dinov2WithRegistersModel, PreTrainedConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTEmbeddings

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.features.extractor import IMAGENET_MEAN, IMAGENET_STD, missing_weights

Transformer = ViTModel | Dinov2Model | Dinov2WithRegistersModel
TRANSFORMERS: dict[str, Any] = {"vit": ViTModel, "dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
"""The model of each ``model_type`` that a folder's ``config.json`` may name."""


def imagenet_normalise(image: Tensor) -> Tensor:
    """RGB ``[B, 3, H, W]`` in [0, 1] -> zero mean and unit variance over ImageNet."""
    mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


class DinoEmbeddings(ViTEmbeddings):
    """Patch, class and position embeddings; the latter resized with DINO's ``scale_factor``."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings ``[1, 1 + h * w, D]`` for an image of ``height`` x ``width`` pixels.

        DINO asks for a *scale* of ``(n + 0.1) / sqrt(N)`` rather than a size of ``n`` (0.1 guards its rounding). The sampling points
        move with it, by enough to change the embedding by a tenth of its amplitude, so the pre-trained weights need just this.
        """
        side = round((self.position_embeddings.shape[1] - 1) ** 0.5)
        patch: Any = self.patch_size
        rows, columns = height // patch, width // patch
        if (rows, columns) == (side, side):
            return self.position_embeddings
        cls, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.view(1, side, side, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


class DinoFeatures(ModelMixin):
    """Patch features of a ViT or a DINOv2.

    Saved and loaded like any component of a diffusers pipeline, but its folder is the plain transformer's. (A subclass of ``ViTModel``
    would not do: transformers reads older checkpoints, DINO's among them, into its own classes only.)

    DINOv2's position embeddings are those of 518 px (37 x 37 patches of 14); at other sizes transformers resizes them. With registers it
    does so as the original code does. Without, the original asks for a scale of ``(n + 0.1) / 37``, as DINO does, and transformers for the
    size: sampling points then differ by up to a tenth of a patch, and features are not quite the original's.
    """

    def __init__(self, vit: Transformer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if isinstance(vit, ViTModel):
            embeddings = DinoEmbeddings(vit.config).to(vit.dtype)
            embeddings.load_state_dict(vit.embeddings.state_dict())
            vit.embeddings = embeddings
        self.vit = vit
        self.architecture: str = vit.config.model_type
        patch_size: Any = vit.config.patch_size
        self.patch_size = int(patch_size)  # side of a patch in pixels
        self.depth = vit.config.num_hidden_layers
        self.special_tokens = 1 + getattr(vit.config, "num_register_tokens", 0)  # class token and registers, which precede the patches

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load the folder or Hub id of a ViT or a DINOv2 (``model_type`` in its ``config.json``), from safetensors only.

        Raises:
            ModelFormatError: It is another type of model; or weights are missing: transformers alone would draw them at random and go on.
        """
        kept: dict[str, Any] = {key: kwargs[key] for key in ("revision", "local_files_only", "cache_dir", "token") if key in kwargs}
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
        model_type = PreTrainedConfig.get_config_dict(folder, **kept)[0].get("model_type")
        if model_type not in TRANSFORMERS:
            known = f"{', '.join(TRANSFORMERS)} (model_type in its config.json)"
            raise ModelFormatError(f"{folder} is a model of type {model_type!r}; a feature extractor must be of type {known}")
        kind = TRANSFORMERS[model_type]
        if kind is ViTModel:
            kept["add_pooling_layer"] = False
        vit, info = kind.from_pretrained(folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **kept)
        if missing := missing_weights(info):
            raise ModelFormatError(f"{folder} is not a complete {kind.__name__.removesuffix('Model')}: {missing}")
        model = cls(vit)
        model.eval()  # type: ignore[attr-defined]
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the transformer's plain folder: ``config.json`` and ``model.safetensors``."""
        self.vit.save_pretrained(save_directory)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """Blocks at each quarter of the depth, counted from 1: the paper's 3, 6, 9, 12 of ViT-B."""
        return tuple(sorted({max(1, self.depth * quarter // 4) for quarter in (1, 2, 3, 4)}))

    def nearest_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The ``(height, width)`` nearest to ``size`` in multiples of the patch, one at least; the larger halfway between two."""
        height, width = (max(1, (side + self.patch_size // 2) // self.patch_size) * self.patch_size for side in size)
        return height, width

    def mlp_parameters(self, blocks: Sequence[int]) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of the MLPs of some blocks, counted from 1, which fine-tuning trains: from the first block to the last.

        Layer norms before and layer scales after an MLP (DINOv2) are not among them.

        Raises:
            ConfigError: A block does not exist.
        """
        self._check_blocks(blocks, "MLPs to train")
        stack = "vit.layers" if self.architecture == "vit" else "vit.encoder.layer"
        found: list[tuple[str, nn.Parameter]] = []
        for block in sorted(set(blocks)):
            name = f"{stack}.{block - 1}.mlp"
            found += self.get_submodule(name).named_parameters(prefix=name)  # type: ignore[attr-defined]
        return found

    def forward(self, image: Tensor, layers: Sequence[int] | None = None, imagenet: bool = True) -> list[Tensor]:
        """Features of every patch, from several depths.

        Args:
            image: ``[B, 3, H, W]`` RGB in [0, 1]; H and W are multiples of the patch size.
            layers: Blocks to return, counted from 1; None means `default_layers`.
            imagenet: Normalise by ImageNet's mean and deviation. False maps to [-1, 1] instead, as the paper's step search does.

        Returns:
            One float32 ``[B, D, h, w]`` per layer, before the final layer norm, without the class token and registers.

        Raises:
            ConfigError: A side is not a multiple of the patch size, or a layer does not exist.
        """
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            needed = f"image sides that are multiples of {self.patch_size}"
            raise ConfigError(f"the feature extractor needs {needed}, got {height}x{width} (height x width)")
        layers = self.default_layers if layers is None else layers
        self._check_blocks(layers, "feature layers")
        pixels = imagenet_normalise(image) if imagenet else image * 2 - 1
        options = {"interpolate_pos_encoding": True} if self.architecture == "vit" else {}  # DINOv2 does so without being asked
        hidden = self.vit(pixels.to(self.vit.dtype), output_hidden_states=True, **options).hidden_states
        grid = (height // self.patch_size, width // self.patch_size)
        return [hidden[layer][:, self.special_tokens :].float().transpose(1, 2).unflatten(2, grid) for layer in layers]

    def _check_blocks(self, blocks: Sequence[int], what: str) -> None:
        if not all(1 <= block <= self.depth for block in blocks):
            raise ConfigError(f"{what} must lie in 1...{self.depth}, got {list(blocks)}")
