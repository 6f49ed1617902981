"""Baseline: a PatchCore-like memory bank (arXiv 2106.08265) on exactly the features of the ``lite`` base.

A random sample of the standardised feature vectors of the good images is the memory. The anomaly map is the distance of every
vector of an image to its nearest one in memory, upsampled and blurred; the score is the mean of its 250 largest pixels. Same
images, sizes, features, blur and score as ``lite``, so that a difference between the two is the diffusion's.

    python scripts/memory_bank.py CATEGORY [CATEGORY ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gladad.algorithm import gaussian_blur, top_k_mean
from gladad.data import category_samples, good_images
from gladad.detector import FitSettings, Glad
from gladad.efficientnet import EfficientNetLite0, pretrained
from gladad.evaluation import EVALUATION_SIZE
from gladad.feature_space import stack_features
from gladad.images import load_image, load_mask, resize_pixels, to_tensor
from gladad.metrics import image_metrics, pixel_metrics

MEMORY = 20_000
BLUR = 4.0
TOP_K = 250


def features(trunk: EfficientNetLite0, paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """``[N, C, h, w]`` float16."""
    grid = (size[0] // 8, size[1] // 8)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(paths), 16):
            batch = [to_tensor(resize_pixels(load_image(p), size)) for p in paths[start : start + 16]]
            parts.append(stack_features(trunk, torch.stack(batch), grid).half())
    return torch.cat(parts)


def memory_bank(category: Path, seed: int = 0) -> dict[str, float]:
    """Metrics of the memory bank on one category, under the names that ``gladad evaluate`` uses."""
    started = time.perf_counter()
    train = good_images(category)[: FitSettings().max_images]
    size = Glad.from_base("lite").working_size(train)
    trunk = pretrained()
    normal = features(trunk, train, size).permute(0, 2, 3, 1).flatten(0, 2)
    mean, std = normal.float().mean(0), normal.float().std(0) + 1e-5
    keep = torch.randperm(len(normal), generator=torch.Generator().manual_seed(seed))[:MEMORY]
    memory = (normal[keep].float() - mean) / std
    squares = memory.square().sum(1)
    fit_seconds = time.perf_counter() - started

    samples = category_samples(category)
    maps, scores, seconds = [], [], []
    for sample in samples:
        begin = time.perf_counter()
        query = features(trunk, [sample.image_path], size)[0].float()
        rows = (query.flatten(1).T - mean) / std
        nearest = (squares - 2 * rows @ memory.T).amin(dim=1) + rows.square().sum(1)
        cells = nearest.clamp_min(0).sqrt().view(1, 1, *query.shape[1:])
        upsampled = F.interpolate(cells, size, mode="bilinear", align_corners=False)
        raw = gaussian_blur(upsampled, BLUR, 2 * int(4 * BLUR) + 1)
        scores.append(float(top_k_mean(raw, TOP_K)))
        maps.append(F.interpolate(raw, EVALUATION_SIZE, mode="bilinear", align_corners=False)[0, 0].numpy())
        seconds.append(time.perf_counter() - begin)
    labels = np.array([s.gt_label for s in samples])
    metrics = image_metrics(np.array(scores), labels)
    masked = [i for i, s in enumerate(samples) if s.gt_label == 0 or s.mask_path is not None]
    if any(samples[i].mask_path for i in masked):
        masks = [
            np.zeros(EVALUATION_SIZE, bool) if samples[i].mask_path is None else load_mask(samples[i].mask_path, EVALUATION_SIZE)
            for i in masked
        ]
        metrics |= pixel_metrics(np.stack([maps[i] for i in masked]), np.stack(masks))
    return metrics | {"fit_seconds": fit_seconds, "seconds_per_image": float(np.median(seconds))}


def main() -> None:
    """Print the metrics of each category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("categories", type=Path, nargs="+")
    for category in parser.parse_args().categories:
        metrics = memory_bank(category)
        print(category.name, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)


if __name__ == "__main__":
    main()
