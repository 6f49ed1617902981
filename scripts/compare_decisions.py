"""Scores and decisions of several models on the same images: those of an exported model beside the one that it was made from, above all.

    python scripts/compare_decisions.py MODEL OTHER [OTHER ...] --images FOLDER [FOLDER ...] [--most 500]

Images are taken evenly from all that lie below the folders. For every other model: the median and the largest relative difference of its
scores from the first model's, and the images that are decided otherwise, each model by its own threshold. It ends with 1 if there are any.
With ``GLADAD_FLOAT32=1`` features of transformers are computed in float32, as exported models do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gladad import Glad
from gladad.data.samples import MASK_FOLDERS, evenly, images_outside


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect and print; returns 1 if an image is decided otherwise, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--most", type=int, default=500)
    options = parser.parse_args(arguments)
    if len(options.models) < 2:
        parser.error("give at least two models")
    there = [path for folder in options.images for path in images_outside(folder, MASK_FOLDERS)]
    if not there:
        parser.error("there are no images below these folders")
    paths = [there[place] for place in evenly(len(there), options.most)]
    scores, rejected = np.zeros((len(options.models), len(paths))), np.zeros((len(options.models), len(paths)), dtype=np.bool_)
    for row, detector in enumerate(map(Glad.from_pretrained, options.models)):
        for column, path in enumerate(paths):
            found = detector.inspect(path, reconstruct=False)
            scores[row, column], rejected[row, column] = found.pred_score, found.pred_label
    print(f"{len(paths)} images, {rejected[0].sum()} of them rejected by {options.models[0].name}")
    for model, own, decided in zip(options.models[1:], scores[1:], rejected[1:], strict=True):
        apart, other = np.abs(own / scores[0] - 1), np.flatnonzero(decided != rejected[0])
        print(
            f"{model.name}: scores differ by {np.median(apart):.1e} (median), {apart.max():.1e} (at most); {len(other)} decided otherwise"
        )
        for place in other:
            print(f"  {paths[place]}: {scores[0, place]:.6g} and {own[place]:.6g}")
    return int((rejected != rejected[0]).any())


if __name__ == "__main__":
    sys.exit(main())
