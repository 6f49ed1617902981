"""Speed and memory of the pixel metrics: AUPRO against the direct loop over 200 thresholds, and a pass over many large maps.

    python scripts/bench_metrics.py [--images 500] [--side 512]

The direct loop is the form in which AUPRO is usually found, with scikit-image (``pip install scikit-image``; left out when it is not
there): for each threshold and mask the regions are labelled and the share of each that the map covers is taken. With SciPy's labelling
and with the labelling taken out of the loop it is faster, and still the same loop.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
from scipy import ndimage

from gladad.metrics.image import aupro
from gladad.metrics.pixel import PixelMetrics

try:
    from skimage import measure
except ImportError:
    measure = None

EIGHT = np.ones((3, 3))


def scene(rng: np.random.Generator, side: int, defective: bool) -> tuple[np.ndarray, np.ndarray]:
    """A smooth noisy map and a mask of a few discs, on which the map is higher."""
    rows, columns = np.ogrid[:side, :side]
    mask = np.zeros((side, side), bool)
    if defective:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, side, 2)
            mask |= (rows - y) ** 2 + (columns - x) ** 2 < (side * rng.uniform(0.02, 0.1)) ** 2
    noise = ndimage.zoom(rng.normal(size=(side // 8, side // 8)).astype(np.float32), 8, order=1)
    return noise + rng.normal(0, 0.1, (side, side)).astype(np.float32) + 1.5 * mask.astype(np.float32), mask


def direct_aupro(maps: np.ndarray, masks: np.ndarray, way: str, max_fpr: float = 0.3, steps: int = 200) -> float:
    """The loop over thresholds."""
    thresholds = np.linspace(maps.min(), maps.max(), steps)
    labelled = [ndimage.label(mask, EIGHT) for mask in masks] if way == "once" else []
    rates, overlaps = [], []
    for threshold in thresholds:
        flagged = maps >= threshold
        found = []
        for index, mask in enumerate(masks):
            if way == "skimage":
                for region in measure.regionprops(measure.label(mask, connectivity=2)):
                    found.append(flagged[index][region.coords[:, 0], region.coords[:, 1]].sum() / region.area)
                continue
            regions, count = labelled[index] if way == "once" else ndimage.label(mask, EIGHT)
            found += [flagged[index][regions == number].mean() for number in range(1, count + 1)]
        overlaps.append(np.mean(found))
        rates.append((flagged & ~masks).sum() / (~masks).sum())
    order = np.argsort(rates)
    x, y = np.array(rates)[order], np.array(overlaps)[order]
    inside = x < max_fpr
    x, y = np.append(x[inside], max_fpr), np.append(y[inside], np.interp(max_fpr, x, y))
    return float(np.trapezoid(y, x) / max_fpr)


def timed(function, *arguments) -> tuple[float, float]:
    """Seconds and value of a call."""
    started = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - started, value


def pass_over(images: int, side: int) -> None:
    """One pass in this process; prints seconds of the metrics alone, their values, and peak memory."""
    rng = np.random.default_rng(0)
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = 0.0
    with PixelMetrics() as metrics:
        for index in range(images):
            anomaly_map, mask = scene(rng, side, defective=index % 2 == 0)
            seconds += timed(metrics.add, anomaly_map, mask)[0]
        more, result = timed(metrics.compute)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    values = f"{result.metrics['pixel_auroc']:.6f} | {result.metrics['pixel_aupro']:.6f}"
    print(f"| {seconds + more:.1f} s | {peak:.2f} GiB ({bare:.2f} before) | {values} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        pass_over(arguments.images, arguments.side)
        return

    rng = np.random.default_rng(1)
    scenes = [scene(rng, 256, defective=index % 2 == 0) for index in range(100)]
    maps, masks = (np.stack(part) for part in zip(*scenes, strict=True))
    ours = [timed(aupro, maps, masks) for _ in range(5)]
    mine = float(np.median([seconds for seconds, _ in ours]))
    print("AUPRO of 100 maps of 256x256\n\n| way | value | seconds | ratio |\n|---|---|---|---|")
    print(f"| gladad, exact | {ours[0][1]:.6f} | {mine:.2f} | 1 |", flush=True)
    ways = {"skimage": "scikit-image", "scipy": "SciPy", "once": "SciPy, labelled once"}
    for way, name in ways.items():
        if way == "skimage" and measure is None:
            continue
        seconds, value = timed(direct_aupro, maps, masks, way)
        print(f"| direct loop, 200 thresholds, {name} | {value:.6f} | {seconds:.1f} | {seconds / mine:.0f} |", flush=True)

    print(f"\nAll pixel metrics of {arguments.images} maps of {arguments.side}x{arguments.side}, in a process of its own\n")
    print("| seconds | peak memory | pixel AUROC | AUPRO |\n|---|---|---|---|", flush=True)
    command = [sys.executable, __file__, "--only", "--images", str(arguments.images), "--side", str(arguments.side)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
