"""Patch features of a self-supervised vision transformer (DINO, arXiv 2104.14294), as the paper compares images with.

The extractor is transformers' ViT and nothing else: the folder it is saved to is a plain ViT folder, and any plain ViT folder loads.
Three things differ from ``ViTModel.forward``: images are RGB in [0, 1] and are normalised inside; block outputs are returned *before*
the final layer norm; and position embeddings are resized as the original DINO code does it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor
from transformers import ViTModel
from transformers.models.vit.modeling_vit import ViTEmbeddings

from gladad.errors import ConfigError, ModelFormatError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    """Patch features of a ViT.

    Saved and loaded like any component of a diffusers pipeline, but its folder is the plain ViT's. (A subclass of ``ViTModel`` would not
    do: transformers reads older checkpoints, DINO's among them, into its own classes only.)

    Args:
        vit: The transformer; its position embeddings are taken over by `DinoEmbeddings`.
    """

    def __init__(self, vit: ViTModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        embeddings = DinoEmbeddings(vit.config).to(vit.dtype)
        embeddings.load_state_dict(vit.embeddings.state_dict())
        vit.embeddings = embeddings
        self.vit = vit
        patch_size: Any = vit.config.patch_size
        self.patch_size = int(patch_size)  # side of a patch in pixels
        self.depth = vit.config.num_hidden_layers

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a ViT folder or Hub id, from safetensors only.

        Raises:
            ModelFormatError: Weights are missing: transformers alone would draw them at random and go on.
        """
        kept = {key: kwargs[key] for key in ("revision", "local_files_only", "cache_dir", "token") if key in kwargs}
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
        loaded: Any = ViTModel.from_pretrained(
            folder, add_pooling_layer=False, use_safetensors=True, dtype=dtype, output_loading_info=True, **kept
        )
        vit, info = loaded
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if missing:
            raise ModelFormatError(f"{folder} is not a complete ViT: {len(missing)} weights are missing or misshapen, such as {missing[0]}")
        model = cls(vit)
        model.eval()  # type: ignore[attr-defined]
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the plain ViT folder: ``config.json`` and ``model.safetensors``."""
        self.vit.save_pretrained(save_directory)

    @property
    def default_layers(self) -> tuple[int, ...]:
        """Blocks at each quarter of the depth, counted from 1: the paper's 3, 6, 9, 12 of ViT-B."""
        return tuple(sorted({max(1, self.depth * quarter // 4) for quarter in (1, 2, 3, 4)}))

    def forward(self, image: Tensor, layers: Sequence[int] | None = None, imagenet: bool = True) -> list[Tensor]:
        """Features of every patch, from several depths.

        Args:
            image: ``[B, 3, H, W]`` RGB in [0, 1]; H and W are multiples of the patch size.
            layers: Blocks to return, counted from 1; None means `default_layers`.
            imagenet: Normalise by ImageNet's mean and deviation. False maps to [-1, 1] instead, which is what the paper's step
                search feeds the extractor.

        Returns:
            One float32 ``[B, D, h, w]`` per layer, before the final layer norm, without the class token.

        Raises:
            ConfigError: A side is not a multiple of the patch size, or a layer does not exist.
        """
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"the feature extractor needs image sides that are multiples of {self.patch_size}, got {height}x{width} (height x width)"
            )
        layers = self.default_layers if layers is None else layers
        if not all(1 <= layer <= self.depth for layer in layers):
            raise ConfigError(f"feature layers must lie in 1...{self.depth}, got {list(layers)}")
        pixels = imagenet_normalise(image) if imagenet else image * 2 - 1
        hidden = self.vit(pixels.to(self.vit.dtype), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        grid = (height // self.patch_size, width // self.patch_size)
        return [hidden[layer][:, 1:].float().transpose(1, 2).unflatten(2, grid) for layer in layers]
