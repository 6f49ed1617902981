"""A training of a tiny base in a process of its own, which tests and scripts may kill: it prints a line per step.

python train_worker.py BASE RUN_FOLDER OUTPUT_FOLDER [--steps 60] [--batch 2] [--every 5] [--method lora]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from conftest import draw_part
from safetensors.torch import save_file

from gladad.core.errors import Interrupted
from gladad.core.images import resize_pixels
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.training import FinetuneConfig, TrainedProduct, finetune_denoiser
from gladad.training.loop import TrainingRun

SIDE = 32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--method", default="full")
    arguments = parser.parse_args(argv)
    pipeline = GladPipeline.from_base(arguments.base)
    images = [resize_pixels(np.asarray(draw_part(seed)[0]), (SIDE, SIDE)) for seed in range(6)]
    config = FinetuneConfig(method=arguments.method, batch_size=arguments.batch, learning_rate=1e-3, precision="float32", pool=6, ema=0.9)
    run = TrainingRun(folder=arguments.folder, checkpoint_every=arguments.every, tracker="none", sample_every=10**6)

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "denoiser":
            print(f"step {done}", flush=True)

    try:
        products = {"": TrainedProduct(images, pipeline.prompt_embeds[:1])}
        trained = finetune_denoiser(pipeline, products, config, arguments.steps, run=run, progress=tell)
    except Interrupted as stop:
        print(stop, flush=True)
        return 128 + stop.signal
    if int(os.environ.get("RANK", "0")) == 0:
        arguments.output.mkdir(parents=True, exist_ok=True)
        save_file(pipeline.unet.state_dict(), arguments.output / "weights.safetensors")
        (arguments.output / "losses.json").write_text(json.dumps(trained.losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
