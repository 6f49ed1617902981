"""Time of the inspection of one image alone and of many together, in this process.

    python scripts/bench_speed.py MODEL IMAGE [--side 256]

Prints milliseconds per image: medians in the steady state.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from gladad import Glad
from gladad.core.images import load_image, resize_pixels


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--side", type=int, default=256)
    arguments = parser.parse_args()
    detector = Glad.from_pretrained(arguments.model)
    pixels = resize_pixels(load_image(arguments.image), (arguments.side, arguments.side))
    for _ in range(5):
        detector.inspect(pixels, reconstruct=False)

    def once(count: int) -> float:
        begin = time.perf_counter()
        detector.predict([pixels] * count, reconstruct=False)
        return 1000 * (time.perf_counter() - begin) / count

    for count, repeats in ((1, 30), (32, 5)):
        print(f"{count} at a time: {np.median([once(count) for _ in range(repeats)]):.1f} ms per image")


if __name__ == "__main__":
    main()
