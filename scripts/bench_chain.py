"""The published loop of Stable Diffusion against ours at each speed: work and time, side by side in one run.

    python scripts/bench_chain.py --base shared/golden --size 64 --images 4 --rounds 3
    python scripts/bench_chain.py --random sd14 --size 256 --images 1 --num-steps 1 --ways fast
    python scripts/bench_chain.py --random sd14 --size 512 --images 1 --precision bfloat16

``published`` is the loop as METHOD says the authors' program runs it: guidance on, the whole batch decoded and compared at every step while
one image is undecided, two decodes and two feature passes each. All get the same weights, images and noise. Work is what the networks were
asked for, counted by hooks: it is the same on every machine. ``--reached`` is the share of images whose gap reaches delta; 0 is the most
work, that of parts without a defect. With ``--random sd14`` a last table is for the paper's 25 steps: work counted with networks of no
size, times the seconds or operations of one image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTModel

from gladad.algorithm import ReconstructionConfig, image_noise
from gladad.core.records import no_progress
from gladad.core.tensors import to_tensor
from gladad.features.vit import DinoFeatures
from gladad.models.stable_diffusion.architectures import SD14, BaseConfigs, build_without_weights
from gladad.models.stable_diffusion.components import Components
from gladad.models.stable_diffusion.family import UNREACHABLE, usual_gap
from gladad.models.stable_diffusion.model import StableDiffusion
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.settings import SPEEDS, StableDiffusionConfig, StableDiffusionSettings

NETWORKS = ("denoiser", "decoder", "encoder", "extractor")
PAPER_STEPS, PAPER_SIZE = 25, 512
HOLLOW = BaseConfigs(  # the same work as of any other size
    unet={
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
    },
    vae={
        "block_out_channels": [4, 4, 4, 4],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    features={
        "model_type": "vit",
        "patch_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 1,
        "image_size": 64,
    },
)


def clock() -> float:
    """Seconds: with one thread those of the processor, which others on the machine do not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass
class Work:
    """What networks were asked for: calls, images in all of them, seconds."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NETWORKS, 0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NETWORKS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NETWORKS, 0.0))


@contextmanager
def counted(pipeline: GladPipeline) -> Iterator[Work]:
    """Count what a pipeline's networks are asked for within the block."""
    work, begun, hooks = Work(), dict.fromkeys(NETWORKS, 0.0), []
    parts = (pipeline.unet, pipeline.vae.decoder, pipeline.vae.encoder, pipeline.features)
    for name, network in zip(NETWORKS, parts, strict=True):

        def before(module: Any, given: Any, name: str = name) -> None:
            work.calls[name] += 1
            work.rows[name] += len(given[0])
            begun[name] = clock()

        def after(module: Any, given: Any, result: Any, name: str = name) -> None:
            work.seconds[name] += clock() - begun[name]

        hooks += [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Outcome:
    """What became of a batch: steps ``[B]``, scores ``[B]``."""

    steps: list[int]
    scores: list[float]


@torch.no_grad()
def published(pipeline: GladPipeline, images: Tensor, noise: Tensor, chain: ReconstructionConfig, guidance: float) -> Outcome:
    """The published program on a batch ``[B, 3, H, W]`` in [0, 1] with noise ``[B, 4, h, w]``, restated."""
    vae, unet, extractor = pipeline.vae, pipeline.unet, pipeline.features
    scale, alphas, dtype = vae.config.scaling_factor, pipeline.scheduler.alphas_cumprod, unet.dtype
    prompt, empty = (embeds.to(dtype).expand(len(images), -1, -1) for embeds in pipeline.prompt_embeds.chunk(2))

    def decode(latent: Tensor) -> Tensor:
        return vae.decode((latent / scale).to(dtype)).sample.float() / 2 + 0.5

    def searched(latent: Tensor) -> Tensor:
        return extractor(decode(latent), layers=extractor.default_layers[-1:], imagenet=False)[0]

    latent = vae.encode((images * 2 - 1).to(dtype)).latent_dist.mean.float() * scale
    stride = chain.max_step // chain.num_steps
    x = alphas[chain.max_step].sqrt() * latent + (1 - alphas[chain.max_step]).sqrt() * noise
    steps = [-1] * len(images)
    for t in range((chain.num_steps - 1) * stride + 1, 0, -stride):
        a, previous = alphas[t], alphas[max(t - stride, 0)]
        both = unet(torch.cat([x, x]).to(dtype), t, encoder_hidden_states=torch.cat([empty, prompt])).sample.float()
        without, given = both.chunk(2)
        predicted = without + guidance * (given - without)
        x0 = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        if -1 in steps:  # then all are decoded and compared
            reference = (a.sqrt() * latent + (1 - a).sqrt() * noise - (1 - a).sqrt() * predicted) / a.sqrt()
            gap = distance(searched(reference), searched(x0))
            mask = F.interpolate(torch.sigmoid(gap), latent.shape[-2:], mode="nearest")
            for number, score in enumerate(highest(gap, chain.top_k)):
                if steps[number] == -1 and score > chain.step_threshold:
                    x0[number] = (mask * x0 + (1 - mask) * reference)[number]
                    steps[number] = t
                elif steps[number] == -1 and t < chain.min_step:
                    x0[number], steps[number] = reference[number], t
        x = previous.sqrt() * x0 + (1 - previous).sqrt() * predicted
    size, total = (images.shape[-2], images.shape[-1]), torch.zeros(len(images), 1, *images.shape[-2:])
    for ours, theirs in zip(extractor(images), extractor(decode(x)), strict=True):
        total += F.interpolate(distance(ours, theirs), size, mode="bilinear", align_corners=True)
    return Outcome(steps, highest(blurred(total), 250))


def distance(features: Tensor, others: Tensor) -> Tensor:
    """Distance of every place to the nearest of the other ``[B, D, h, w]``: ``[B, 1, h, w]``."""
    ours, theirs = (F.normalize(each.flatten(2), dim=1) for each in (features, others))
    return (1 - (ours.mT @ theirs).amax(2)).unflatten(1, (1, *features.shape[-2:]))


def highest(values: Tensor, count: int) -> list[float]:
    """Mean of the largest values of each image."""
    flat = values.flatten(1)
    return flat.topk(min(count, flat.shape[1])).values.mean(1).tolist()


def blurred(maps: Tensor) -> Tensor:
    """Gaussian blur, sigma 6 and kernel 49."""
    kernel = torch.exp(-0.5 * (torch.arange(-24, 25) / 6.0) ** 2)
    kernel = kernel / kernel.sum()
    maps = F.conv2d(F.pad(maps, (24, 24, 24, 24), mode="reflect"), kernel.view(1, 1, 1, -1))
    return F.conv2d(maps, kernel.view(1, 1, -1, 1))


def ours(model: StableDiffusion, pixels: Sequence[Any]) -> Outcome:
    """Our inspections, one after the other."""
    found = [model.inspect(each) for each in pixels]
    return Outcome([each.step for each in found], [each.score for each in found])


def random_pipeline(configs: BaseConfigs, dtype: torch.dtype = torch.float32) -> GladPipeline:
    """Networks of these shapes with random weights."""
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**{key: value for key, value in configs.features.items() if key != "model_type"}), add_pooling_layer=False)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    networks = Components(
        AutoencoderKL.from_config(configs.vae), UNet2DConditionModel.from_config(configs.unet), scheduler, DinoFeatures(vit)
    )
    return GladPipeline.of(networks, torch.randn(2, 77, configs.unet["cross_attention_dim"])).to(dtype)


def models(pipeline: GladPipeline, pixels: Sequence[Any], num_steps: int, reached: float) -> dict[str, StableDiffusion]:
    """A model for each way to inspect, whose deltas let a share of the images stop early."""
    base = StableDiffusionSettings(guidance_scale=9.0, reconstruction=ReconstructionConfig(num_steps=num_steps))
    size = (pixels[0].shape[0], pixels[0].shape[1])
    made = {}
    for name, speed, guidance in (("exact, guided", "exact", 9.0), *((speed, speed, 1.0) for speed in SPEEDS)):
        settings = replace(base, speed=speed, guidance_scale=guidance)
        own = GladPipeline.of(Components(pipeline.vae, pipeline.unet, pipeline.scheduler, pipeline.features), pipeline.prompt_embeds)
        model = StableDiffusion(StableDiffusionConfig(settings=settings, image_size=size), own)
        delta = usual_gap(model, pixels, "", no_progress, 1 - reached) if reached else UNREACHABLE
        settings = replace(settings, reconstruction=replace(settings.reconstruction, step_threshold=delta))
        made[name] = StableDiffusion(replace(model.config, settings=settings, latent_deltas=dict.fromkeys(SPEEDS, delta)), own)
    return made


def ways(pipeline: GladPipeline, pixels: Sequence[Any], num_steps: int, reached: float) -> dict[str, Callable[[], Outcome]]:
    """Name -> what inspects all images."""
    made = models(pipeline, pixels, num_steps, reached)
    chain = made["exact, guided"].config.chain
    images = torch.stack([to_tensor(each) for each in pixels])
    noise = image_noise((pipeline.vae.config.latent_channels, images.shape[-2] // 8, images.shape[-1] // 8), 0).expand(
        len(images), -1, -1, -1
    )
    found: dict[str, Callable[[], Outcome]] = {"published": lambda: published(pipeline, images, noise, chain, 9.0)}
    return found | {name: lambda model=model: ours(model, pixels) for name, model in made.items()}


def table(title: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> None:
    """Print a table."""
    print(f"\n{title}\n{'':16}" + "".join(f"{column:>18}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:16}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base", type=Path, help="folder with sd and dino")
    source.add_argument("--random", choices=["sd14", "hollow"], help="networks of this size with random weights")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=PAPER_STEPS)
    parser.add_argument("--reached", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of networks with random weights")
    parser.add_argument("--ways", nargs="+", help="only these")
    chosen = parser.parse_args()
    if chosen.base is None:
        pipeline = random_pipeline({"sd14": SD14, "hollow": HOLLOW}[chosen.random], getattr(torch, chosen.precision))
    else:
        pipeline = GladPipeline.from_base(chosen.base, local_files_only=True)
    pixels = list(np.random.default_rng(0).integers(0, 256, (chosen.images, chosen.size, chosen.size, 3), dtype=np.uint8))
    run = {name: way for name, way in ways(pipeline, pixels, chosen.num_steps, chosen.reached).items() if name in (chosen.ways or [name])}
    times: dict[str, list[float]] = {name: [] for name in run}
    unit = dict.fromkeys(NETWORKS, 0.0)
    done: dict[str, tuple[Work, Outcome]] = {}
    for turn in range(chosen.rounds):
        for name, way in run.items():
            begin = clock()
            with counted(pipeline) as work:
                outcome = way()
            times[name].append(clock() - begin)
            done.setdefault(name, (work, outcome))
            if turn == 0:
                unit |= {network: work.seconds[network] / work.rows[network] for network in NETWORKS if work.rows[network]}
    show(chosen, times, done, unit)


def show(chosen: Any, times: Mapping[str, Sequence[float]], done: Mapping[str, tuple[Work, Outcome]], unit: Mapping[str, float]) -> None:
    """Print work, times, and what the paper's 25 steps would take."""
    first, count = next(iter(times)), chosen.images
    rows = {}
    for name, own in times.items():
        work, outcome = done[name]
        each = np.array(own) / count
        ratio = np.median(np.array(times[first]) / np.array(own))
        same = sum(a == b for a, b in zip(outcome.steps, done[first][1].steps, strict=True))
        cells = [f"{work.rows[network] / count:.1f} ({work.calls[network]})" for network in NETWORKS]
        rows[name] = [*cells, f"{np.median(each):.3f}", f"{each.min():.3f}-{each.max():.3f}", f"{ratio:.2f}x", f"{same}/{count}"]
    title = f"{chosen.images} images of {chosen.size} px, {chosen.num_steps} steps, {chosen.rounds} rounds; images (calls) of each network"
    table(title, rows, [*NETWORKS, "s/image", "spread", "ratio", "same steps"])
    seconds = {network: f"{value:.3g} s" for network, value in unit.items()}
    print("\none image:", ", ".join(f"{network} {value}" for network, value in seconds.items()))
    if chosen.random == "sd14":
        expect(chosen.size, unit)


def expect(size: int, unit: Mapping[str, float]) -> None:
    """Print what an image without a defect takes on the paper's chain, by the seconds of one image and by operations."""
    hollow, rows = random_pipeline(HOLLOW), {}
    for name, way in ways(hollow, [np.zeros((64, 64, 3), dtype=np.uint8)], PAPER_STEPS, 0.0).items():
        with counted(hollow) as work:
            way()
        rows[name] = work.rows
    costs = [unit, operations(size), operations(PAPER_SIZE)]
    cells = {}
    for name, own in rows.items():
        cells[name] = [str(own[network]) for network in NETWORKS]
        for cost in costs:
            total, theirs = (sum(each[network] * cost[network] for network in NETWORKS) for each in (own, rows["published"]))
            cells[name] += [f"{total:.1f}", f"{theirs / total:.2f}x"]
    title = f"expected of a part without a defect, {PAPER_STEPS} steps: images of each network, and these times what one takes"
    columns = [f"s, {size} px", "ratio", f"TFLOP, {size} px", "ratio", f"TFLOP, {PAPER_SIZE} px", "ratio"]
    table(title, cells, [*NETWORKS, *columns])


def operations(size: int) -> dict[str, float]:
    """10^12 floating-point operations of each network for one square image of so many pixels a side, counted without weights."""
    unet, vae, features = build_without_weights(SD14, torch.float32, torch.float32)
    image, latent = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, 4, size // 8, size // 8, device="meta")
    context, timestep = torch.empty(1, 77, SD14.unet["cross_attention_dim"], device="meta"), torch.empty(1, device="meta")
    calls = (lambda: unet(latent, timestep, context), lambda: vae.decoder(latent), lambda: vae.encoder(image), lambda: features(image))
    found = {}
    for network, call in zip(NETWORKS, calls, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        found[network] = counter.get_total_flops() / 1e12
    return found


if __name__ == "__main__":
    main()
