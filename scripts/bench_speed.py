"""Time of inspection by several models, side by side in one run.

    python scripts/bench_speed.py IMAGES MODEL [MODEL ...] [--rounds 5] [--count 12] [--no-processes]

Models take turns, round by round, so that what else the machine does meets them alike. Three tables, with ratios to the first model:
one image at a time in this process, as many at a time as the model uses cores for, and whole processes: ``gladad predict`` of one image,
and of all ``count``. Of exported models the parts are also timed alone: their sum is what an inspection cannot fall below.

In place of a model's folder ``efficientad`` stands for anomalib's EfficientAD (small) with random weights, which take as long as trained
ones, in float32 as anomalib runs it and at the size of the first model. Models of anomalib's PatchCore and PaDiM are folders
like others (``gladad fit --base anomalib-patchcore``). Both need ``pip install 'gladad[anomalib]'``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gladad import Glad
from gladad.core.images import list_images, load_image, resize_pixels
from gladad.core.tensors import to_tensor
from gladad.core.threads import in_order, one_thread
from gladad.models.exported.model import Exported


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--no-processes", action="store_true", help="leave out whole processes")
    arguments = parser.parse_args()
    paths = list_images(arguments.images)[: arguments.count]
    pixels = [load_image(path) for path in paths]
    names = [path.name for path in arguments.models]
    first = Glad.from_pretrained(arguments.models[0])
    size = first.model_.image_size
    others = [EfficientAd(size) if path.name == "efficientad" else Glad.from_pretrained(path) for path in arguments.models[1:]]
    detectors: list[Any] = [first, *others]
    turns, count = arguments.rounds, len(pixels)
    table(
        "one image, ms",
        names,
        rounds([lambda d=d: [d.inspect(each, reconstruct=False) for each in pixels] for d in detectors], turns),
        count,
    )
    table("of many, ms", names, rounds([lambda d=d: d.predict(pixels, reconstruct=False) for d in detectors], turns), count)
    for name, detector in zip(names, detectors, strict=True):
        if isinstance(detector, Glad) and isinstance(detector.model_, Exported):
            floor(name, detector.model_, pixels, turns)
    if arguments.no_processes:
        return
    for title, shown in (("predict of one image, ms", paths[:1]), (f"predict of {count} images, ms", paths)):
        folders = [path for path in arguments.models if path.name != "efficientad"]
        table(title, [path.name for path in folders], rounds([lambda m=m, s=shown: predict(m, s) for m in folders], turns), 1)


class EfficientAd:
    """anomalib's EfficientAD (small) with random weights, asked like a detector; each image on one thread, as gladad's are.

    Args:
        size: ``(H, W)`` in pixels.
    """

    def __init__(self, size: tuple[int, int]):
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

        self.size, self.model = size, EfficientAdModel(teacher_out_channels=384, model_size=EfficientAdModelSize.S).eval()

    @torch.inference_mode()
    def inspect(self, pixels: NDArray[np.uint8], reconstruct: bool = False) -> float:
        """The score of one image ``[H, W, 3]`` of any size."""
        with one_thread():
            return float(self.model(to_tensor(resize_pixels(pixels, self.size))[None]).pred_score)

    def predict(self, images: Sequence[NDArray[np.uint8]], reconstruct: bool = False) -> list[float]:
        """Scores of several images, as many at the same time as there are threads."""
        return list(in_order(self.inspect, images, torch.get_num_threads()))


def rounds(actions: Sequence[Callable[[], Any]], turns: int) -> list[list[float]]:
    """Milliseconds of every action in every turn, after one that is not counted."""
    found: list[list[float]] = [[] for _ in actions]
    for turn in range(turns + 1):
        for action, times in zip(actions, found, strict=True):
            begin = time.perf_counter()
            action()
            if turn:
                times.append(1000 * (time.perf_counter() - begin))
    return found


def table(title: str, names: Sequence[str], times: Sequence[Sequence[float]], share: int) -> None:
    """Median, least and largest of a share of the times, and the median ratio to the first name in the same round."""
    print(f"\n{title:32} {'median':>9} {'least':>9} {'largest':>9} {'ratio':>7}")
    for name, own in zip(names, times, strict=True):
        each, ratio = np.array(own) / share, np.median(np.array(times[0]) / np.array(own))
        print(f"{name:32} {np.median(each):9.1f} {each.min():9.1f} {each.max():9.1f} {ratio:6.2f}x")


def floor(name: str, model: Exported, pixels: Sequence[Any], turns: int) -> None:
    """Time of an exported model's parts, each alone and all scales one after the other, and of an inspection by all of them."""
    batches = [resize_pixels(each, model.image_size)[None] for each in pixels]

    def encode() -> list[list[Any]]:
        return [[encoder([each])[0] for encoder in model._encoders] for each in batches]

    def search() -> list[list[Any]]:
        return [[model._nearest(scale, latent) for scale, latent in enumerate(own)] for own in latents]

    def rebuild() -> list[list[Any]]:
        scales = (zip(model._denoisers, own, shown, strict=True) for own, shown in zip(latents, nearest, strict=True))
        return [[denoiser([latent, near])[0] for denoiser, latent, near in each] for each in scales]

    def measure() -> list[list[Any]]:
        return [list(map(model._magnitude, range(len(own)), own, found)) for own, found in zip(latents, rebuilt, strict=True)]

    latents = encode()
    nearest = search()
    rebuilt = rebuild()
    magnitudes = measure()
    parts = {
        "encoder": encode,
        "search": search,
        "denoiser": rebuild,
        "residuals": measure,
        "scorer": lambda: [model._scorer(own) for own in magnitudes],
        "all": lambda: [model.inspect(each) for each in pixels],
    }
    medians = {part: float(np.median(times)) / len(pixels) for part, times in zip(parts, rounds(list(parts.values()), turns), strict=True)}
    whole = medians.pop("all")
    shown = ", ".join(f"{part} {value:.1f}" for part, value in medians.items())
    print(f"\n{name}: {shown} ms alone; an inspection {whole:.1f} ms, {whole / sum(medians.values()):.2f} times their sum")


def predict(model: Path, images: Sequence[Path]) -> None:
    """One process of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gladad", "predict", str(model), *map(str, images), "-o", f"{folder}/out"]
        subprocess.run([*command, "--quiet", "--no-pictures"], check=True)


if __name__ == "__main__":
    main()
