"""Ablation of the method's parts on the ``lite`` base: what each of them adds, on real images.

    python scripts/ablation.py CATEGORY [CATEGORY ...]

Two denoisers are trained per category, with and without anomaly-oriented training (ATP), and the inspection variants run on them.
Deltas and usual energies are set anew for every variant on good images, as ``gladad fit`` does. With ``--models`` the denoiser
with ATP is taken from a folder of fitted models instead.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gladad.algorithm import OneCallConfig
from gladad.calibration import MIN_HELD_OUT
from gladad.data import category_samples, good_images, split_held_out
from gladad.detector import BASE_FOLDER, HELD_OUT_SHARE, MAX_HELD_OUT, FitSettings, Glad
from gladad.evaluation import EVALUATION_SIZE
from gladad.images import load_image, load_mask, resize_pixels
from gladad.lite import LiteBase, LiteConfig
from gladad.lite_training import LiteTrainingConfig, choose_recipe, fit_lite, measure_residuals
from gladad.metrics import image_metrics, pixel_metrics
from gladad.parallel import in_order
from gladad.storage import read_model_file
from gladad.types import no_progress

FIXED = OneCallConfig(timesteps=(), adaptive=False, fusion="none")  # no timesteps: those of the product's kind
VARIANTS = {
    **{f"fixed step t={t}": replace(FIXED, timesteps=(t,)) for t in (200, 300, 400, 500, 600)},
    "mean of the product's two": FIXED,
    "+ ADS": replace(FIXED, adaptive=True),
    "+ ADS + SAFF": replace(FIXED, adaptive=True, fusion="calibrated"),
    "mean of the product's two + SAFF": replace(FIXED, fusion="calibrated"),
}
WITHOUT_ATP = ("fixed step t=400", "mean of the product's two", "+ ADS")
"""Variants that are also run on the plain denoiser: which timestep is best there is not the question."""


def judge(base: LiteBase, category: Path) -> tuple[float, float | None]:
    """Image and pixel AUROC of a base on the test images."""
    samples = category_samples(category)
    scores, maps, masks = [], [], []
    inspections = in_order(lambda sample: base.inspect(load_image(sample.image_path)), samples, base.workers)
    for sample, inspection in zip(samples, inspections, strict=True):
        scores.append(inspection.score)
        if sample.gt_label == 0 or sample.mask_path is not None:
            raw = torch.from_numpy(inspection.map)[None, None]
            maps.append(F.interpolate(raw, EVALUATION_SIZE, mode="bilinear", align_corners=False)[0, 0].numpy())
            masks.append(np.zeros(EVALUATION_SIZE, bool) if sample.mask_path is None else load_mask(sample.mask_path, EVALUATION_SIZE))
    image = image_metrics(np.array(scores), np.array([s.gt_label for s in samples]))["image_auroc"]
    return image, pixel_metrics(np.stack(maps), np.stack(masks))["pixel_auroc"] if np.any(masks) else None


def saved(model: Path) -> tuple[Path, dict[str, object]]:
    """Folder and settings of a fitted model's base."""
    return model / BASE_FOLDER, read_model_file(model)["config"]


def main() -> None:
    """Train, vary, print a table per category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("categories", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=LiteTrainingConfig().steps)
    parser.add_argument("--models", type=Path, help="folder with one fitted model per category")
    arguments = parser.parse_args()
    for category in arguments.categories:
        settings = FitSettings()
        paths = good_images(category)[: settings.max_images]
        size = Glad.from_base("lite").working_size(paths)
        share = min(HELD_OUT_SHARE, MAX_HELD_OUT / len(paths))  # the images that a fit trains on
        images = [resize_pixels(load_image(path), size) for path in split_held_out(paths, share, MIN_HELD_OUT, settings.seed)[0]]
        print(f"\n{category.name}\n| denoiser | inspection | image AUROC | pixel AUROC |\n|---|---|---|---|", flush=True)
        for name, oriented in (("plain", False), ("ATP", True)):
            training = LiteTrainingConfig(steps=arguments.steps, anomaly_oriented=oriented)
            if oriented and arguments.models is not None:
                base = LiteBase.load(*saved(arguments.models / category.name))
            else:
                base = fit_lite(images, LiteConfig(image_size=size), training)
            for variant, reconstruction in VARIANTS.items():
                if not oriented and variant not in WITHOUT_ATP:
                    continue
                base.config = replace(LiteConfig(image_size=size), reconstruction=reconstruction)
                choose_recipe(base)
                measure_residuals(base, images, training, no_progress)
                image, pixel = judge(base, category)
                print(f"| {name} | {variant} | {image:.4f} | {'-' if pixel is None else f'{pixel:.4f}'} |", flush=True)


if __name__ == "__main__":
    main()
