"""How near do adapters come to training all weights? python scripts/compare_adapters.py. Prints a table; some minutes on one core.

A tiny denoiser with random weights is trained on one product, as a stand-in for a pre-trained base, and then adapted to another product in
the same number of steps by each method; each method has the learning rate that is best for it of those tried.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import draw_part
from tiny_base import build_base

from gladad.core.images import resize_pixels
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training import FinetuneConfig, TrainedProduct, finetune_denoiser

BEFORE, STEPS, LAST, MOST = 300, 120, 20, 600
NEAR = 1.1
"""A loss that is at most so many times that of all weights is near it."""
PLAIN = FinetuneConfig(method="full", precision="float32", pool=50, gradient_checkpointing=False)
METHODS = {
    "all weights": ({"method": "full"}, (3e-4, 1e-3)),
    "attention, rank 16": ({"method": "lora"}, (3e-3, 1e-2)),
    "all layers, rank 4": ({"method": "lora", "layers": "all", "rank": 4}, (3e-3, 1e-2)),
    "all layers, rank 16": ({"method": "lora", "layers": "all"}, (3e-3, 1e-2)),
    "all layers, rank 32": ({"method": "lora", "layers": "all", "rank": 32}, (3e-3, 1e-2)),
}


def main() -> None:
    """Train the stand-in, then adapt it in every way."""
    known = [resize_pixels(np.asarray(draw_part(number)[0]), (64, 64)) for number in range(12)]
    other = [np.ascontiguousarray(np.rot90(255 - image)) for image in known]
    with tempfile.TemporaryDirectory() as name:
        base = build_base(Path(name) / "base")
        first = GladPipeline.from_base(base)
        trained = finetune_denoiser(first, {"": TrainedProduct(known, first.prompt_embeds[:1])}, replace(PLAIN, learning_rate=1e-3), BEFORE)
        weights = {key: value.clone() for key, value in first.unet.state_dict().items()}
        print(f"the stand-in's loss: {np.mean(trained.losses[-LAST:]):.4f}\n")
        print("| method | learning rate | loss | of all weights' | steps to come within 10 % |\n|---|---|---|---|---|")
        reference = None
        for method, (changes, rates) in METHODS.items():

            def adapt(rate: float, steps: int, changes: dict[str, Any] = changes) -> list[float]:
                pipeline = GladPipeline.from_base(base)
                pipeline.unet.load_state_dict(weights)
                config = replace(PLAIN, learning_rate=rate, **changes)
                return finetune_denoiser(pipeline, {"": TrainedProduct(other, pipeline.prompt_embeds[:1])}, config, steps).losses

            loss, rate = min((float(np.mean(adapt(rate, STEPS)[-LAST:])), rate) for rate in rates)
            reference = reference or loss
            means = np.convolve(adapt(rate, MOST), np.ones(LAST) / LAST, "valid")
            near = np.flatnonzero(means <= NEAR * reference)
            steps = str(near[0] + LAST) if len(near) else f"more than {MOST}"
            print(f"| {method} | {rate:g} | {loss:.4f} | {loss / reference:.2f} | {steps} |", flush=True)


if __name__ == "__main__":
    main()
