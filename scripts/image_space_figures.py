"""What step search and fusion do on labelled test images, as figures: ``python scripts/image_space_figures.py MODEL CATEGORY -o FOLDER``.

MODEL is a fitted model in the paper's form, CATEGORY a product with test images. The folder then holds ``records.json`` (a record per
image), ``numbers.md`` and

* ``gaps.png``: how far generated and input content differ along the chain, good and bad parts, with delta;
* ``steps.png``: the chosen step against area and contrast of the defect (with masks only);
* ``sizes.png``: image AUROC of small, middle and large defects, for fixed steps and for the search (with masks only);
* ``reconstructions.jpg``: the input, what fixed steps and the chosen one make of it, and the fusion mask, of twelve images: good parts and
  bad ones of the lowest and the highest scores. It shows the data set's own images: mind its licence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation
from scipy.stats import spearmanr
from torch import Tensor

from gladad.algorithm import fusion_mask, patch_distance, top_k_mean
from gladad.algorithm.schedule import chain_timesteps
from gladad.core.images import load_image, load_mask, resize_pixels
from gladad.core.records import Sample
from gladad.core.tensors import to_pixels, to_tensor
from gladad.data.samples import category_samples
from gladad.detector.glad import Glad
from gladad.metrics.image import auroc
from gladad.models.stable_diffusion.family import UNREACHABLE
from gladad.models.stable_diffusion.model import StableDiffusion

SEARCH = "ADS"
DPI = 80
SHOWN = 3  # good and bad images of the lowest, and of the highest scores
GROUPS = ("small", "middle", "large")
COLOURS = {"good": "#2a78b5", "bad": "#c0392b"}


class Listening:
    """The networks, keeping what the search compared last."""

    def __init__(self, networks: Any):
        self.networks, self.pair = networks, ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.networks, name)

    def latent_features(self, latent: Tensor) -> Tensor:
        """As the networks' own: of the input's content, and after it of the generated."""
        found: Tensor = self.networks.latent_features(latent)
        self.pair = found.chunk(2)
        return found


def ways(model: StableDiffusion, steps: Sequence[int]) -> dict[str, StableDiffusion]:
    """The model with each fixed step, and with the search, which is listened to."""
    settings = model.config.settings
    fixed = {
        f"fixed {step}": model.adjusted(
            replace(settings, reconstruction=replace(settings.reconstruction, max_step=step, adaptive=False, fusion="none"))
        )
        for step in steps
    }
    model.pipeline = Listening(model.pipeline)
    return fixed | {SEARCH: model}


def gaps(model: StableDiffusion, pixels: np.ndarray) -> list[float]:
    """The gap at each step of a search that nothing ends."""
    image = to_tensor(resize_pixels(pixels, model.image_size))[None].to(model.pipeline.device)
    whole = replace(model.config.chain, step_threshold=UNREACHABLE, search_stride=1)
    return model.rebuild(image, whole).trace[0].tolist()


def last_mask(model: StableDiffusion) -> np.ndarray:
    """The fusion mask ``[h, w]`` in [0, 1] of the image that was inspected last."""
    chain = model.config.chain
    gap = patch_distance(*model.pipeline.pair)
    differs = bool(top_k_mean(gap, chain.top_k) > chain.step_threshold)
    mask = fusion_mask(gap, chain) if differs else torch.zeros_like(gap)
    return mask[0, 0].cpu().numpy()


def defect(sample: Sample, pixels: np.ndarray) -> dict[str, float]:
    """Share of the image that the defect covers, and how far its mean colour is from that around it, in [0, 1]; nothing without a mask."""
    if sample.mask_path is None:
        return {}
    mask = load_mask(sample.mask_path, pixels.shape[:2])
    if not mask.any():
        return {}
    around = binary_dilation(mask, iterations=max(3, pixels.shape[0] // 40)) & ~mask
    contrast = np.abs(pixels[mask].mean(axis=0) - pixels[around].mean(axis=0)).mean() / 255
    return {"area": float(mask.mean()), "contrast": float(contrast)}


def record(sample: Sample, models: Mapping[str, StableDiffusion]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What is said of one image, and its pictures: the input, what each way makes of it, and the mask."""
    pixels = load_image(sample.image_path)
    trace = gaps(models[SEARCH], pixels)
    found = {name: model.inspect(pixels) for name, model in models.items()}
    mask = last_mask(models[SEARCH])
    size = models[SEARCH].image_size
    pictures = [resize_pixels(pixels, size), *(resize_pixels(to_pixels(each.latent[0]), size) for each in found.values())]
    grey = np.asarray(Image.fromarray(np.rint(mask * 255).astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST))
    facts = {"image": sample.image_path.name, "kind": sample.defect_type, "gt_label": sample.gt_label, "step": found[SEARCH].step}
    scores = {name: each.score for name, each in found.items()}
    return facts | {"trace": trace, "scores": scores} | defect(sample, pixels), [*pictures, np.repeat(grey[..., None], 3, axis=2)]


def draw_gaps(records: Sequence[Mapping[str, Any]], timesteps: Sequence[int], delta: float, file: Path) -> None:
    """Gap along the chain, a line per image."""
    figure = Figure((6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("good", 0), ("bad", 1)):
        lines = np.array([each["trace"] for each in records if each["gt_label"] == label])
        axes.plot(timesteps, lines.T, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        axes.plot(timesteps, np.median(lines, axis=0), color=COLOURS[name], linewidth=2.2, label=f"{name}, median")
    axes.axhline(delta, color="black", linestyle="--", linewidth=1, label="delta")
    axes.set(xlabel="timestep (the chain goes from left to right)", ylabel="gap, mean of 10 places", xlim=(max(timesteps), min(timesteps)))
    axes.legend()
    figure.savefig(file, dpi=DPI)


def draw_steps(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Chosen step against area and contrast of the defect."""
    figure = Figure((8, 3.5), layout="constrained")
    jitter = np.random.default_rng(0).uniform(-6, 6, len(records))  # many images share a step
    for place, (name, label) in enumerate(
        (("area", "share of the image that the defect covers"), ("contrast", "contrast to its surroundings"))
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.scatter([each[name] for each in records], [each["step"] for each in records] + jitter, s=12, color=COLOURS["bad"], alpha=0.7)
        axes.set(xlabel=label, ylabel="chosen timestep")
    figure.savefig(file, dpi=DPI)


def by_size(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Way -> image AUROC of each third of the defects by area, against all good parts."""
    bad = sorted((each for each in records if "area" in each), key=lambda each: each["area"])
    good = [each for each in records if not each["gt_label"]]
    found: dict[str, dict[str, float]] = {name: {} for name in records[0]["scores"]}
    for group, some in zip(GROUPS, np.array_split(np.arange(len(bad)), len(GROUPS)), strict=True):
        chosen = [*good, *(bad[place] for place in some)]
        labels = [each["gt_label"] for each in chosen]
        for name, own in found.items():
            own[group] = auroc([each["scores"][name] for each in chosen], labels)
    return found


def draw_sizes(found: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Image AUROC by size of the defect."""
    figure = Figure((6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for name, own in found.items():
        axes.plot(GROUPS, [own[group] for group in GROUPS], marker="o", linewidth=2.2 if name == SEARCH else 1.2, label=name)
    axes.set(xlabel="defects, by area", ylabel="image AUROC")
    axes.legend()
    figure.savefig(file, dpi=DPI)


def draw_reconstructions(rows: Sequence[tuple[str, Sequence[np.ndarray]]], titles: Sequence[str], file: Path) -> None:
    """Rows of pictures with a heading for each column and a line above each row."""
    height, width = rows[0][1][0].shape[:2]
    picture = Image.new("RGB", (len(titles) * (width + 4), 18 + len(rows) * (height + 18)), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((column * (width + 4) + 2, 3), title, fill="black")
    for row, (name, pictures) in enumerate(rows):
        top = 18 + row * (height + 18)
        draw.text((2, top + 2), name, fill="black")
        for column, pixels in enumerate(pictures):
            picture.paste(Image.fromarray(pixels), (column * (width + 4), top + 16))
    picture.save(file, quality=82)


def numbers(records: Sequence[Mapping[str, Any]], delta: float, sizes: Mapping[str, Mapping[str, float]]) -> str:
    """The same in a few lines of Markdown."""
    labels = np.array([each["gt_label"] for each in records])
    steps = np.array([each["step"] for each in records])
    reached = np.array([max(each["trace"][:-1], default=0) > delta for each in records])
    lines = [f"delta {delta:.4f}", ""]
    for name, label in (("good", 0), ("bad", 1)):
        own = labels == label
        lines.append(f"* {name}: {own.sum()} images; delta reached by {reached[own].mean():.0%}; chosen step {_spread(steps[own])}")
    masked = [each for each in records if "area" in each]
    for name in ("area", "contrast") if len({each["step"] for each in masked}) > 1 else ():
        found = spearmanr([each["step"] for each in masked], [each[name] for each in masked])
        lines.append(f"* Spearman correlation of the chosen step with the defect's {name}: {found.statistic:.2f} (p = {found.pvalue:.2g})")
    columns = ["all", *(GROUPS if masked else ())]
    lines += ["", "| image AUROC | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, own in sizes.items():
        values = [auroc([each["scores"][name] for each in records], labels), *(own[group] for group in columns[1:])]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.0f} in the median (10 % {low:.0f}, 90 % {high:.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Inspect, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("category", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[350, 550, 750], help="fixed steps to compare with")
    given = parser.parse_args(arguments)
    model = Glad.from_pretrained(given.model).model_
    if not isinstance(model, StableDiffusion) or not model.config.chain.adaptive:
        parser.error(f"{given.model} is no model in the paper's form with a step search")
    models, samples = ways(model, given.steps), category_samples(given.category)
    given.output.mkdir(parents=True, exist_ok=True)
    records, pictures = [], []
    for number, sample in enumerate(samples):
        facts, own = record(sample, models)
        records.append(facts)
        pictures.append(own)
        print(f"\r{number + 1} of {len(samples)}", end="", flush=True)
    print()
    chain = model.config.chain
    timesteps = [t for t, _ in chain_timesteps(chain.max_step, chain.num_steps, chain.call_stride)][: len(records[0]["trace"])]
    draw_gaps(records, timesteps, chain.step_threshold, given.output / "gaps.png")
    masked = [each for each in records if "area" in each]
    sizes: Mapping[str, Mapping[str, float]] = {name: {} for name in models}
    if len(masked) >= len(GROUPS):
        draw_steps(masked, given.output / "steps.png")
        sizes = by_size(records)
        draw_sizes(sizes, given.output / "sizes.png")
    chosen: list[int] = []
    for label in (0, 1):
        order = sorted((n for n in range(len(records)) if records[n]["gt_label"] == label), key=lambda n: records[n]["scores"][SEARCH])
        chosen += list(dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]]))
    rows = [
        (f"{records[n]['kind']} {records[n]['image']}: step {records[n]['step']}, score {records[n]['scores'][SEARCH]:.3f}", pictures[n])
        for n in chosen
    ]
    draw_reconstructions(rows, ["input", *models, "fusion mask"], given.output / "reconstructions.jpg")
    text = numbers(records, chain.step_threshold, sizes)
    (given.output / "numbers.md").write_text(text, encoding="utf-8")
    (given.output / "records.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
