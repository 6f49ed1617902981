"""Whether turned copies of the good images are normal, by what other good images say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from gladad.core.tensors import to_tensor
from gladad.features.extractor import load_extractor
from gladad.features.space import FeatureSpace
from gladad.features.stack import FeatureStack
from gladad.models.feature_diffusion.placement import Pixels, pays, reason, try_turned, turned, with_turned

SIZE = 64


def parts(count: int, *, turn: bool, seed: int) -> list[Pixels]:
    """Pictures of one part without symmetry, all upright or each at an angle of its own."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        pixels = np.full((SIZE, SIZE, 3), 60.0)
        pixels[10:54, 14:24] = 200
        pixels[44:54, 14:48] = (120, 180, 90)
        pixels[16:26, 24:34] = (200, 80, 80)
        if turn:
            pixels = ndimage.rotate(pixels, rng.uniform(0, 360), reshape=False, order=1, mode="nearest")
        found.append((pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))
    return found


def trial(images: list[Pixels], others: list[Pixels]) -> float:
    stack = FeatureStack(load_extractor().fast(), (SIZE, SIZE))

    def features(chosen: list[Pixels]) -> torch.Tensor:
        return stack(torch.stack([to_tensor(pixels) for pixels in chosen])).half()

    return try_turned(images, others, features, FeatureSpace(stack.channels, 40, 0.5), 2000, 0)


def test_copies_of_parts_that_lie_at_any_angle_are_learnt() -> None:
    found = trial(parts(16, turn=True, seed=1), parts(8, turn=True, seed=2))
    assert pays(found)
    assert reason(found).startswith("turned copies are learnt: they bring the memory nearer to good images")


def test_copies_of_parts_that_lie_still_are_not() -> None:
    found = trial(parts(16, turn=False, seed=1), parts(8, turn=False, seed=2))
    assert not pays(found) and found > 1
    assert reason(found).startswith("turned copies are not learnt: they bring the memory farther from good images")


@pytest.mark.parametrize(("shape", "count"), [((32, 32, 3), 3), ((32, 48, 3), 1)])
def test_turned_copies_keep_the_size(shape: tuple[int, int, int], count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    copies = turned(pixels)
    assert len(copies) == count and all(copy.shape == shape for copy in copies)
    assert np.array_equal(copies[count // 2], pixels[::-1, ::-1])


def test_copies_follow_the_images_and_know_whose_they_are() -> None:
    images = parts(3, turn=False, seed=0)
    shown, of = with_turned(images)
    assert all(copy is image for copy, image in zip(shown[:3], images, strict=True))
    assert of == [0, 1, 2, *(number for number in (0, 1, 2) for _ in range(3))] and len(shown) == len(of)
