"""Measure a training that goes on against what it replaces: new thresholds, and a fit from the start.

    python scripts/bench_continue.py CATEGORY [--old 150] [--new 30] [--light 1.2] [--test 60] [--no-anew]

A detector learns so many good images; then the light changes, and people call some parts under the new light good. What each way makes of
new good parts under the old and the new light, and of defects under both, goes to standard output as a table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gladad.core.images import load_image
from gladad.data.layouts import labelled_samples, training_images
from gladad.detector.glad import Glad
from gladad.metrics.image import auroc


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("category", type=Path)
    parser.add_argument("--old", type=int, default=150, help="good images of the first fit")
    parser.add_argument("--new", type=int, default=30, help="good images under the new light")
    parser.add_argument("--light", type=float, default=1.2, help="that all levels are multiplied by")
    parser.add_argument("--test", type=int, default=60, help="good and as many bad images to judge by, under each light")
    parser.add_argument("--anew", action=argparse.BooleanOptionalAction, default=True, help="fit from the start, too")
    chosen = parser.parse_args()
    paths = training_images(chosen.category, "auto", None)
    if len(paths) < chosen.old + chosen.new:
        raise SystemExit(f"{chosen.category}: {len(paths)} good images, {chosen.old + chosen.new} are needed")
    samples = labelled_samples(chosen.category)
    sides = {kind: [s.image_path for s in samples if bool(s.gt_label) is kind][: chosen.test] for kind in (False, True)}
    with tempfile.TemporaryDirectory(prefix="gladad-bench-") as name:
        new = []
        for path in paths[chosen.old : chosen.old + chosen.new]:
            new.append(Path(name) / f"{path.stem}.png")
            Image.fromarray(lit(load_image(path), chosen.light)).save(new[-1])
        old = paths[: chosen.old]
        settings = {"training.keep_latents": True, "false_reject_rate": 0.05}
        rows = [("first fit", *timed(lambda: Glad.from_base("lite", settings=settings).fit(old)))]
        rows[0][1].save_pretrained(Path(name) / "model")
        held_out = rows[0][1]._fitted.seen.held_out

        def again() -> Glad:
            return Glad.from_pretrained(Path(name) / "model")

        rows.append(("new thresholds", *timed(lambda: again().calibrate([*old, *new]))))
        rows.append(("continued", *timed(lambda: again().extend([*old, *new]))))
        if chosen.anew:
            rows.append(("fit from the start", *timed(lambda: Glad.from_base("lite", settings=settings).fit([*old, *new]))))
    print(f"{len(held_out)} of {len(old)} images held out at first; {len(new)} under {chosen.light:g} times the light called good\n")
    print("| | seconds | good rejected, old light | new light | bad found, old light | new light | AUROC, old light | new light |")
    print("|---|---|---|---|---|---|---|---|")
    for way, detector, seconds in rows:
        found = {(kind, light): judged(detector, sides[kind], light) for kind in (False, True) for light in (1.0, chosen.light)}
        shares = [f"{sum(s > 1 for s in found[each])} of {len(found[each])}" for each in found]
        curves = [f"{area(found[False, light], found[True, light]):.3f}" for light in (1.0, chosen.light)]
        print(f"| {way} | {seconds:.0f} | {' | '.join([*shares, *curves])} |", flush=True)


def timed(work: Any) -> tuple[Glad, float]:
    """A detector, and the seconds that it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def lit(pixels: np.ndarray, light: float) -> np.ndarray:
    """Under another light."""
    return (pixels * light).clip(0, 255).round().astype(np.uint8)


def judged(detector: Glad, paths: list[Path], light: float) -> list[float]:
    """Scores."""
    return [detector.inspect(lit(load_image(path), light), reconstruct=False).pred_score for path in paths]


def area(good: list[float], bad: list[float]) -> float:
    """AUROC."""
    return auroc(good + bad, [0] * len(good) + [1] * len(bad))


if __name__ == "__main__":
    main()
