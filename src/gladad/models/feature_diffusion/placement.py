"""How parts lie: whether turned or shifted copies of the good images are normal too, by what other good images say."""

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


def turned(pixels: Pixels, cell: int) -> list[Pixels]:
    """The image ``[H, W, 3]`` by a quarter, a half and three quarters of a turn; by a half if it is no square."""
    turns = (1, 2, 3) if pixels.shape[0] == pixels.shape[1] else (2,)
    return [np.ascontiguousarray(np.rot90(pixels, count)) for count in turns]


def shifted(pixels: Pixels, cell: int) -> list[Pixels]:
    """The image shifted by half a cell of ``cell`` pixels to the right, downwards, and both, with repeated borders."""
    step, (height, width) = cell // 2, pixels.shape[:2]
    return [np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), mode="edge")[:height, :width] for dy, dx in ((0, step), (step, 0), (step, step))]


KINDS: dict[str, Callable[[Pixels, int], list[Pixels]]] = {"turned": turned, "shifted": shifted}


def with_copies(images: Sequence[Pixels], kinds: Sequence[str], cell: int) -> tuple[list[Pixels], list[int]]:
    """The images followed by their copies of some kinds, and for each the number of the image it is of."""
    shown, of = list(images), list(range(len(images)))
    for kind in kinds:
        for number, pixels in enumerate(images):
            copies = KINDS[kind](pixels, cell)
            shown += copies
            of += [number] * len(copies)
    return shown, of


@torch.no_grad()
def tried_copies(
    images: Sequence[Pixels],
    others: Sequence[Pixels],
    features: Callable[[Sequence[Pixels]], Tensor],
    space: FeatureSpace,
    memory: int,
    cell: int,
    seed: int,
) -> dict[str, float]:
    """Try every kind of copies.

    A memory of the images and their copies is compared with one of as many vectors of the images alone. Copies of parts that lie still
    only take the place of better vectors; copies of parts that move or turn bring the memory nearer to images it does not know.

    Args:
        images: ``[H, W, 3]`` uint8 normal images.
        others: Normal images that are not among them.
        features: Images -> features ``[N, C, h, w]``.
        space: Is fitted on them.
        memory: Vectors of a memory.
        cell: Pixels per side of a cell.
        seed: Of the choice of vectors.

    Returns:
        Kind -> mean squared distance of the other images to the memory with such copies, relative to that without.
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

    before, found = distance(rows), {}
    for kind in KINDS:
        copies = [copy for pixels in chosen for copy in KINDS[kind](pixels, cell)]
        found[kind] = distance(torch.cat([rows, _rows(space(features(copies)))])) / max(before, 1e-12)
    return found


def wanted(found: dict[str, float]) -> list[str]:
    """The kinds of copies that pay."""
    return [kind for kind, ratio in found.items() if ratio < 1 - GAIN]


def _rows(latent: Tensor) -> Tensor:
    return latent.permute(0, 2, 3, 1).flatten(0, 2)


def reasons(found: dict[str, float]) -> dict[str, str]:
    """What was decided about every kind of copies and why, for people."""
    told = {}
    for kind, ratio in found.items():
        change = f"the memory {'nearer to' if ratio < 1 else 'farther from'} good images it does not know by {abs(1 - ratio):.1%}"
        told[kind] = f"{'learnt' if ratio < 1 - GAIN else 'not learnt'}: they bring {change}; {GAIN:.0%} nearer is asked for"
    return told
