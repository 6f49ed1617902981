"""The commands that make and change detectors: fit, calibrate and merge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gladad.cli.common import AnotherSpeed, Category, Images, Layout, Model, Quiet, Rate, duration, guarded, hush, load_model, teller
from gladad.cli.console import bars, waiting
from gladad.cli.options import FIT, MEMORY, RUN, Set, collects
from gladad.core.errors import ConfigError
from gladad.core.processes import process_count

if TYPE_CHECKING:
    from gladad.detector.glad import Glad
    from gladad.training.loop import TrainingRun

MULTI_CLASS_HELP = "One model for all products of a data set; OUTPUT gets a folder for each."
MultiClass = Annotated[bool, typer.Option("--multi-class", help=MULTI_CLASS_HELP)]


@guarded
@collects(values=FIT, run=(*RUN, MEMORY))
def fit(
    images: Images,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model.", show_default=False)],
    base: Annotated[str, typer.Option(help="'lite', 'sd14', folder or Hub id of a Stable Diffusion, or a baseline.")] = "lite",
    continued: Annotated[
        Path | None,
        typer.Option("--continue", help="Go on from this lite model, with new good images beside the old ones.", show_default=False),
    ] = None,
    multi_class: MultiClass = False,
    set: Set = None,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
    *,
    values: dict[str, Any],
    run: dict[str, Any],
) -> None:
    """Learn from good images and write a model. Stopped on a Stable Diffusion, the same command goes on."""
    from gladad.core.settings import parse_assignments
    from gladad.core.storage import check_target

    values |= parse_assignments(set or ())
    if continued is not None and (values or run or multi_class or base != "lite"):
        raise ConfigError("--continue: settings are the model's; leave out all options but --output, --category, --layout and --quiet")
    paths = _images(images, layout, category, multi_class)
    for product in paths:
        check_target(output / product)
    if continued is not None:
        return _go_on(continued, paths[""], output, quiet)
    with alone(base, quiet) as (main, silent):
        with waiting("starting", silent):
            from gladad.detector.glad import Glad
            from gladad.models.registry import family_of, make_settings

            long = family_of(base).LONG
            hush(downloads=long and not silent)
        settings = make_settings(base, values)
        told = training_run(output, run, silent) if long else None  # a training of minutes writes nothing on its way
        started = time.monotonic()
        with bars(silent) as progress:
            if multi_class:
                detectors = Glad.fit_together(paths, base, settings, run=told, progress=progress)
            else:
                detectors = {"": Glad.from_base(base, settings=settings).fit(paths[""], run=told, progress=progress)}
        if main:
            save(detectors, output, told)
    if not silent:
        for name, detector in detectors.items():
            print(f"{output / name}: fitted on {detector.provenance_['images']} good images")
            if values.get("foreground") == "auto":
                print(f"defects were made on {detector.provenance_['foreground']['reason']}")
            print(detector.calibration_.threshold.statement)
        print(f"done in {duration(time.monotonic() - started)}")


def _go_on(model: Path, paths: list[Path], output: Path, quiet: bool) -> None:
    """Have a model learn further images."""
    _one_process("fit --continue")
    detector = load_model(model, None, quiet)
    with bars(quiet) as progress:
        detector.extend(paths, progress=progress)
    detector.save_pretrained(output)
    if not quiet:
        last, provenance = detector.provenance_["continued"][-1], detector.provenance_
        print(f"{output}: learnt {last['learnt']} more good images; {last['held_out']} more were held out")
        print(detector.calibration_.threshold.statement, *(f"note: {note}" for note in provenance["notes"]), sep="\n")


def _images(images: Path, layout: str, category: str | None, multi_class: bool) -> dict[str, list[Path]]:
    """Product -> good images; the name is empty where there is only one."""
    from gladad.data.layouts import read_dataset, training_images

    if not multi_class:
        return {"": training_images(images, layout, category)}
    if category is not None:
        raise ConfigError("--category and --multi-class contradict each other; leave one out")
    dataset = read_dataset(images, layout)
    return {name: [s.image_path for s in dataset.of("train") if s.category == name and not s.gt_label] for name in dataset.categories}


@contextmanager
def alone(base: str, quiet: bool) -> Iterator[tuple[bool, bool]]:
    """Whether this is the process that writes, and whether it is to be silent; the others leave when it has written.

    Raises:
        ConfigError: The model trains in one process, and there are several.
    """
    if process_count() == 1:
        yield True, quiet
        return
    from gladad.models.registry import family_of

    if not family_of(base).LONG:
        raise ConfigError(f"{base} trains in one process; start it without torchrun")
    from gladad.training.loop import make_accelerator

    accelerator = make_accelerator()
    main = bool(accelerator.is_main_process)
    yield main, quiet or not main
    accelerator.wait_for_everyone()
    accelerator.end_training()


def training_run(output: Path, values: dict[str, Any], silent: bool) -> TrainingRun:
    """What a long training writes on its way."""
    from gladad.training.loop import TrainingRun
    from gladad.training.trackers import tracker_name

    tracker_name(values.get("tracker", "auto"))  # refused before anything is loaded
    folder = Path(values.get("folder") or f"{output.absolute()}.training")
    return TrainingRun(**values | {"folder": folder, "tell": teller(silent)})


def save(detectors: dict[str, Glad], output: Path, run: TrainingRun | None) -> None:
    """Write the models, then remove the checkpoints of the training."""
    from gladad.core.storage import share_files

    for name, detector in detectors.items():
        detector.save_pretrained(output / name)
        share_files(output / next(iter(detectors)), output / name)
    if run is not None:
        discard_checkpoints(run)


def discard_checkpoints(run: TrainingRun) -> None:
    """Remove the checkpoints of a training, and of its parts, whose result is saved."""
    from gladad.detector.fit import PARTS
    from gladad.models.stable_diffusion import small
    from gladad.training.checkpoints import discard

    for part in (run, *map(run.part, PARTS)):
        for own in (part, *map(part.part, small.PARTS)):
            if own.folder is not None:
                discard(own.folder)


def _one_process(command: str) -> None:
    if process_count() > 1:
        raise ConfigError(f"gladad {command} runs in one process; start it without torchrun")


@guarded
def calibrate(
    model: Model,
    images: Annotated[Path, typer.Argument(help="Good images; those that the model was trained on are left out.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Another folder than the model's.", show_default=False)] = None,
    ignore: Annotated[Path | None, typer.Option(help="Mask over the image: what is white does not count.", show_default=False)] = None,
    min_area: Annotated[
        float | None, typer.Option(help="Smaller areas do not count: share of the image, such as 0.0005.", show_default=False)
    ] = None,
    count_all: Annotated[bool, typer.Option("--count-all", help="Have everything count again.")] = False,
    false_reject_rate: Rate = None,
    speed: AnotherSpeed = None,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Make a model's thresholds anew from good images, such as after a change of the lighting."""
    from gladad.core.storage import check_target
    from gladad.data.layouts import training_images
    from gladad.decision.scope import Scope

    _one_process("calibrate")
    scope = Scope() if count_all else None
    if ignore is not None or min_area is not None:
        scope = Scope.read(ignore, min_area or 0.0)
    paths = training_images(images, layout, category)
    check_target(output or model)
    detector = load_model(model, false_reject_rate, quiet, speed)
    before = detector.calibration_.threshold.value
    with bars(quiet) as progress:
        detector.calibrate(paths, scope=scope, progress=progress)
    detector.save_pretrained(output or model)
    if not quiet:
        threshold, provenance = detector.calibration_.threshold, detector.provenance_
        left_out = f"; {provenance['left_out']} that the model was trained on were left out" if provenance["left_out"] else ""
        print(f"threshold {before:.4g} -> {threshold.value:.4g} (raw score), from {threshold.n} good images{left_out}")
        print(threshold.statement, *(f"note: {note}" for note in provenance["notes"]), sep="\n")


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
def export(
    model: Model,
    images: Annotated[Path, typer.Argument(help="Good images of the fit, or of the last calibration.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the exported model.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="'onnx' or 'openvino'.")] = "onnx",
    precision: Annotated[str, typer.Option(help="'float32'; openvino: also 'bfloat16'.")] = "float32",
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Write a lite model as graphs that need no PyTorch, with thresholds of their own; refused if one decision differs."""
    from gladad.data.layouts import training_images

    _one_process("export")
    paths = training_images(images, layout, category)
    detector = load_model(model, None, quiet)
    with bars(quiet) as progress:
        found = detector.export(paths, output, form=form, precision=precision, progress=progress)  # type: ignore[arg-type]
    if not quiet:
        alike = f"{found.good} good images and {found.defects} with synthetic defects are decided alike"
        print(f"{output}: {alike}; scores differ by {found.largest:.1e} at most")
