"""What goes into the trainings of denoiser, extractor and autoencoder: images, their order, and how images and weights are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from gladad.core.errors import DataError
from gladad.models.family import Pixels
from gladad.training.loop import LoopConfig

SAMPLED = 4096  # values of a weight, at least


def loop_config(settings: Any, **others: Any) -> LoopConfig:
    """The loop's settings: those of a training's own that have the same name, and others."""
    own = {field.name: getattr(settings, field.name) for field in fields(LoopConfig) if hasattr(settings, field.name)}
    return LoopConfig(**own | others)


def check_images(images: Sequence[Pixels]) -> None:
    """Refuse what is no set of images to train on.

    Raises:
        DataError: There are none, one is not ``[H, W, 3]`` uint8, or they differ in size.
    """
    if not images:
        raise DataError("there are no images to train on; give normal images of the product")
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"image {number} must be [H, W, 3] uint8, not {list(image.shape)} {image.dtype}")
    if len({image.shape for image in images}) > 1:
        raise DataError("images to train on must all be of the same size; resize them")


def image_of_sample(seed: int, number: int, count: int) -> int:
    """Which of ``count`` images the sample of this number in a training shows: each one once per epoch, in an order drawn for that."""
    epoch, place = divmod(number, count)
    return int(np.random.default_rng([seed, epoch]).permutation(count)[place])


def sha256_of_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (128 bits of it, in hexadecimal) of names, shapes and evenly spaced values, which are soon read even of a large network."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        values = tensor.detach().flatten()
        found.update(f"{name}:{tuple(tensor.shape)}".encode())
        found.update(values[:: max(1, len(values) // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:32]


def sha256_of_images(images: Sequence[Pixels]) -> str:
    """SHA-256 (128 bits of it, in hexadecimal) of the shapes and pixels of images, in their order."""
    found = hashlib.sha256()
    for image in images:
        found.update(str(image.shape).encode())
        found.update(np.ascontiguousarray(image).data)
    return found.hexdigest()[:32]
