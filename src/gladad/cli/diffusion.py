"""The commands for Stable Diffusion: plan, tune-features, tune-vae and convert."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gladad.cli.common import Category, Images, Layout, Model, Quiet, complain, guarded, hush, load_model
from gladad.cli.console import bars, show, waiting
from gladad.cli.fit import alone, discard_checkpoints, save, training_run
from gladad.cli.options import AUTOENCODER_TUNING, CONVERSION, DENOISER, FEATURE_TUNING, MEMORY, RUN, WEIGHTS, collects


@guarded
@collects(weights=WEIGHTS, values=DENOISER, limit=(MEMORY,))
def plan(
    base: Annotated[str, typer.Argument(help="'sd14', folder or Hub id of a Stable Diffusion.")] = "sd14",
    image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 512,
    guidance: Annotated[bool, typer.Option("--guidance", help="Inspect with classifier-free guidance, as presets do.")] = False,
    quiet: Quiet = False,
    *,
    weights: dict[str, Any],
    values: dict[str, Any],
    limit: dict[str, int],
) -> None:
    """Show how much memory training and inspection need; exit status 1 if the training does not fit."""
    with waiting("starting", quiet):
        from gladad.core.errors import ModelFormatError
        from gladad.models.registry import make_settings
        from gladad.models.stable_diffusion.architectures import SD14, read_configs
        from gladad.models.stable_diffusion.components import NAMED_BASES, locate_base
        from gladad.models.stable_diffusion.device import available_memory, bytes_text, choose_device
        from gladad.models.stable_diffusion.memory import check_fits, plan_inspection, plan_training

        hush()
    chosen: Any = make_settings(base, weights | values)
    config = chosen.training
    try:
        sources = chosen.sources(base)
        configs = read_configs(locate_base(replace(sources, offline=sources.offline or base in NAMED_BASES)))
    except ModelFormatError:
        if base not in NAMED_BASES or weights.keys() - {"offline"}:
            raise
        configs = SD14  # what it is made of is known without downloading it
    device, size = choose_device(), (image_size, image_size)
    planned = cache(partial(plan_training, configs, device_type=device.type))
    with waiting("computing", quiet):
        train = planned(config, size)
        inspection = plan_inspection(configs, size, config.precision, guidance=guidance)
    at_a_time = min(config.micro_batch or config.batch_size, config.batch_size)
    table = Table("", f"{config.method} training, {at_a_time} at a time", "inspection", box=None)
    show(table, ((name, bytes_text(n), bytes_text(inspection[name]) if name in inspection else "") for name, n in train.items()))
    available = limit.get("memory_limit") or available_memory(device)
    print(f"{bytes_text(available)} are {'allowed' if limit else 'available'} on {device}")
    check_fits(planned, config, size, available, device.type)


@guarded
@collects(values=FEATURE_TUNING, run=RUN)
def tune_features(
    model: Model,
    images: Annotated[Path, typer.Argument(help="The good images of the model's fit.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tuned model.", show_default=False)],
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
    *,
    values: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Fine-tune the extractor that scores, on the good images of a Stable Diffusion model, and calibrate anew."""
    from gladad.core.settings import from_json
    from gladad.core.storage import check_target
    from gladad.data.layouts import training_images

    paths = training_images(images, layout, category)
    check_target(output)
    with alone("sd14", quiet) as (main, silent):
        detector = load_model(model, None, silent)
        from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig

        told = training_run(output, run, silent)
        with bars(silent) as progress:
            detector.tune_features(paths, from_json(FeatureTuningConfig, values), run=told, progress=progress)
        if main:
            save({"": detector}, output, told)
    if not silent:
        print(f"{output}: extractor tuned")
        print(detector.calibration_.threshold.statement)


@guarded
@collects(weights=[option for option in WEIGHTS if option.name != "vae"], values=AUTOENCODER_TUNING, run=RUN)
def tune_vae(
    base: Annotated[str, typer.Argument(help="'sd14', folder or Hub id of a Stable Diffusion.", show_default=False)],
    images: Images,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the autoencoder.", show_default=False)],
    image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 512,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
    *,
    weights: dict[str, Any],
    values: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Fine-tune a base's autoencoder on good images but those that a fit with this seed holds out, for 'gladad fit --vae'."""
    from gladad.core.settings import from_json
    from gladad.data.layouts import training_images

    paths = training_images(images, layout, category)
    with alone(base, quiet) as (main, silent):
        with waiting("starting", silent):
            from gladad.detector.fit import Fitter
            from gladad.detector.view import read_pixels
            from gladad.models.registry import make_settings
            from gladad.models.stable_diffusion import autoencoder_tuning as tuning
            from gladad.models.stable_diffusion.components import Sources, load_autoencoder, locate_base
            from gladad.models.stable_diffusion.device import choose_device
            from gladad.models.stable_diffusion.folders import check_replaceable

            hush(downloads=not silent)
        check_replaceable(output, tuning.AUTOENCODER_FORMAT)
        config = from_json(tuning.AutoencoderTuningConfig, values)
        fitter = Fitter(base, make_settings(base, {"seed": config.seed}))
        paths = fitter.chosen(paths)
        if not fitter.cross_fits(paths):
            paths = fitter.split(paths)[0]  # what a fit with this seed holds out is not to be learnt from
        elif main:
            complain(f"{len(paths)} good images are too few to hold any out: the thresholds of a fit with this autoencoder will be too low")
        found = locate_base(Sources(base, **weights))
        autoencoder, frozen = (network.to(choose_device()) for network in load_autoencoder(found))
        told = training_run(output, run, silent)
        with bars(silent) as progress:
            pixels = read_pixels(paths, (image_size, image_size), progress)
            tuning.tune_autoencoder(autoencoder, frozen, pixels, config, run=told, progress=progress)
        if main:
            tuning.save_autoencoder(autoencoder, output)
            discard_checkpoints(told)
    if not silent:
        print(f"{output}: use it with 'gladad fit --vae {output}'")


@guarded
@collects(values=CONVERSION)
def convert(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the converted base.", show_default=False)],
    base: Annotated[str, typer.Option(help="'sd14', folder or Hub id that supplies the rest.")] = "sd14",
    quiet: Quiet = False,
    *,
    values: dict[str, Any],
) -> None:
    """Make a base of checkpoints of GLAD's authors, for 'gladad fit --steps 0'. See docs/convert.md."""
    with waiting("starting", quiet):
        from gladad.interop.convert import convert as work

        hush(downloads=not quiet)
    report = work(base, output, **values)
    if not quiet:
        for name, part in report.components.items():
            left_out = "".join(f", {count} of {group} left out" for group, count in part.ignored.items())
            print(f"{name}: {part.tensors} tensors of {part.source}{left_out}")
        print(f"{output}: use it with 'gladad fit --base {output} --steps 0'")
