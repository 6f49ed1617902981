"""Tensors: of images, in safetensors files, and their digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from gladad.core.storage import content_digest, load_arrays, save_arrays


def to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """``uint8 [H, W, 3]`` -> ``float32 [3, H, W]`` in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255.0


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """``float [3, H, W]`` in [0, 1] -> ``uint8 [H, W, 3]``; values outside are clipped."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, see `gladad.core.storage.save_arrays`."""
    save_arrays(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, save_file)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors, see `gladad.core.storage.load_arrays`."""
    return load_arrays(path, load_file)


def tensors_digest(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) of a JSON-ready description and of tensors by their names."""
    arrays = {}
    for name, tensor in tensors.items():  # NumPy has no bfloat16
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        arrays[f"{name} {tensor.dtype} {tuple(tensor.shape)}"] = raw.numpy()
    return content_digest(description, arrays)
