"""Time and peak memory of the full-size base: python scripts/bench_scale.py BASE [--case NAME].

BASE is a Stable Diffusion folder with its extractor, such as scripts/random_base.py writes. Each case runs in a process of its own. The
step search decides at its first probe, or goes on until min_step ("long search"), which is the most that it can cost. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from gladad.core.settings import with_values
from gladad.models.stable_diffusion.architectures import read_configs
from gladad.models.stable_diffusion.components import Sources, locate_base
from gladad.models.stable_diffusion.family import UNREACHABLE
from gladad.models.stable_diffusion.memory import plan_inspection, plan_training
from gladad.models.stable_diffusion.model import StableDiffusion
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.settings import StableDiffusionConfig, StableDiffusionSettings
from gladad.models.stable_diffusion.training import FinetuneConfig, TrainedProduct, finetune_denoiser
from gladad.training.loop import DTYPES

CASES = {
    "inspect-256": ("inspect", 256, 1.0, 0.0),
    "inspect-256-guided": ("inspect", 256, 9.0, 0.0),
    "inspect-256-long-search": ("inspect", 256, 1.0, UNREACHABLE),
    "lora-256": ("train", 256, 1.0, 0.0),
    "inspect-512": ("inspect", 512, 1.0, 0.0),
    "inspect-512-guided": ("inspect", 512, 9.0, 0.0),
    "inspect-512-long-search": ("inspect", 512, 1.0, UNREACHABLE),
}
"""Name -> kind, pixels, guidance, delta."""
PRECISION = "bfloat16"
STEPS = 3


def picture(size: int) -> np.ndarray:
    """An image ``[size, size, 3]`` of any content."""
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def inspect(base: str, size: int, guidance: float, delta: float) -> float:
    """Seconds of an inspection with 25 steps, from a picture to its map."""
    pipeline = GladPipeline.from_base(base, torch_dtype=DTYPES[PRECISION])
    values = {"guidance_scale": guidance, "training.precision": PRECISION, "reconstruction.step_threshold": delta}
    config = StableDiffusionConfig(settings=with_values(StableDiffusionSettings(), values), image_size=(size, size))
    detector = StableDiffusion(config, pipeline)
    started = time.perf_counter()
    detector.inspect(picture(size))
    return time.perf_counter() - started


def train(base: str, size: int) -> float:
    """Seconds of a step of training an adapter, one image at a time, the last of a few."""
    pipeline = GladPipeline.from_base(base, torch_dtype=DTYPES[PRECISION])
    config = FinetuneConfig(batch_size=1, precision=PRECISION, pool=1)
    stamps: list[float] = []

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "denoiser":
            stamps.append(time.perf_counter())

    finetune_denoiser(pipeline, {"": TrainedProduct([picture(size)], pipeline.prompt_embeds[:1])}, config, STEPS, progress=tell)
    return stamps[-1] - stamps[-2]


def planned(base: str, name: str) -> float:
    """GiB that the plan says the case needs."""
    kind, size, guidance, _ = CASES[name]
    configs = read_configs(locate_base(Sources(base)))
    if kind == "train":
        plan = plan_training(configs, FinetuneConfig(batch_size=1, precision=PRECISION), (size, size))
    else:
        plan = plan_inspection(configs, (size, size), PRECISION, guidance=guidance > 1)
    return plan["total"] / 2**30


def main() -> None:
    """Run one case, or all and print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--case", choices=CASES)
    arguments = parser.parse_args()
    if arguments.case:
        kind, size, guidance, delta = CASES[arguments.case]
        seconds = inspect(arguments.base, size, guidance, delta) if kind == "inspect" else train(arguments.base, size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak": peak, "threads": torch.get_num_threads()}))
        return
    print("| case | seconds | peak RSS, GiB | planned, GiB | threads |\n|---|---|---|---|---|", flush=True)
    for name in CASES:
        command = [sys.executable, __file__, arguments.base, "--case", name]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        print(
            f"| {name} | {found['seconds']:.1f} | {found['peak']:.2f} | {planned(arguments.base, name):.2f} | {found['threads']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
