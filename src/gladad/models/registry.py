"""The bases a detector can stand on, by name: how each is trained, adjusted and loaded. The detector itself asks nothing of a name."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gladad.core.errors import ConfigError
from gladad.core.processes import process_count
from gladad.core.records import Inspection, Progress
from gladad.core.settings import from_json, validated
from gladad.data.synthesis import Foreground
from gladad.decision.conformal import check_rate
from gladad.models.baselines.anomalib import AnomalibBase, AnomalibConfig, fit_anomalib
from gladad.models.baselines.memory_bank import MemoryBank, MemoryBankConfig, fit_memory_bank
from gladad.models.feature_diffusion.model import LiteBase, LiteConfig
from gladad.models.feature_diffusion.training import LiteTrainingConfig, adjust_lite, fit_lite, fit_lite_multi_class
from gladad.models.stable_diffusion.architectures import read_configs
from gladad.models.stable_diffusion.components import locate_base
from gladad.models.stable_diffusion.device import available_memory, choose_device
from gladad.models.stable_diffusion.memory import Plan, check_fits, plan_training
from gladad.models.stable_diffusion.model import PaperBase, PaperConfig, fit_paper
from gladad.models.stable_diffusion.pipeline import DEFAULT_PROMPT, GladPipeline
from gladad.models.stable_diffusion.presets import MULTI_CLASS, Preset, category_preset, load_preset
from gladad.models.stable_diffusion.training import PAPER, FinetuneConfig
from gladad.training.loop import DTYPES, TrainingRun

Pixels = NDArray[np.uint8]
BASELINES = ("memory-bank", "anomalib-patchcore", "anomalib-padim")
"""Bases without diffusion, to compare with."""
FEATURE_BASES = ("lite", *BASELINES)
"""Bases over the same EfficientNet features, which work at the images' own proportions."""
DEFAULT_STEPS = 4000
"""Optimiser steps of a diffusers base: the paper's for MVTec AD and MPDD."""


class Base(Protocol):
    """What the detector needs of a base."""

    @property
    def kind(self) -> str:
        """Name of its form on disk."""
        ...

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""
        ...

    @property
    def config(self) -> Any:
        """A dataclass of its settings, ``image_size`` ``(H, W)`` among them."""
        ...

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one image, in the base's own units."""
        ...

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels | None:
        """The anomaly-free counterpart, for people; None if the base makes none."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the JSON-ready config."""
        ...


@validated
class FitSettings:
    """What a user may choose about a fit. Everything else is data-driven or a default of the base."""

    seed: int = 0  # of everything random
    steps: int | None = None  # optimiser steps; None = the base's default; 0 = adopt a diffusers base as it is
    minutes: float | None = None  # wall-clock budget instead of steps (then a second run may differ)
    false_reject_rate: float = 0.01  # share of good parts that may be rejected
    image_size: int | None = None  # side of a square with as many pixels as the model works on; None = 256 (lite), 512 (diffusers)
    max_images: int = 1000  # good images used; a random choice of them if there are more
    shots: int | None = None  # learn from so few (1, 2, 4, 8), which a random choice leaves; None = from all
    textures: str | None = None  # folder of images that synthetic anomalies take content from; None = generated textures
    foreground: Literal["all", "bright", "dark", "auto"] = "all"  # part of the image where synthetic anomalies may appear
    product: Literal["auto", "object", "texture"] = "auto"  # lite: what counts as evidence; "auto" decides by the images
    features: str | None = None  # extractor of a diffusers base: folder or Hub id; None = DINO ViT-B/8
    vae: str | None = None  # autoencoder that replaces a diffusers base's: folder or Hub id
    revision: str | None = None  # of a diffusers base on the Hub: branch, tag or commit
    offline: bool = False  # of a diffusers base: never ask the Hub
    prompt: str = DEFAULT_PROMPT  # of a diffusers base; several products add their name, or stand in for {category}
    preset: str | None = None  # of a diffusers base: published constants by name, such as "mvtec_ad/bottle", see the module presets
    denoiser: FinetuneConfig | None = None  # training of a diffusers base; None = adapters; with a preset as published
    calibration: Literal["auto", "held-out", "cross-fit"] = "auto"  # auto = cross-fit below 24 images
    anomaly_oriented: bool = True  # ATP: train on synthetic anomalies; False = plain diffusion, for ablations
    adaptive: bool = True  # ADS: search the denoising step per image; False = the same for all, for ablations
    timesteps: tuple[int, ...] | None = None  # lite: of the denoiser calls at inspection, falling; None = those of the product's kind
    fusion: bool | None = None  # SAFF: keep the input where it is normal; None = the base's default (off for lite)

    def __post_init__(self) -> None:
        check_rate(self.false_reject_rate)
        if self.steps is not None and self.steps < 0:
            raise ConfigError(f"steps must not be negative, not {self.steps}")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"minutes must be positive, not {self.minutes}")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("give steps or minutes, not both")
        if self.image_size is not None and not 64 <= self.image_size <= 2048:
            raise ConfigError(f"image_size must be from 64 to 2048, not {self.image_size}")
        if self.max_images < 2:
            raise ConfigError(f"max_images must be at least 2, not {self.max_images}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, not {self.seed}")
        steps = self.timesteps
        if steps is not None and (not steps or not all(0 < t < 1000 for t in steps) or any(a <= b for a, b in itertools.pairwise(steps))):
            raise ConfigError(f"timesteps must fall and lie between 0 and 1000, such as 600 and 400, not {list(steps)}")
        if self.shots is not None and self.shots < 1:
            raise ConfigError(f"shots must be at least 1, not {self.shots}")


def settings_of(values: dict[str, Any]) -> FitSettings:
    """`FitSettings` of a table of names and values.

    Raises:
        ConfigError: A name is unknown, or a value of the wrong type.
    """
    return from_json(FitSettings, values)


_ANY = {"seed", "false_reject_rate", "image_size", "max_images", "shots", "calibration"}
_TRAINED = {"steps", "textures", "foreground", "adaptive", "fusion"}
_LITE = {"minutes", "product", "anomaly_oriented", "timesteps"}
_DIFFUSERS = {"features", "vae", "revision", "offline", "prompt", "preset", "denoiser"}


def check_settings(name: str, settings: FitSettings, *, together: bool = False) -> None:
    """Refuse settings that have no meaning for a base, instead of ignoring them.

    Args:
        name: Of the base, as for `train_base`.
        settings: Those that differ from the defaults are looked at.
        together: Whether one denoiser is to be trained for several products.

    Raises:
        ConfigError: One is not for this base, or the base has no denoiser that products could share.
    """
    if together and name in BASELINES:
        raise ConfigError(f"{name} has no denoiser that several products could share; fit each by itself")
    allowed = _ANY | (set() if name in BASELINES else _TRAINED | (_LITE if name == "lite" else _DIFFUSERS))
    default = FitSettings()
    for field in fields(settings):
        if getattr(settings, field.name) != getattr(default, field.name) and field.name not in allowed:
            raise ConfigError(f"{field.name} is not a setting of the base {name}; leave it out")
    if settings.steps == 0 and name == "lite":
        raise ConfigError("steps must be at least 1 for lite, which has nothing to adopt")
    if settings.preset is not None and (load_preset(settings.preset).category == MULTI_CLASS) != together:
        wanted = (
            "several products together; use a preset of one category" if not together else "one product; use the data set's multi_class"
        )
        raise ConfigError(f"the preset {settings.preset} is for {wanted}")
    for key in ("prompt", "foreground"):
        if settings.preset is not None and getattr(settings, key) != getattr(default, key):
            raise ConfigError(f"{key}: is set by the preset {settings.preset}; leave one of the two out")


INSPECTION_SETTINGS = frozenset({"adaptive", "timesteps", "fusion", "false_reject_rate"})
"""Settings that can be changed without another training, see `adjust_base`."""


def train_base(
    name: str,
    images: Sequence[Pixels],
    size: tuple[int, int],
    settings: FitSettings,
    textures: Sequence[Pixels],
    foreground: Foreground,
    share: int,
    run: TrainingRun,
    progress: Progress,
) -> Base:
    """Train one base with one ``share``-th of the budget.

    Args:
        name: ``lite``, one of `BASELINES`, or ``sd14``, folder or Hub id of a Stable Diffusion in diffusers form.
        images: ``[H, W, 3]`` uint8 normal images at ``size``.
        size: ``(H, W)`` the base works at.
        settings: The user's choices.
        textures: Images of the same size that synthetic anomalies take content from.
        foreground: Where synthetic anomalies may appear.
        share: Number of trainings that share the budget.
        run: Checkpoints and logs of a diffusers base.
        progress: Told of every stage.

    Raises:
        ConfigError: The settings do not fit together, or the training would not fit into memory.
        Interrupted: The training was asked to stop, and has saved where it is.
    """
    if name == "memory-bank":
        return fit_memory_bank(images, MemoryBankConfig(image_size=size, seed=settings.seed), progress=progress)
    if name in BASELINES:
        method: Literal["patchcore", "padim"] = "patchcore" if name == "anomalib-patchcore" else "padim"
        return fit_anomalib(images, AnomalibConfig(method=method, image_size=size, seed=settings.seed), progress=progress)
    minutes = None if settings.minutes is None else settings.minutes / share
    if name == "lite":
        training = _lite_training(settings)
        training = replace(training, steps=max(1, training.steps // share), pool=max(1, training.pool // share), minutes=minutes)
        return fit_lite(images, _lite_config(size, settings), training, textures=textures, foreground=foreground, progress=progress)
    preset = None if settings.preset is None else load_preset(settings.preset)
    presets = {} if preset is None else {"": preset}
    return _fit_diffusers(name, {"": images}, size, settings, presets, textures, {"": foreground}, share, run, progress)[""]


def _fit_diffusers(
    name: str,
    images: Mapping[str, Sequence[Pixels]],
    size: tuple[int, int],
    settings: FitSettings,
    presets: Mapping[str, Preset],
    textures: Sequence[Pixels],
    foregrounds: Mapping[str, Foreground],
    share: int,
    run: TrainingRun,
    progress: Progress,
) -> Mapping[str, Base]:
    """Train one diffusers base for one product or several, by their names."""
    some = next(iter(presets.values()), None)
    training = settings.denoiser or (PAPER if some else FinetuneConfig())
    default = some.train_steps if some else DEFAULT_STEPS
    steps = default if settings.steps is None else settings.steps
    steps = max(1, steps // share) if steps else 0
    if steps and os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":  # what a shard needs is not known
        check_memory(name, size, settings, training, run.memory_limit)
    dtype = DTYPES[training.precision]
    pipelines = GladPipeline.for_prompts(
        name,
        {key: presets[key].prompt if presets else _prompt(settings.prompt, key) for key in images},
        settings.features,
        vae=settings.vae,
        revision=settings.revision,
        local_files_only=settings.offline,
        torch_dtype=dtype,
        unet_dtype=torch.float32 if training.method == "full" and steps else dtype,
    )
    return fit_paper(
        pipelines,
        images,
        {key: _paper_config(size, settings, presets.get(key)) for key in images},
        training,
        steps,
        seed=settings.seed,
        textures=textures,
        foregrounds=foregrounds,
        calibrate_step=some is None or some.step_threshold_calibrated,
        run=run,
        progress=progress,
    )


def check_memory(name: str, size: tuple[int, int], settings: FitSettings, training: FinetuneConfig, limit: int | None) -> None:
    """Refuse a training of a diffusers base that does not fit into memory, before its weights are loaded.

    Args:
        name: Of the base.
        size: ``(H, W)`` it works at.
        settings: The user's choices.
        training: How it is trained.
        limit: Bytes; None = what is available.

    Raises:
        ConfigError: It does not fit; the message says what would.
    """
    found = locate_base(name, settings.features, settings.vae, revision=settings.revision, local_files_only=settings.offline)
    configs, device, processes = read_configs(*found), choose_device(), process_count()

    def plan(training: FinetuneConfig, size: tuple[int, int]) -> Plan:
        return plan_training(configs, training, size, processes, device.type)

    available = available_memory(device) if limit is None else limit
    if device.type == "cpu":
        available //= processes
    check_fits(plan, training, size, available, device.type)


def _prompt(prompt: str, category: str) -> str:
    """The prompt of one of several products (METHOD: "a photo of sks" and the category)."""
    return prompt.replace("{category}", category) if "{category}" in prompt else f"{prompt} {category}".strip()


def train_bases(
    name: str,
    images: Mapping[str, Sequence[Pixels]],
    size: tuple[int, int],
    settings: FitSettings,
    textures: Sequence[Pixels],
    foregrounds: Mapping[str, Foreground],
    run: TrainingRun,
    progress: Progress,
) -> Mapping[str, Base]:
    """Train one base for each of several categories, over one denoiser that is told the category.

    Args:
        name: ``lite``, or folder or Hub id of a Stable Diffusion in diffusers form.
        images: Category -> ``[H, W, 3]`` uint8 normal images at ``size``.
        size: ``(H, W)`` the bases work at.
        settings: The user's choices.
        textures: Images of the same size that synthetic anomalies take content from.
        foregrounds: Category -> where synthetic anomalies may appear.
        run: Checkpoints and logs of a diffusers base.
        progress: Told of every stage.

    Raises:
        ConfigError: As for `train_base`.
        Interrupted: As for `train_base`.
    """
    if name != "lite":
        presets = {}
        if settings.preset is not None:
            shared = load_preset(settings.preset)
            presets = {category: category_preset(shared, category) for category in images}
        return _fit_diffusers(name, images, size, settings, presets, textures, foregrounds, 1, run, progress)
    training = _lite_training(settings)
    steps = settings.steps or round(training.steps * math.sqrt(len(images)))
    config = replace(_lite_config(size, settings), categories=tuple(images), category=next(iter(images)))
    training = replace(training, steps=steps, minutes=settings.minutes)
    return fit_lite_multi_class(images, config, training, textures=textures, foregrounds=foregrounds, progress=progress)


def adjust_base(base: LiteBase, images: Sequence[Pixels], settings: FitSettings, progress: Progress) -> None:
    """Give a trained base the inspection settings that `train_base` would have given it; the weights stay.

    Args:
        base: Changed in place.
        images: ``[H, W, 3]`` uint8, those it was trained on, at its size.
        settings: They differ from those of the training in `INSPECTION_SETTINGS` only.
        progress: Told of every stage.
    """
    old = base.config
    config = replace(_lite_config(old.image_size, settings), categories=old.categories, category=old.category)
    adjust_lite(base, config, images, _lite_training(settings), progress)


def load_base(kind: str, folder: Path, config: dict[str, Any]) -> Base:
    """Read what a base's ``save`` wrote.

    Raises:
        KeyError: There is no such kind.
        ModelFormatError: Folder and config do not fit together.
    """
    loaders: dict[str, Callable[[Path, dict[str, Any]], Base]] = {
        LiteBase.kind: LiteBase.load,
        PaperBase.kind: PaperBase.load,
        MemoryBank.kind: MemoryBank.load,
        "anomalib-patchcore": AnomalibBase.load,
        "anomalib-padim": AnomalibBase.load,
    }
    return loaders[kind](folder, config)


def _lite_config(size: tuple[int, int], settings: FitSettings) -> LiteConfig:
    config = LiteConfig(image_size=size, seed=settings.seed, product=settings.product)
    fusion: Literal["calibrated", "none"] = "calibrated" if settings.fusion else "none"
    timesteps = settings.timesteps or config.reconstruction.timesteps
    reconstruction = replace(config.reconstruction, timesteps=timesteps, adaptive=settings.adaptive, fusion=fusion)
    return replace(config, reconstruction=reconstruction)


def _paper_config(size: tuple[int, int], settings: FitSettings, preset: Preset | None) -> PaperConfig:
    config = PaperConfig(image_size=size, feature_size=size, seed=settings.seed)
    if preset is not None:
        config = replace(
            config,
            feature_size=preset.feature_size if settings.image_size is None else size,
            guidance_scale=preset.guidance_scale,
            reconstruction=preset.reconstruction,
            scoring=preset.scoring,
            foreground=preset.scoring_foreground,
        )
    reconstruction = replace(config.reconstruction, adaptive=settings.adaptive)
    if settings.fusion is False:
        reconstruction = replace(reconstruction, fusion="none")
    return replace(config, reconstruction=reconstruction)


def _lite_training(settings: FitSettings) -> LiteTrainingConfig:
    default = LiteTrainingConfig()
    return replace(default, steps=settings.steps or default.steps, anomaly_oriented=settings.anomaly_oriented)
