"""How parts lie: whether turned copies of the good images are normal too, by what other good images say.

Shifted copies would say nothing new: the memory does not ask where in an image a vector was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gladad.features.memory import Index, covering
from gladad.features.space import FeatureSpace

Pixels = NDArray[np.uint8]
TRIAL_IMAGES = 64  # good images whose copies are tried: more change little, and cost seconds
GAIN = 0.02  # copies must bring the memory nearer to the other images by this share: trials on one product differ by some .01


def turned(pixels: Pixels) -> list[Pixels]:
    """The image ``[H, W, 3]`` by a quarter, a half and three quarters of a turn; by a half if it is no square."""
    turns = (1, 2, 3) if pixels.shape[0] == pixels.shape[1] else (2,)
    return [np.ascontiguousarray(np.rot90(pixels, count)) for count in turns]


def with_turned(images: Sequence[Pixels]) -> tuple[list[Pixels], list[int]]:
    """The images followed by their turned copies, and for each the number of the image it is of."""
    shown, of = list(images), list(range(len(images)))
    for number, pixels in enumerate(images):
        copies = turned(pixels)
        shown += copies
        of += [number] * len(copies)
    return shown, of


@torch.no_grad()
def try_turned(
    images: Sequence[Pixels],
    others: Sequence[Pixels],
    features: Callable[[Sequence[Pixels]], Tensor],
    space: FeatureSpace,
    memory: int,
    seed: int,
) -> float:
    """Compare a memory of images and their turned copies with one of as many vectors of the images alone.

    Copies of parts that lie still only take the place of better vectors; copies of parts that lie at any angle bring the memory nearer to
    images it does not know.

    Args:
        images: ``[H, W, 3]`` uint8 normal images.
        others: Normal images that are not among them.
        features: Images -> features ``[N, C, h, w]``.
        space: Is fitted on them.
        memory: Vectors of a memory.
        seed: Of the choice of vectors.

    Returns:
        Mean squared distance of the other images to the memory with such copies, relative to that without.
    """
    chosen = list(images[:: -(-len(images) // TRIAL_IMAGES)])
    plain = features(chosen)
    space.fit([plain])
    queries = _rows(space(features(others[:TRIAL_IMAGES])))
    rows = _rows(space(plain))
    size = min(memory, len(rows))  # the memory without copies may hold everything; so may the other

    def distance(rows: Tensor) -> float:
        kept = rows[covering(rows, size, torch.Generator().manual_seed(seed))]
        return float(Index(kept).nearest(queries)[0].mean())

    copies = [copy for pixels in chosen for copy in turned(pixels)]
    return distance(torch.cat([rows, _rows(space(features(copies)))])) / max(distance(rows), 1e-12)


def pays(ratio: float) -> bool:
    """Whether turned copies are learnt."""
    return ratio < 1 - GAIN


def _rows(latent: Tensor) -> Tensor:
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def reason(ratio: float | None) -> str:
    """What was decided about turned copies and why, for people."""
    if ratio is None:
        return "turned copies were not tried"
    change = f"they bring the memory {'nearer to' if ratio < 1 else 'farther from'} good images it does not know by {abs(1 - ratio):.1%}"
    return f"turned copies are {'learnt' if pays(ratio) else 'not learnt'}: {change}; {GAIN:.0%} nearer is asked for"
