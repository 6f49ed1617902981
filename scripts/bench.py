"""The measured numbers of the README: detection against the memory bank, time and memory, through the commands a user types.

    python scripts/bench.py [--data DIR] [--steps N] [CATEGORY ...]

Prints one table of detection and one of speed. Categories that are not there are left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from memory_bank import memory_bank

CATEGORIES = ("metal_plate", "ball_screw", "magnetic_tile", "cubes")
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_aupro")


def run(*arguments: str) -> tuple[float, float]:
    """Run a gladad command; returns its seconds and its peak memory in GiB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gladad", *arguments, "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"gladad {' '.join(arguments)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def speed(model: Path, image: Path) -> dict[str, float]:
    """Milliseconds per image of 256x256: one alone, and in a folder of 32; medians, steady state."""
    from gladad import Glad
    from gladad.images import load_image, resize_pixels

    detector = Glad.from_pretrained(model)
    pixels = resize_pixels(load_image(image), (256, 256))
    for _ in range(5):
        detector.inspect(pixels, reconstruct=False)

    def once(count: int) -> float:
        begin = time.perf_counter()
        detector.predict([pixels] * count, reconstruct=False)
        return 1000 * (time.perf_counter() - begin) / count

    return {"alone": float(np.median([once(1) for _ in range(30)])), "batch of 32": float(np.median([once(32) for _ in range(5)]))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("categories", nargs="*", default=CATEGORIES)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("GLADAD_DATA", "../shared/data")))
    parser.add_argument("--steps", help="training steps; the default of gladad fit otherwise")
    parser.add_argument("--models", type=Path, help="keep the models in this folder")
    arguments = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models or Path(scratch)
        for name in arguments.categories:
            category = arguments.data / name
            if not category.is_dir():
                print(f"{category}: not there, left out", flush=True)
                continue
            model, report = models / name, Path(scratch) / f"{name}-report"
            extra = ["--steps", arguments.steps] if arguments.steps else []
            fit_seconds, fit_memory = run("fit", str(category), "-o", str(model), *extra)
            run("evaluate", str(model), str(category), "-o", str(report))
            ours = json.loads((report / "report.json").read_text())["metrics"]
            bank = memory_bank(category)
            rows.append((name, ours, bank, fit_seconds, fit_memory))
            pairs = "  ".join(f"{m} {ours[m]:.4f} (bank {bank[m]:.4f})" for m in METRICS if m in ours)
            print(f"{name}: {pairs}  fit {fit_seconds:.0f} s, {fit_memory:.2f} GiB", flush=True)
        if not rows:
            sys.exit("no category found; give --data")

        print("\n| category | image AUROC | pixel AUROC | pixel AP | AUPRO | recall | false rejects | fit | fit memory |\n|" + "---|" * 9)
        for name, ours, bank, seconds, memory in rows:
            cells = [f"{ours[m]:.3f} ({bank[m]:.3f})" if m in ours else "no masks" for m in METRICS]
            cells += [f"{ours['recall']:.2f}", f"{ours['false_reject_rate']:.3f}", f"{seconds:.0f} s", f"{memory:.1f} GiB"]
            print(f"| {name} | {' | '.join(cells)} |")
        mean_ours, mean_bank = (float(np.mean([row[k]["image_auroc"] for row in rows])) for k in (1, 2))
        print(f"| mean | {mean_ours:.3f} ({mean_bank:.3f}) |" + " |" * 7)
        print("\nIn brackets: the memory bank on the same features and images.")

        from gladad.data import category_samples

        first = rows[0][0]
        times = speed(models / first, category_samples(arguments.data / first)[0].image_path)
        print(f"\nInspection of a 256x256 image: {times['alone']:.1f} ms alone, {times['batch of 32']:.1f} ms in a batch of 32")
        print(f"Peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
