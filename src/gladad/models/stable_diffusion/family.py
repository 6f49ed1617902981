"""The paper's form as a family of models: settings by name, presets, training over one base, loading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gladad.core.errors import ConfigError
from gladad.core.processes import process_count
from gladad.core.records import Progress
from gladad.core.settings import from_json, to_json, with_values
from gladad.core.tensors import to_tensor
from gladad.data.foreground import Foreground
from gladad.data.samples import apart_of, evenly
from gladad.models.family import Model, Pixels, Training
from gladad.models.stable_diffusion import small
from gladad.models.stable_diffusion.architectures import read_configs
from gladad.models.stable_diffusion.components import locate_base
from gladad.models.stable_diffusion.device import available_memory, choose_device, inference_dtype
from gladad.models.stable_diffusion.memory import Plan, check_fits, plan_training
from gladad.models.stable_diffusion.model import StableDiffusion
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.presets import MULTI_CLASS, Preset, category_preset, load_preset
from gladad.models.stable_diffusion.settings import (
    DEFAULT_STEPS,
    SPEEDS,
    DenoiserSettings,
    StableDiffusionConfig,
    StableDiffusionSettings,
    with_delta,
)
from gladad.models.stable_diffusion.training import PAPER, FinetuneConfig, Trained, TrainedProduct, finetune_denoiser
from gladad.models.stable_diffusion.training_inputs import sha256_of_weights
from gladad.training.loop import DTYPES, divided

LONG, SHARED = True, True
UNREACHABLE = 1e9  # a delta that no gap reaches: the chain then runs its whole search
STEP_SEARCH_IMAGES = 32
load = StableDiffusion.load


def make_settings(name: str, values: Mapping[str, Any]) -> StableDiffusionSettings:
    """The defaults, or those of the ``preset`` among the values, with the other values; see `gladad.models.family.Family`."""
    preset = values.get("preset")
    start = small.default_settings() if name == small.NAME else StableDiffusionSettings()
    if preset is not None:
        start = from_preset(load_preset(str(preset)))
    if "image_size" in values and "feature_size" not in values:
        start = replace(start, feature_size=None)  # the preset's goes with its own image size
    return with_values(start, values)


def from_preset(preset: Preset) -> StableDiffusionSettings:
    """Settings with the published constants of a category; where delta is one of them, no image is kept from the training."""
    own = {"steps": preset.train_steps} | ({} if preset.step_threshold_calibrated else {"apart": 0.0})
    return StableDiffusionSettings(
        preset=preset.name,
        image_size=preset.encode_size[0],
        feature_size=preset.feature_size[0],
        prompt=preset.prompt,
        foreground=preset.synthesis_foreground,
        training=from_json(DenoiserSettings, to_json(PAPER) | own),
        guidance_scale=preset.guidance_scale,
        reconstruction=preset.reconstruction,
        calibrate_step=preset.step_threshold_calibrated,
        scoring=preset.scoring,
        scoring_foreground=preset.scoring_foreground,
    )


def check(name: str, settings: object, together: bool) -> None:
    """Refuse settings of another family, and a preset of one category for several products or the reverse."""
    if not isinstance(settings, StableDiffusionSettings):
        raise ConfigError(f"{name} needs StableDiffusionSettings, not {type(settings).__name__}; is it the name of a built-in model?")
    if name == small.NAME:
        elsewhere = [key for key in ("preset", "features", "revision") if getattr(settings, key) is not None]
        if elsewhere:
            raise ConfigError(f"{elsewhere[0]}: {name} starts from random weights and has everything of its own; leave it out")
        if settings.training.method != "full":
            raise ConfigError(f"training.method: {name} starts from random weights, of which all are trained; leave it at full")
        if settings.training.steps == 0:
            raise ConfigError(f"training.steps: {name} starts from random weights, and has none that could be adopted; train it")
    if settings.preset is not None and (load_preset(settings.preset).category == MULTI_CLASS) != together:
        wanted = "one product; use the data set's multi_class" if together else "several products together; use a preset of one category"
        raise ConfigError(f"preset: {settings.preset} is for {wanted}")


def working_size(settings: StableDiffusionSettings, native: tuple[float, float]) -> tuple[int, int]:
    """A square."""
    side = settings.image_size or 512
    return side, side


def foreground(settings: StableDiffusionSettings, product: str) -> tuple[Foreground | None, str]:
    """What the preset of the product's category or the user says, or the images."""
    if settings.preset is not None and load_preset(settings.preset).category == MULTI_CLASS:
        return category_preset(load_preset(settings.preset), product).synthesis_foreground, f"set by the preset {settings.preset}"
    reason = "set by the user, or the default" if settings.preset is None else f"set by the preset {settings.preset}, or the user"
    return (None, "") if settings.foreground == "auto" else (settings.foreground, reason)


def train(images: Mapping[str, Sequence[Pixels]], training: Training) -> Mapping[str, Model]:
    """Fine-tune one denoiser, and set the delta of each product's step search; no steps adopt the denoiser as it is."""
    settings: StableDiffusionSettings = training.settings
    preset = None if settings.preset is None else load_preset(settings.preset)
    denoiser, steps = settings.training, settings.training.steps
    if steps is None:
        steps = max(1, DEFAULT_STEPS // training.share)
    fresh, run = training.name == small.NAME, training.run
    learnt, usual = {}, {}  # the images that are trained on, and those that delta is set by
    for key in images:
        learnt[key], usual[key] = (images[key],) * 2 if training.alone else _divided(images[key], denoiser, training.photographs)
    minutes = None if denoiser.minutes is None else denoiser.minutes / training.share
    if steps and not fresh and os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":  # what a shard needs is not known
        check_memory(training.name, training.size, settings, None if run is None else run.memory_limit)
    own = {key: settings.of_product(key, preset) for key in images}
    prompts, dtype = {key: product.prompt for key, product in own.items()}, DTYPES[denoiser.precision]
    trained_dtype = torch.float32 if denoiser.method == "full" and steps else dtype
    if fresh:
        pipelines = small.make_pipelines(prompts, learnt, training, dtype)
        run = None if run is None else run.part(small.PARTS[1])
        if settings.vae is None and minutes is not None:
            minutes *= 1 - small.AUTOENCODER_SHARE
    else:
        pipelines = GladPipeline.for_prompts(settings.sources(training.name), prompts, dtype, trained_dtype)
    for pipeline in pipelines.values():
        pipeline.to(choose_device())
    first, trained = next(iter(pipelines.values())), Trained([])
    if steps:
        # what no file says: the autoencoder of a base that starts from nothing
        origin = {"vae": sha256_of_weights(first.vae.state_dict())} if first.origin is None else first.origin.fingerprints()
        trained = finetune_denoiser(
            first,
            {key: TrainedProduct(learnt[key], pipelines[key].prompt_embeds[:1], training.foregrounds[key]) for key in images},
            replace(denoiser, minutes=minutes),
            steps,
            seed=settings.seed,
            textures=training.textures,
            run=run,
            identity={"origin": origin, "prompts": {key: pipeline.prompt for key, pipeline in pipelines.items()}},
            progress=training.progress,
        )
    for network in (first.unet, first.vae, first.features):
        torch.nn.Module.to(network, inference_dtype(denoiser.precision, first.device))
    models = {}
    for key, pipeline in pipelines.items():
        config = StableDiffusionConfig(settings=own[key], image_size=training.size, adapted=trained.adapter is not None)
        models[key] = StableDiffusion(config, pipeline, trained.adapter, trained.adapter_name)
        if own[key].reconstruction.adaptive:
            _set_deltas(models[key], usual[key], f"{key}: step search" if key else "step search", training.progress)
    return models


def _divided(
    images: Sequence[Pixels], denoiser: DenoiserSettings, photographs: Sequence[int] | None
) -> tuple[Sequence[Pixels], Sequence[Pixels]]:
    """The images to train on, and those to set delta by: others, if there are enough and anything is trained at all.

    A photograph's tiles and copies stay together.
    """
    owner = np.arange(len(images)) if photographs is None else np.array(photographs)
    apart = apart_of(int(owner.max(initial=-1)) + 1, 0 if denoiser.steps == 0 else denoiser.apart)[owner].tolist()
    if not any(apart):
        return images, images
    learnt, usual = ([image for image, out in zip(images, apart, strict=True) if out is side] for side in (False, True))
    return learnt, usual


def _set_deltas(model: StableDiffusion, images: Sequence[Pixels], stage: str, progress: Progress) -> None:
    """Set delta, and that of every speed that compares latents; where delta is given, that of the model's own speed alone."""
    settings, deltas = model.config.settings, {}
    for speed in SPEEDS if settings.calibrate_step else (settings.speed,):
        own = model.adjusted(replace(settings, speed=speed))  # type: ignore[arg-type]
        if own.config.settings.chain.probe == "latent":
            deltas[speed] = usual_gap(own, images, f"{stage} ({speed})", progress)
        elif speed == "exact" and settings.calibrate_step:  # that of every speed that compares features
            settings = replace(settings, reconstruction=with_delta(settings.reconstruction, usual_gap(own, images, stage, progress)))
    model.config = replace(model.config, settings=settings, latent_deltas=deltas)


def usual_gap(model: StableDiffusion, images: Sequence[Pixels], stage: str, progress: Progress, quantile: float = 0.9) -> float:
    """The 90 % quantile of the largest gap of each image's whole search: with it as delta, a normal one usually gets the least noise.

    At most `STEP_SEARCH_IMAGES` of them are searched, evenly spread.
    """
    chosen = [images[place] for place in evenly(len(images), STEP_SEARCH_IMAGES)]
    search = replace(model.config.settings.chain, step_threshold=UNREACHABLE, search_stride=1)

    def peak(number: int) -> float:
        trace = model.rebuild(to_tensor(chosen[number])[None].to(model.pipeline.device), search).trace.nan_to_num(0)
        return float(trace[0, :-1].max()) if trace.shape[1] > 1 else float(trace.max())

    peaks = divided(peak, len(chosen), lambda done, total: progress(stage, done, total))
    return float(np.quantile(peaks, quantile))


def training_values(settings: StableDiffusionSettings) -> dict[str, Any]:
    """All but the rate and how input and reconstruction are compared."""
    compared = {"scoring", "scoring_foreground", "feature_size", "reference"}
    apart = {"false_reject_rate", "reconstruction", "guidance_scale", "calibrate_step", "speed"} | compared
    return {name: value for name, value in to_json(settings).items() if name not in apart}


def adjust(model: StableDiffusion, images: Sequence[Pixels], settings: StableDiffusionSettings, progress: Progress) -> Model:
    """A copy over the same networks, its deltas set anew."""
    other = model.adjusted(replace(settings, prompt=model.config.settings.prompt))  # several products have prompts of their own
    if settings.reconstruction.adaptive:
        _set_deltas(other, _divided(images, settings.training, None)[1], "step search", progress)
    return other


def check_memory(name: str, size: tuple[int, int], settings: StableDiffusionSettings, limit: int | None) -> None:
    """Refuse a training at ``(H, W)`` that needs more bytes than the limit, or than are available, before its weights are loaded.

    Raises:
        ConfigError: It does not fit; the message says what would.
    """
    configs, device, processes = read_configs(locate_base(settings.sources(name))), choose_device(), process_count()
    available = available_memory(device) if limit is None else limit
    if device.type == "cpu":
        available //= processes

    def plan(training: FinetuneConfig, size: tuple[int, int]) -> Plan:
        return plan_training(configs, training, size, processes, device.type)

    check_fits(plan, settings.training, size, available, device.type)
