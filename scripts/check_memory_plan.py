"""The computed memory of a training beside that of real steps on this machine's CPU.

    python scripts/check_memory_plan.py [--sd14]

Each case runs in a process of its own, in which a small training has loaded the program's code before: networks with random weights take
two steps of the real training loop, and the largest resident memory (``ru_maxrss``) less what was resident before the network was built is
the measured number. glibc is told to take every block of 64 KiB or more from the system and give it back at once
(``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``), and to keep one arena, so that what it holds back does not blur the comparison.
``--sd14`` measures LoRA of Stable Diffusion v1-4's denoiser instead. Only the denoiser is loaded.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gladad.algorithm import Schedule, add_noise, denoising_target, mix_anomaly
from gladad.core.settings import from_json, to_json
from gladad.models.stable_diffusion.adapters import add_adapter
from gladad.models.stable_diffusion.architectures import SD14, BaseConfigs, build_without_weights
from gladad.models.stable_diffusion.memory import TOKENS, plan_training
from gladad.models.stable_diffusion.training import FinetuneConfig
from gladad.training.loop import DTYPES, train

MIDDLE = SD14.unet | {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 256}  # 35 million parameters
SMALL = SD14.unet | {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32}
UNETS = {"small": SMALL, "middle": MIDDLE, "sd14": SD14.unet}
LITTLE_VAE = SD14.vae | {"block_out_channels": [4] * 4, "norm_num_groups": 4}
LITTLE_VIT = {"model_type": "vit", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
FACTOR = 8  # pixels per latent cell
MIB = 2**20


class RandomTask:
    """A denoiser and latents of random content."""

    def __init__(self, unet: Any, latent_size: Sequence[int]):
        self.unet = unet
        self.shape = (unet.config.in_channels, *latent_size)
        self.prompt = torch.randn(1, TOKENS, unet.config.cross_attention_dim)
        self.schedule = Schedule.scaled_linear()
        self.identity: dict[str, Any] = {}

    @property
    def module(self) -> nn.Module:
        """The denoiser."""
        return self.unet

    def loss(self, module: nn.Module, step: int, samples: Sequence[int]) -> Tensor:
        """The loss of a training, in which anything stands for images."""
        z_normal, z_anomalous, noise = (torch.randn(len(samples), *self.shape) for _ in range(3))
        timestep = torch.randint(self.schedule.num_timesteps, (len(samples),))
        alpha_bar = self.schedule.alpha_bar(timestep)
        x_t = add_noise(mix_anomaly(z_normal, z_anomalous, timestep, self.schedule.num_timesteps), noise, alpha_bar)
        prompts = self.prompt.to(self.unet.dtype).expand(len(samples), -1, -1)
        noise_pred = module(x_t.to(self.unet.dtype), timestep, encoder_hidden_states=prompts).sample
        return F.mse_loss(noise_pred.float(), denoising_target(x_t, z_normal, alpha_bar))

    def examples(self) -> dict[str, Any]:
        """None."""
        return {}


def measure(name: str, size: int, training: FinetuneConfig) -> int:
    """Bytes that a training needs in this process, for which there should be nothing else in it."""
    run("small", 64, training, steps=1)  # code is loaded at its first use
    gc.collect()
    before = psutil.Process().memory_info().rss
    run(name, size, training, steps=2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def run(name: str, size: int, training: FinetuneConfig, steps: int) -> None:
    """Train a network with random weights."""
    frozen = torch.float32 if training.method == "full" else DTYPES[training.precision]
    unet, _, _ = build_without_weights(configs(name), frozen, frozen)
    if training.method == "lora":
        add_adapter(unet, training.rank, training.layers)
    unet.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*unet.parameters(), *unet.buffers()):
            tensor.normal_(0, 0.02)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    train(RandomTask(unet, (size // FACTOR, size // FACTOR)), training.loop(steps, 0), stage="check")


def configs(name: str) -> BaseConfigs:
    """The denoiser with next to nothing beside it."""
    return BaseConfigs(UNETS[name], LITTLE_VAE, LITTLE_VIT)


def cases() -> list[tuple[int, FinetuneConfig]]:
    """Both kinds of training at two sizes, with and without gradient checkpointing, in two precisions."""
    return [
        (size, FinetuneConfig(method=method, batch_size=2, gradient_checkpointing=checkpointing, precision=precision, learning_rate=1e-5))
        for size, method, checkpointing, precision in itertools.product(
            (256, 512), ("lora", "full"), (True, False), ("bfloat16", "float32")
        )
    ]


def main() -> None:
    """Compute, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd14", action="store_true", help="LoRA of the full denoiser at 256 px; needs 3 GiB and minutes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, size, values = json.loads(arguments.case)
        print(measure(name, size, from_json(FinetuneConfig, values)))
        return
    name, trainings = "middle", cases()
    if arguments.sd14:
        name, trainings = "sd14", [(256, FinetuneConfig(batch_size=1))]
    print(f"{name}, on {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print("| size | training | checkpointing | precision | computed, MiB | measured, MiB | measured / computed | s |")
    print("|---|---|---|---|---|---|---|---|")
    for size, training in trainings:
        begin = time.monotonic()
        case = json.dumps([name, size, to_json(training)])
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
        measured = int(done.stdout.split()[-1])
        computed = plan_training(configs(name), training, (size, size))["total"]
        row = [f"{size} px", training.method, "on" if training.gradient_checkpointing else "off", training.precision]
        row += [f"{computed / MIB:.0f}", f"{measured / MIB:.0f}", f"{measured / computed:.2f}", f"{time.monotonic() - begin:.0f}"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
