"""The ``gladad`` command: fit, predict, evaluate, rescore, data, info, demo.

Results go to standard output, progress and errors to standard error. A mistake of the user is one line and exit status 1. Heavy imports
are inside the commands, so that ``gladad --help`` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gladad import __version__
from gladad.console import bars, waiting
from gladad.errors import ConfigError, DataError, GladError

if TYPE_CHECKING:
    from gladad.detector import Glad
    from gladad.types import Prediction, Report

P = ParamSpec("P")
DEBUG = "GLADAD_DEBUG"
SHOWN_FILES = 10

app = typer.Typer(
    help="Unsupervised visual anomaly detection with diffusion models: learn from good parts, find bad ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


Layout = Annotated[str, typer.Option(help="How the data set lies on disk; 'auto' looks. See docs/datasets.md.")]
Category = Annotated[str | None, typer.Option(help="Which product of a data set with several.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Model = Annotated[Path, typer.Argument(help="Folder that 'gladad fit' wrote.", show_default=False)]
Rate = Annotated[float | None, typer.Option(min=0.0, max=0.5, help="Another false-reject rate than the model's.", show_default=False)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        Exit status: 0 done, 1 the input's fault, 2 wrong usage, 130 interrupted.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="gladad")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what goes wrong in a command into one line and an exit status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(os.environ.get(DEBUG))
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.simplefilter("ignore")
                command(*args, **kwargs)
        except KeyboardInterrupt:
            _complain("interrupted; nothing was written")
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            _complain(f"error: {_describe(error)}")
            raise typer.Exit(1) from None

    return run


def _describe(error: Exception) -> str:
    if isinstance(error, GladError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "not enough memory; use smaller images (--image-size) or fewer (--max-images)"
    return f"unexpected {type(error).__name__}: {error} (set {DEBUG}=1 to see where)"


def _complain(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gladad {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
@guarded
def fit(
    images: Annotated[Path, typer.Argument(help="Folder of good images, or a category with train/good/.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model.", show_default=False)],
    base: Annotated[str, typer.Option(help="'lite', or folder or Hub id of a Stable Diffusion in diffusers form.")] = "lite",
    minutes: Annotated[float | None, typer.Option(help="Time budget of the training (lite).", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps instead of a time budget.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    false_reject_rate: Annotated[float, typer.Option(help="Share of good parts that may be rejected.")] = 0.01,
    textures: Annotated[Path | None, typer.Option(help="Folder of images to make defects from.", show_default=False)] = None,
    foreground: Annotated[
        Foreground, typer.Option(help="Part of the image where defects are made; auto decides by the good images.")
    ] = Foreground.all,
    product: Annotated[Product, typer.Option(help="Object with structure, or texture (lite).")] = Product.auto,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels to work at [256 for lite].", show_default=False)] = None,
    max_images: Annotated[int, typer.Option(help="Good images used at most.")] = 1000,
    shots: Annotated[int | None, typer.Option(help="Learn from so few good images (1, 2, 4, 8).", show_default=False)] = None,
    features: Annotated[str | None, typer.Option(help="Extractor of other bases: folder or Hub id.", show_default=False)] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published constants, such as mvtec_ad/bottle (other bases).", show_default=False)
    ] = None,
    calibration: Annotated[CalibrationWay, typer.Option(help="Images the threshold is made from.")] = CalibrationWay.auto,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Learn from good images and write a model."""
    from gladad.datasets import training_images
    from gladad.storage import check_target

    paths = training_images(images, layout, category)
    check_target(output)
    with waiting("starting", quiet):
        from gladad.bases import FitSettings
        from gladad.detector import Glad

        _hush(downloads=base != "lite" and not quiet)

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
        calibration=calibration.value,
    )
    started = time.monotonic()
    with bars(quiet) as progress:
        detector = Glad.from_base(base, settings=settings).fit(paths, progress=progress)
    detector.save_pretrained(output)
    if not quiet:
        print(f"{output}: fitted on {detector.provenance_['images']} good images in {_duration(time.monotonic() - started)}")
        if foreground is Foreground.auto:
            print(f"defects were made on {detector.provenance_['foreground']['reason']}")
        print(detector.calibration_.threshold.statement)


@app.command()
@guarded
def predict(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)],
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Write overlays and masks.")] = True,
    false_reject_rate: Rate = None,
    quiet: Quiet = False,
) -> None:
    """Inspect images: predictions.jsonl, predictions.csv, overlays/ and masks/."""
    from gladad.data import expand_paths
    from gladad.images import load_image
    from gladad.parallel import in_order
    from gladad.results import PredictionWriter, check_output, output_folder, picture_names

    own = output.resolve()  # the overlays of an earlier run are not to be inspected
    images = [image for image in expand_paths(paths) if not image.resolve().is_relative_to(own)]
    if not images:
        raise DataError(f"{paths[0]}: no images but the results of an earlier run")
    check_output(output)
    detector = _load(model, false_reject_rate, quiet)
    rejected, seconds = 0, []
    with bars(quiet) as progress, output_folder(output) as folder:
        writer = PredictionWriter(folder, pictures=pictures)

        def inspect(item: tuple[Path, Path]) -> Prediction | DataError:
            image, name = item
            try:
                pixels = load_image(image)
                prediction = detector.inspect(pixels, reconstruct=False)
            except DataError as error:
                return error
            writer.draw(prediction, pixels, name)
            return prediction

        names = picture_names(images)
        outcomes = in_order(inspect, zip(images, names, strict=True), detector.workers)
        for done, (image, name, outcome) in enumerate(zip(images, names, outcomes, strict=True), start=1):
            if isinstance(outcome, DataError):
                _complain(f"skipped: {outcome}")
                writer.fail(image, outcome)
            else:
                writer.add(outcome, image, name)
                rejected += outcome.pred_label
                seconds.append(outcome.seconds)
            progress("inspecting", done, len(images))
        if not seconds:
            raise DataError(f"none of the {len(images)} images could be inspected; nothing was written")
        writer.close()
    skipped = len(images) - len(seconds)
    if not quiet:
        each = f"{median(seconds):.3f} s each (median)"
        print(f"{len(seconds)} inspected, {rejected} rejected, {len(seconds) - rejected} accepted, {skipped} skipped, {each}")
        print(f"results in {output}")


@app.command()
@guarded
def evaluate(
    model: Model,
    dataset: Annotated[Path, typer.Argument(help="Category with test/good/ and test/<defect>/.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.", show_default=False)],
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Write full-size pictures beside the page.")] = True,
    keep_maps: Annotated[bool, typer.Option("--keep-maps", help="Keep the maps for 'gladad rescore', 0.3 MB per image.")] = False,
    false_reject_rate: Rate = None,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure a model on labelled images: report.json, predictions.csv, report.md and index.html."""
    from gladad.datasets import labelled_samples
    from gladad.evaluation import evaluate as measure
    from gladad.evaluation import leftovers, write_report
    from gladad.gallery import FOLDER as PICTURES
    from gladad.gallery import GalleryItem
    from gladad.kept_maps import FOLDER as MAPS
    from gladad.results import check_output, output_folder

    samples = labelled_samples(dataset, layout, category)
    check_output(output)
    detector = _load(model, false_reject_rate, quiet)
    items: list[GalleryItem] = []
    with bars(quiet) as progress, output_folder(output) as folder:
        report = measure(
            detector,
            samples,
            collect=items.append,
            progress=progress,
            pictures=folder / PICTURES if pictures else None,
            maps=folder / MAPS if keep_maps else None,
        )
        write_report(report, items, folder, title=f"{samples[0].category}: evaluation")
        stale = leftovers(output, report)
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    for row in report.rows:
        if "error" in row:
            _complain(f"skipped: {row['error']}")
    if not quiet:
        show_report(report)
        print(f"report: {output / 'index.html'}")


@app.command()
@guarded
def rescore(
    report: Annotated[Path, typer.Argument(help="Folder that 'gladad evaluate --keep-maps' wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Another folder for the new report.", show_default=False)] = None,
    false_reject_rate: Rate = None,
    max_fpr: Annotated[float | None, typer.Option(help="Another limit of AUPRO than the report's.", show_default=False)] = None,
    quiet: Quiet = False,
) -> None:
    """Measure again from the kept maps, without model and images, and write the report anew."""
    from gladad.evaluation import write_report
    from gladad.rescoring import rescore as measure
    from gladad.results import check_output

    target = report if output is None else output
    if output is not None:
        check_output(output)
    with bars(quiet) as progress:
        fresh, items, title = measure(report, target, false_reject_rate=false_reject_rate, max_fpr=max_fpr, progress=progress)
    page = write_report(fresh, items, target, title)
    if not quiet:
        show_report(fresh)
        print(f"report: {page}")


@app.command()
@guarded
def data(
    path: Annotated[Path, typer.Argument(help="Data set: folder or manifest.", show_default=False)],
    layout: Layout = "auto",
    category: Category = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show what a data set holds and what is wrong with it; exit status 1 if results would be."""
    from gladad.data_checks import check_dataset, describe_sizes, short_name
    from gladad.datasets import read_dataset
    from gladad.results import readable

    dataset = read_dataset(path, layout, category)
    with bars(quiet) as progress:
        inventory = check_dataset(dataset, progress=progress)
    if as_json:
        about = {"path": readable(path), "layout": dataset.layout, "unlabelled": dataset.unlabelled}
        about |= {"notes": [readable(note) for note in dataset.notes]} | inventory.to_json()
        print(json.dumps(about, indent=2))
    else:
        if not quiet:
            numbers = (Column("images", justify="right"), Column("with mask", justify="right"))
            table = Table("category", "split", "kind", *numbers)
            for (name, split, kind), count in sorted(inventory.counts.items()):
                table.add_row(Text(readable(name)), split, Text(readable(kind)), str(count), str(inventory.masks[name, split, kind] or ""))
            Console().print(table)
            left_out = f", {dataset.unlabelled} images without a label left out" if dataset.unlabelled else ""
            print(f"layout {dataset.layout}, {len(dataset.samples)} labelled images{left_out}")
            for name, sizes in sorted(inventory.sizes.items()):
                print(f"{readable(name)}: {describe_sizes(sizes)}")
            for note in dataset.notes:
                print(f"note: {readable(note)}")
        for finding in inventory.findings:
            if finding.serious or not quiet:
                number = f"{len(finding.paths)} " if finding.paths else ""
                print(f"{'problem' if finding.serious else 'note'}: {number}{readable(finding.text)}")
                for file, remark in list(zip(finding.paths, finding.remarks, strict=True))[:SHOWN_FILES]:
                    print(f"    {short_name(file, dataset)}{f': {readable(remark)}' if remark else ''}")
                if len(finding.paths) > SHOWN_FILES:
                    print(f"    and {len(finding.paths) - SHOWN_FILES} more")
        if inventory.sound and not quiet:
            print("no problems found")
    if not inventory.sound:
        raise typer.Exit(1)


@app.command()
@guarded
def benchmark(
    config: Annotated[str, typer.Argument(help="TOML file, or the name of one that is shipped (--list).", show_default=False)] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for cells, models and tables.")] = Path("benchmark"),
    data: Annotated[Path, typer.Option(help="Folder that the data sets lie in.", envvar="GLADAD_DATA")] = Path(),
    shift: Annotated[bool, typer.Option("--shift", help="Shifted test images and contaminated training images too.")] = False,
    configuration: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.", show_default=False)] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.", show_default=False)] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Instead of the file's; may be repeated.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
    tables: Annotated[bool, typer.Option("--tables", help="Run nothing, write the tables of what is finished.")] = False,
    list_shipped: Annotated[bool, typer.Option("--list", help="Print the names of those that are shipped.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare detectors on data sets; resumes where it stopped. Writes results.md, results.csv and results.json."""
    from gladad.benchmark_config import read_config, shipped_names

    if list_shipped:
        for name in shipped_names():
            print(f"{name}: {read_config(name).title}")
        return
    if not config:
        raise ConfigError("give a TOML file or the name of a shipped benchmark; gladad benchmark --list prints those")
    chosen = read_config(config)
    with waiting("starting", quiet):
        from gladad.benchmark import Outcome, finished, plan, run
        from gladad.benchmark_tables import write_tables
        from gladad.results import check_output

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    check_output(output)
    cells, notes = plan(chosen, data, shift=shift, configurations=configuration or (), categories=category or (), seeds=seed or ())
    for note in notes:
        tell(f"note: {note}")
    try:
        failed = [] if tables else run(cells, output, jobs=jobs, tell=tell)
    except KeyboardInterrupt:
        _complain("interrupted; finished cells are kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    outcome = Outcome(finished(cells, output), failed, notes)
    page = write_tables(output, chosen.title, outcome)
    if not quiet:
        print(f"{len(outcome.finished)} of {len(cells)} cells finished, {len(outcome.failed)} failed: {page}")
    if outcome.failed:
        for cell, problem in outcome.failed:
            _complain(f"failed: {cell.label}: {problem}")
        raise typer.Exit(1)


@app.command()
@guarded
def info(model: Model, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what a model was made from and how it decides."""
    description = _load(model, None, quiet=as_json).describe()
    if as_json:
        print(json.dumps(description, indent=2, sort_keys=True))
        return
    table = Table("", Column(overflow="fold"), show_header=False, box=None)
    for key, value in _flat(description):
        table.add_row(Text(key), Text(str(value)))
    Console().print(table)


@app.command()
@guarded
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page of pictures.")] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """Learn from real solar cells that work, find the broken ones, and show it on a page."""
    with waiting("starting", quiet):
        from gladad.demo import run

        _hush()

    started = time.monotonic()
    with bars(quiet) as progress:
        report, page = run(output, progress=progress)
    if not quiet:
        show_report(report)
        print(f"done in {_duration(time.monotonic() - started)}; open it in a browser: {page}")


def show_report(report: Report) -> None:
    """Print the numbers of an evaluation as a table."""
    from gladad.report_text import cell, headline, interval, summary

    table = Table("metric", "value", "95 % interval")
    for name, value in summary(report):
        table.add_row(name.replace("_", " "), cell(name, value), interval(report, name))
    Console().print(table)
    print(headline(report))
    print(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in report.counts.items()))
    for note in [*report.details["notes"], report.details["guarantee"]]:
        print(note)


def _hush(downloads: bool = False) -> None:
    """Keep libraries off standard error, but for the bars of downloads where they are wanted and someone looks."""
    for library in ("diffusers", "transformers"):
        if module := sys.modules.get(f"{library}.utils.logging"):
            module.set_verbosity_error()
            module.disable_progress_bar()
    if downloads and sys.stderr.isatty() and (hub := sys.modules.get("huggingface_hub.utils")):
        hub.enable_progress_bars()


def _load(model: Path, false_reject_rate: float | None, quiet: bool) -> Glad:
    with waiting("loading the model", quiet):
        from gladad.detector import Glad

        _hush()
        detector = Glad.from_pretrained(model)
    if false_reject_rate is not None:
        detector.set_false_reject_rate(false_reject_rate)
    return detector


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with dotted names; settings that are not set are left out."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        elif item is not None:
            yield prefix + key, item


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
