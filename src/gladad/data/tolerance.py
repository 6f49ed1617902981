"""Changes of a picture that say nothing about the part: those that a fit is told to tolerate become part of what is normal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Tolerance = Literal["light", "noise", "focus", "compression", "shift"]

VARIANTS = 800
"""Made at most of all images, unless there are more images: each takes time and memory as an image does."""
# By group, the shifts of `gladad.data.corruptions` and the strength at which each does nothing; the other end is their severity 1.
GROUPS: dict[Tolerance, dict[str, Any]] = {
    "light": {"brightness": 0.0, "darkness": 0.0, "contrast": 1.0},
    "noise": {"gaussian_noise": 0.0},
    "focus": {"gaussian_blur": 0.0, "defocus_blur": (0.3, 0.1), "motion_blur": (0.3, 1.0)},
    "compression": {"jpeg_compression": 95},
    "shift": {"translation": 0.0, "rotation": 0.0},
}


def variant(pixels: Pixels, groups: Sequence[Tolerance], rng: np.random.Generator) -> Pixels:
    """An image ``[H, W, 3]`` uint8 under one random shift of one random group, between nothing and severity 1, strong ones more often."""
    from gladad.data.corruptions import SHIFTS  # late, with its scipy: inspection does without

    group = GROUPS[groups[int(rng.integers(len(groups)))]]
    name = sorted(group)[int(rng.integers(len(group)))]
    apply, strengths = SHIFTS[name]
    nothing, mild, share = group[name], strengths[0], math.sqrt(rng.uniform())
    between: Any = tuple(a + share * (b - a) for a, b in zip(nothing, mild, strict=True)) if isinstance(mild, tuple) else None
    if between is None:
        between = nothing + share * (mild - nothing)
    return apply(pixels, round(between) if isinstance(nothing, int) else between, rng)


def variants(images: Sequence[Pixels], groups: Sequence[Tolerance], seed: int) -> Iterator[tuple[Pixels, int]]:
    """Images under shifts of the groups in turns, each with the number of its image: one of each group, or fewer where there are many.

    Every image has at least one.
    """
    for turn in range(max(1, min(len(groups), VARIANTS // max(1, len(images))))):
        for number, pixels in enumerate(images):
            yield variant(pixels, [groups[(turn + number) % len(groups)]], np.random.default_rng((seed, 3, number, turn))), number


def versions(pixels: Pixels, groups: Sequence[Tolerance], seed: Sequence[int]) -> Iterator[Pixels]:
    """An image ``[H, W, 3]`` uint8 as it is, and under every shift of the groups in severity 1."""
    yield pixels
    if groups:
        from gladad.data.corruptions import corrupt  # late, with its scipy: inspection does without

        for place, name in enumerate(name for group in groups for name in GROUPS[group]):
            yield corrupt(pixels, name, 1, (*seed, place))
