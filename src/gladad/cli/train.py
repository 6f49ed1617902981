"""The commands that make and change models: fit, calibrate, plan, tune-features, tune-vae, merge and convert."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gladad.cli.common import Category, Layout, Model, Quiet, Rate, complain, duration, guarded, hush, load_model
from gladad.cli.console import bars, waiting
from gladad.core.errors import ConfigError
from gladad.core.processes import process_count

if TYPE_CHECKING:
    from gladad.detector.glad import Glad
    from gladad.models.stable_diffusion.training import FinetuneConfig
    from gladad.training.loop import TrainingRun

DIFFUSERS = "Stable Diffusion bases"
RUNNING = "Running long trainings"


class Foreground(StrEnum):
    """Where synthetic anomalies may appear."""

    all = "all"
    bright = "bright"
    dark = "dark"
    auto = "auto"


class Product(StrEnum):
    """What kind of thing is inspected."""

    auto = "auto"
    object = "object"
    texture = "texture"


class CalibrationWay(StrEnum):
    """Where the scores that the threshold is made from come from."""

    auto = "auto"
    held_out = "held-out"
    cross_fit = "cross-fit"


class Method(StrEnum):
    """What of a denoiser is trained."""

    lora = "lora"
    full = "full"


class Layers(StrEnum):
    """Which layers are adapted."""

    attention = "attention"
    all = "all"


class Precision(StrEnum):
    """Of the networks' arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Optimizer(StrEnum):
    """AdamW, with moments of 32 or 8 bits."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"


def _size(text: str) -> int:
    """Bytes of a size such as ``16GiB``, ``900M`` or ``24``, which are gibibytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size; write one like 16GiB")
    return int(float(match[1]) * 2 ** {"k": 10, "m": 20, "": 30, "g": 30, "t": 40}[match[2]])


def _diffusers(help: str) -> Any:
    return typer.Option(help=help, show_default=False, rich_help_panel=DIFFUSERS)


Features = Annotated[str | None, _diffusers("Extractor: DINO or DINOv2 folder or Hub id (default: facebook/dino-vitb8).")]
Vae = Annotated[str | None, _diffusers("Autoencoder that replaces the base's: folder or Hub id.")]
Revision = Annotated[str | None, _diffusers("Branch, tag or commit on the Hub.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the Hub.", rich_help_panel=DIFFUSERS)]
MethodOption = Annotated[Method | None, _diffusers("Adapters, or all weights as in the paper (default: lora; full with a preset).")]
RankOption = Annotated[int | None, _diffusers("Rank of the adapters (default: 16).")]
LayersOption = Annotated[Layers | None, _diffusers("Layers that are adapted (default: attention).")]
Batch = Annotated[int | None, _diffusers("Images per step, of all processes together (default: 4; 32 with a preset).")]
MicroBatch = Annotated[int | None, _diffusers("Images at a time; gradients are accumulated (default: all).")]
LearningRate = Annotated[float | None, _diffusers("Learning rate (default: 1e-4 for lora, 5e-6 for full).")]
PrecisionOption = Annotated[Precision | None, _diffusers("Of the arithmetic (default: bfloat16).")]
OptimizerOption = Annotated[Optimizer | None, _diffusers("adamw8bit needs bitsandbytes (default: adamw).")]
Ema = Annotated[float | None, _diffusers("Decay of averaged weights, which are then kept (default: 0: none).")]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Compute twice instead of keeping (default: on).",
        show_default=False,
        rich_help_panel=DIFFUSERS,
    ),
]
TrainingFolder = Annotated[
    Path | None, typer.Option(help="For checkpoints and logs (default: OUTPUT.training).", show_default=False, rich_help_panel=RUNNING)
]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=RUNNING)]
Keep = Annotated[int, typer.Option(help="Newest checkpoints kept.", rich_help_panel=RUNNING)]
TrackerOption = Annotated[
    str, typer.Option(help="TensorBoard if installed (auto), none, or wandb and others of accelerate's.", rich_help_panel=RUNNING)
]
SampleEvery = Annotated[int, typer.Option(help="Steps between example pictures.", rich_help_panel=RUNNING)]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        parser=_size,
        metavar="SIZE",
        help="Refuse a training that needs more, such as 16GiB (default: what is free).",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]


@guarded
def fit(
    images: Annotated[Path, typer.Argument(help="Folder of good images, or a category with train/good/.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model.", show_default=False)],
    base: Annotated[str, typer.Option(help="'lite', 'sd14', folder or Hub id of a Stable Diffusion, or a baseline.")] = "lite",
    minutes: Annotated[float | None, typer.Option(help="Time budget of the training (lite).", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; 0 only calibrates a trained base.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    false_reject_rate: Annotated[float, typer.Option(help="Share of good parts that may be rejected.")] = 0.01,
    textures: Annotated[Path | None, typer.Option(help="Folder of images to make defects from.", show_default=False)] = None,
    foreground: Annotated[
        Foreground, typer.Option(help="Part of the image where defects are made; auto decides by the good images.")
    ] = Foreground.all,
    product: Annotated[Product, typer.Option(help="Object with structure, or texture (lite).")] = Product.auto,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels to work at (default: 256 for lite, 512).", show_default=False)
    ] = None,
    max_images: Annotated[int, typer.Option(help="Good images used at most.")] = 1000,
    shots: Annotated[int | None, typer.Option(help="Learn from so few good images (1, 2, 4, 8).", show_default=False)] = None,
    calibration: Annotated[CalibrationWay, typer.Option(help="Images the threshold is made from.")] = CalibrationWay.auto,
    multi_class: Annotated[
        bool, typer.Option("--multi-class", help="One model for all products of a data set; OUTPUT gets a folder for each.")
    ] = False,
    preset: Annotated[str | None, _diffusers("Published constants, such as mvtec_ad/bottle.")] = None,
    prompt: Annotated[
        str | None, _diffusers("What the denoiser is told (default: 'a photo of sks', and the product if there are several).")
    ] = None,
    features: Features = None,
    vae: Vae = None,
    revision: Revision = None,
    offline: Offline = False,
    training: MethodOption = None,
    rank: RankOption = None,
    layers: LayersOption = None,
    batch_size: Batch = None,
    micro_batch: MicroBatch = None,
    learning_rate: LearningRate = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    ema: Ema = None,
    gradient_checkpointing: Checkpointing = None,
    training_folder: TrainingFolder = None,
    checkpoint_every: CheckpointEvery = 500,
    keep: Keep = 2,
    tracker: TrackerOption = "auto",
    sample_every: SampleEvery = 500,
    memory_limit: MemoryLimit = None,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Learn from good images and write a model. Stopped on a Stable Diffusion base, the same command goes on."""
    from gladad.core.storage import check_target
    from gladad.data.layouts import read_dataset, training_images

    if multi_class:
        if category is not None:
            raise ConfigError("--category and --multi-class contradict each other; leave one out")
        dataset = read_dataset(images, layout)
        paths = {name: [s.image_path for s in dataset.of("train") if s.category == name and not s.gt_label] for name in dataset.categories}
        targets = [output / name for name in paths]
    else:
        paths = {"": training_images(images, layout, category)}
        targets = [output]
    for target in targets:
        check_target(target)
    with _alone(base) as main:
        silent = quiet or not main
        with waiting("starting", silent):
            from gladad.detector.glad import Glad
            from gladad.models.registry import FEATURE_BASES, FitSettings
            from gladad.models.stable_diffusion.pipeline import DEFAULT_PROMPT

            hush(downloads=base not in FEATURE_BASES and not silent)
        chosen = {
            "method": training,
            "rank": rank,
            "layers": layers,
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "learning_rate": learning_rate,
            "precision": precision,
            "optimizer": optimizer,
            "ema": ema,
            "gradient_checkpointing": gradient_checkpointing,
        }
        settings = FitSettings(
            seed=seed,
            steps=steps,
            minutes=minutes,
            false_reject_rate=false_reject_rate,
            image_size=image_size,
            max_images=max_images,
            shots=shots,
            preset=preset,
            textures=None if textures is None else str(textures),
            foreground=foreground.value,
            product=product.value,
            features=features,
            vae=vae,
            revision=revision,
            offline=offline,
            denoiser=_denoiser(preset, chosen),
            calibration=calibration.value,
            prompt=DEFAULT_PROMPT if prompt is None else prompt,
        )
        run = _run(base in FEATURE_BASES, output, training_folder, checkpoint_every, keep, tracker, sample_every, memory_limit, silent)
        started = time.monotonic()
        with bars(silent) as progress:
            if multi_class:
                detectors = Glad.fit_together(paths, base, settings, run=run, progress=progress)
            else:
                detectors = {"": Glad.from_base(base, settings=settings).fit(paths[""], run=run, progress=progress)}
        if main:
            _save(detectors, output, run)
    if not silent:
        for name, detector in detectors.items():
            print(f"{output / name}: fitted on {detector.provenance_['images']} good images")
            if foreground is Foreground.auto:
                print(f"defects were made on {detector.provenance_['foreground']['reason']}")
            print(detector.calibration_.threshold.statement)
        print(f"done in {duration(time.monotonic() - started)}")


def _one_process(command: str) -> None:
    if process_count() > 1:
        raise ConfigError(f"gladad {command} runs in one process; start it without torchrun")


@contextmanager
def _alone(base: str) -> Iterator[bool]:
    """Whether this is the process that prints and writes; the others leave when it has written."""
    if process_count() == 1:
        yield True
        return
    from gladad.models.registry import FEATURE_BASES
    from gladad.training.loop import make_accelerator

    if base in FEATURE_BASES:
        raise ConfigError(f"the base {base} trains in one process; start it without torchrun")
    accelerator = make_accelerator()
    yield bool(accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _denoiser(preset: str | None, chosen: dict[str, Any]) -> FinetuneConfig | None:
    """The training that was asked for; None if nothing was."""
    from dataclasses import replace

    from gladad.models.stable_diffusion.training import PAPER, FinetuneConfig

    given: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in chosen.items() if value is not None
    }
    return replace(PAPER if preset else FinetuneConfig(), **given) if given else None


def _run(
    plain: bool,
    output: Path,
    folder: Path | None,
    checkpoint_every: int,
    keep: int,
    tracker: str,
    sample_every: int,
    memory_limit: int | None,
    silent: bool,
) -> TrainingRun:
    from gladad.training.loop import TrainingRun
    from gladad.training.trackers import check_tracker

    if plain:  # a training of minutes, which writes nothing on its way
        return TrainingRun()
    check_tracker(tracker)
    place = output.absolute()
    return TrainingRun(
        folder=folder or place.with_name(f"{place.name}.training"),
        checkpoint_every=checkpoint_every,
        keep=keep,
        tracker=tracker,
        sample_every=sample_every,
        memory_limit=memory_limit,
        tell=(lambda line: None) if silent else complain,
    )


def _save(detectors: dict[str, Glad], output: Path, run: TrainingRun) -> None:
    """Write the models, then remove the checkpoints of the training."""
    from gladad.core.storage import share_files
    from gladad.detector.fit import PARTS
    from gladad.training.checkpoints import discard

    for name, detector in detectors.items():
        detector.save_pretrained(output / name)
        share_files(output / next(iter(detectors)), output / name)
    if run.folder is not None:
        for part in (run.folder, *(run.folder / name for name in PARTS)):
            discard(part)


@guarded
def calibrate(
    model: Model,
    images: Annotated[Path, typer.Argument(help="Good images that the model has not seen, or those of its fit.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Another folder than the model's.", show_default=False)] = None,
    false_reject_rate: Rate = None,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Make a model's thresholds anew from good images, such as after a change of the lighting."""
    from gladad.core.storage import check_target
    from gladad.data.layouts import training_images

    _one_process("calibrate")
    paths = training_images(images, layout, category)
    check_target(output or model)
    detector = load_model(model, false_reject_rate, quiet)
    before = detector.calibration_.threshold.value
    with bars(quiet) as progress:
        detector.calibrate(paths, progress=progress)
    detector.save_pretrained(output or model)
    if not quiet:
        threshold = detector.calibration_.threshold
        print(f"threshold {before:.4g} -> {threshold.value:.4g} (raw score), from {threshold.n} good images")
        print(threshold.statement)


@guarded
def merge(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.", show_default=False)],
    quiet: Quiet = False,
) -> None:
    """Add a model's adapter to the weights of its base, so that it needs the base no more."""
    from gladad.core.storage import check_target

    _one_process("merge")
    check_target(output)
    detector = load_model(model, None, quiet)
    with waiting("merging", quiet):
        detector.merge().save_pretrained(output)
    if not quiet:
        print(f"{output}: stands alone")


@guarded
def plan(
    base: Annotated[str, typer.Argument(help="'sd14', folder or Hub id of a Stable Diffusion.")] = "sd14",
    image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 512,
    features: Features = None,
    vae: Vae = None,
    revision: Revision = None,
    offline: Offline = False,
    training: MethodOption = None,
    rank: RankOption = None,
    layers: LayersOption = None,
    batch_size: Batch = None,
    micro_batch: MicroBatch = None,
    precision: PrecisionOption = None,
    optimizer: OptimizerOption = None,
    ema: Ema = None,
    gradient_checkpointing: Checkpointing = None,
    guidance: Annotated[bool, typer.Option("--guidance", help="Inspect with classifier-free guidance, as presets do.")] = False,
    memory_limit: MemoryLimit = None,
    quiet: Quiet = False,
) -> None:
    """Show how much memory training and inspection need; exit status 1 if the training does not fit."""
    with waiting("starting", quiet):
        from gladad.core.errors import ModelFormatError
        from gladad.models.stable_diffusion.architectures import SD14, read_configs
        from gladad.models.stable_diffusion.components import NAMED_BASES, locate_base
        from gladad.models.stable_diffusion.device import available_memory, bytes_text, choose_device
        from gladad.models.stable_diffusion.memory import Plan, check_fits, plan_inspection, plan_training
        from gladad.models.stable_diffusion.training import FinetuneConfig

        hush()
    try:
        configs = read_configs(*locate_base(base, features, vae, revision=revision, local_files_only=offline or base in NAMED_BASES))
    except ModelFormatError:
        if base not in NAMED_BASES or features or vae or revision:
            raise
        configs = SD14  # what it is made of is known without downloading it
    chosen = {
        "method": training,
        "rank": rank,
        "layers": layers,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "precision": precision,
        "optimizer": optimizer,
        "ema": ema,
        "gradient_checkpointing": gradient_checkpointing,
    }
    config = _denoiser(None, chosen) or FinetuneConfig()
    device = choose_device()

    @functools.cache
    def planned(training: FinetuneConfig, size: tuple[int, int]) -> Plan:
        return plan_training(configs, training, size, device_type=device.type)

    size = (image_size, image_size)
    with waiting("taking one step without content", quiet):
        train = planned(config, size)
        inspection = plan_inspection(configs, size, config.precision, guidance=guidance)
    at_a_time = min(config.micro_batch or config.batch_size, config.batch_size)
    table = Table("", f"{config.method} training, {at_a_time} at a time", "inspection", box=None)
    for name, count in train.items():
        table.add_row(name, bytes_text(count), bytes_text(inspection[name]) if name in inspection else "")
    Console().print(table)
    available = available_memory(device) if memory_limit is None else memory_limit
    print(f"{bytes_text(available)} are {'available' if memory_limit is None else 'allowed'} on {device}")
    check_fits(planned, config, size, available, device.type)


@guarded
def tune_features(
    model: Model,
    images: Annotated[Path, typer.Argument(help="The good images of the model's fit.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tuned model.", show_default=False)],
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 15,
    steps: Annotated[int | None, typer.Option(help="Training steps instead.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 32,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time; gradients are accumulated.", show_default=False)] = None,
    anchor_weight: Annotated[float, typer.Option(help="How much the tuned extractor is held to the frozen one.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    training_folder: TrainingFolder = None,
    checkpoint_every: CheckpointEvery = 500,
    keep: Keep = 2,
    tracker: TrackerOption = "auto",
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Fine-tune the extractor that scores, on the good images of a Stable Diffusion model, and calibrate anew."""
    from gladad.core.storage import check_target
    from gladad.data.layouts import training_images

    paths = training_images(images, layout, category)
    check_target(output)
    with _alone("") as main:
        silent = quiet or not main
        detector = load_model(model, None, silent)
        from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig

        config = FeatureTuningConfig(
            epochs=epochs, steps=steps, batch_size=batch_size, micro_batch=micro_batch, anchor_weight=anchor_weight, seed=seed
        )
        run = _run(False, output, training_folder, checkpoint_every, keep, tracker, 500, None, silent)
        with bars(silent) as progress:
            detector.tune_features(paths, config, run=run, progress=progress)
        if main:
            _save({"": detector}, output, run)
    if not silent:
        print(f"{output}: extractor tuned")
        print(detector.calibration_.threshold.statement)


@guarded
def tune_vae(
    base: Annotated[str, typer.Argument(help="'sd14', folder or Hub id of a Stable Diffusion.", show_default=False)],
    images: Annotated[Path, typer.Argument(help="Folder of good images, or a category with train/good/.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the autoencoder.", show_default=False)],
    image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 512,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 4,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time; gradients are accumulated.", show_default=False)] = None,
    discriminator: Annotated[bool, typer.Option("--discriminator", help="Train against a discriminator, too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    features: Features = None,
    revision: Revision = None,
    offline: Offline = False,
    precision: Annotated[Precision, typer.Option(help="Of the arithmetic.")] = Precision.float32,
    training_folder: TrainingFolder = None,
    checkpoint_every: CheckpointEvery = 500,
    keep: Keep = 2,
    tracker: TrackerOption = "auto",
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Fine-tune a base's autoencoder on good images but those that a fit with this seed holds out, for 'gladad fit --vae'."""
    from gladad.data.layouts import training_images

    paths = training_images(images, layout, category)
    with _alone("") as main:
        silent = quiet or not main
        with waiting("starting", silent):
            from gladad.detector.fit import Fitter, read_pixels
            from gladad.models.registry import FitSettings
            from gladad.models.stable_diffusion.autoencoder_tuning import (
                AUTOENCODER_FORMAT,
                AutoencoderTuningConfig,
                save_autoencoder,
                tune_autoencoder,
            )
            from gladad.models.stable_diffusion.components import load_autoencoder, locate_base
            from gladad.models.stable_diffusion.device import choose_device
            from gladad.models.stable_diffusion.folders import check_replaceable
            from gladad.training.checkpoints import discard

            hush(downloads=not silent)
        check_replaceable(output, AUTOENCODER_FORMAT)
        fitter = Fitter(base, FitSettings(seed=seed))
        paths = fitter.chosen(paths)
        if not fitter.cross_fits(paths):
            paths = fitter.split(paths)[0]  # what a fit with this seed holds out is not to be learnt from
        elif main:
            complain(f"{len(paths)} good images are too few to hold any out: the thresholds of a fit with this autoencoder will be too low")
        found, extractor, _ = locate_base(base, features, revision=revision, local_files_only=offline)
        autoencoder, frozen = (network.to(choose_device()) for network in load_autoencoder(found, extractor))
        config = AutoencoderTuningConfig(
            steps=steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            discriminator=discriminator,
            precision=precision.value,
            seed=seed,
        )
        run = _run(False, output, training_folder, checkpoint_every, keep, tracker, 500, None, silent)
        with bars(silent) as progress:
            pixels = read_pixels(paths, (image_size, image_size), progress)
            tune_autoencoder(autoencoder, frozen, pixels, config, run=run, progress=progress)
        if main:
            save_autoencoder(autoencoder, output)
            if run.folder is not None:
                discard(run.folder)
    if not silent:
        print(f"{output}: use it with 'gladad fit --vae {output}'")


@guarded
def convert(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the converted base.", show_default=False)],
    base: Annotated[str, typer.Option(help="'sd14', folder or Hub id that supplies the rest.")] = "sd14",
    unet: Annotated[Path | None, typer.Option(help="pytorch_model.bin of a denoiser.", show_default=False)] = None,
    features: Annotated[Path | None, typer.Option(help=".pth of a DINO ViT.", show_default=False)] = None,
    tuned_features: Annotated[Path | None, typer.Option(help=".pth of a fine-tuned one, which scores.", show_default=False)] = None,
    vae: Annotated[Path | None, typer.Option(help=".ckpt of an autoencoder.", show_default=False)] = None,
    extractor: Annotated[str | None, typer.Option(help="Folder or Hub id of the ViT's architecture.", show_default=False)] = None,
    prompt: Annotated[str, typer.Option(help="What the denoiser was trained with.")] = "a photo of sks",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base.", show_default=False)] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the Hub.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make a base of checkpoints of GLAD's authors, for 'gladad fit --steps 0'. See docs/convert.md."""
    with waiting("starting", quiet):
        from gladad.interop.convert import convert as work

        hush(downloads=not quiet)
    report = work(
        base,
        output,
        unet=unet,
        features=features,
        tuned_features=tuned_features,
        vae=vae,
        extractor=extractor,
        prompt=prompt,
        revision=revision,
        local_files_only=offline,
    )
    if not quiet:
        for name, part in report.components.items():
            left_out = "".join(f", {count} of {group} left out" for group, count in part.ignored.items())
            print(f"{name}: {part.tensors} tensors of {part.source}{left_out}")
        print(f"{output}: use it with 'gladad fit --base {output} --steps 0'")
