"""The ``gladad`` command: predict, info, demo, those that make models (`gladad.cli.fit`) and those that measure (`gladad.cli.measure`).

Results go to standard output, progress and errors to standard error. A mistake of the user is one line and exit status 1. Heavy imports
are inside the commands, so that ``gladad --help`` answers at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from gladad import __version__
from gladad.cli.cluster import fit_all, inspect
from gladad.cli.common import (
    AnotherSpeed,
    Model,
    Quiet,
    Rate,
    duration,
    guarded,
    hush,
    load_inspector,
    load_model,
    show_report,
    tell_skipped,
)
from gladad.cli.console import bars, show, waiting
from gladad.cli.diffusion import convert, plan, tune_features, tune_vae
from gladad.cli.fit import calibrate, export, fit, merge
from gladad.cli.measure import benchmark, data, evaluate, rescore
from gladad.cli.serve import audit, serve, station
from gladad.cli.watch import watch
from gladad.core.errors import DataError, GladError, NotFiniteError

if TYPE_CHECKING:
    from gladad.core.processes import Processes
    from gladad.core.records import Prediction, Progress
    from gladad.detector.glad import Glad
    from gladad.report.files import PredictionWriter

app = typer.Typer(
    help="Unsupervised visual anomaly detection with diffusion models: learn from good parts, find bad ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the arguments are without the program's name, None takes the process's.

    Returns:
        Exit status: 0 done, 1 the input's fault, 2 wrong usage, 130 interrupted.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="gladad")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gladad {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


app.command()(fit)


@app.command()
@guarded
def predict(
    model: Model,
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", show_default=False)],
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Write overlays and masks.")] = True,
    false_reject_rate: Rate = None,
    speed: AnotherSpeed = None,
    quiet: Quiet = False,
) -> None:
    """Inspect images: predictions.jsonl, predictions.csv, overlays/ and masks/."""
    from gladad.core.processes import started
    from gladad.data.samples import expand_paths
    from gladad.report.files import PredictionWriter, check_output, output_folder

    def find() -> list[Path]:
        own = output.resolve()  # the overlays of an earlier run are not to be inspected
        images = [image for image in expand_paths(paths) if not image.resolve().is_relative_to(own)]
        if not images:
            raise DataError(f"{paths[0]}: no images but the results of an earlier run")
        check_output(output)
        return images

    with started() as processes:
        silent = quiet or not processes.main
        images = processes.on_main(find)
        detector = load_inspector(model, false_reject_rate, speed, silent)
        with bars(silent) as progress, processes.one(lambda: output_folder(output)) as folder:
            writer = PredictionWriter(folder, pictures=pictures)
            _inspect(detector, images, writer, processes, progress)
            writer.rows = rows = processes.merge(writer.rows)
            if processes.main:
                tell_skipped(rows)
            if all("error" in row for row in rows):
                raise DataError(f"none of the {len(images)} images could be inspected; nothing was written")
            if processes.main:
                writer.close()
    if not silent:
        seconds = [row["seconds"] for row in rows if "error" not in row]
        rejected, skipped = sum(row.get("pred_label", 0) for row in rows), len(rows) - len(seconds)
        each = f"{median(seconds):.3f} s each (median)"
        print(f"{len(seconds)} inspected, {rejected} rejected, {len(seconds) - rejected} accepted, {skipped} skipped, {each}")
        if whole := sum(row.get("pred_label", 0) and not row["regions"] for row in rows):
            print(f"{whole} rejected as a whole: unusual all over, with no single place above the limit of the map")
        print(f"results in {output}")


def _inspect(detector: Glad, images: Sequence[Path], writer: PredictionWriter, processes: Processes, progress: Progress) -> None:
    """Give the writer this process's share of the images, in order; those that cannot be inspected with the reason."""
    from gladad.core.images import load_image
    from gladad.core.storage import printable
    from gladad.report.files import picture_names

    names = picture_names(images)

    def inspect(number: int) -> Prediction | GladError:
        try:
            pixels = load_image(images[number])
            prediction = detector.inspect(pixels, reconstruct=False)
        except DataError as error:
            return error
        except NotFiniteError as error:
            return NotFiniteError(f"{printable(images[number])}: {error}")
        writer.draw(prediction, pixels, names[number])
        return prediction

    with closing(processes.share(inspect, len(images), detector.workers)) as outcomes:
        for number, outcome in outcomes:
            if isinstance(outcome, GladError):
                writer.fail(images[number], outcome)
            else:
                writer.add(outcome, images[number], names[number])
            progress("inspecting", min(number + processes.count, len(images)), len(images))


for command in (
    fit_all,
    inspect,
    evaluate,
    rescore,
    calibrate,
    export,
    data,
    benchmark,
    plan,
    tune_features,
    tune_vae,
    merge,
    convert,
    serve,
    watch,
):
    app.command()(command)
app.add_typer(station, name="station")
app.add_typer(audit, name="audit")


@app.command()
@guarded
def info(model: Model, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what a model was made from and how it decides."""
    description = load_model(model, None, quiet=as_json).describe()
    if as_json:
        print(json.dumps(description, indent=2, sort_keys=True))
        return
    # As the training has resolved them; the rate may have been chosen anew since.
    resolved = description["config"].pop("settings") | {"false_reject_rate": description["settings"]["false_reject_rate"]}
    show(Table("", Column(overflow="fold"), show_header=False, box=None), _flat(description | {"settings": resolved}))


@app.command()
@guarded
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page of pictures.")] = Path("demo"),
    quiet: Quiet = False,
) -> None:
    """Learn from real solar cells that work, find the broken ones, and show it on a page."""
    with waiting("starting", quiet):
        from gladad.cli.demo import run

        hush()
    started = time.monotonic()
    with bars(quiet) as progress:
        report, page = run(output, progress=progress)
    if not quiet:
        show_report(report)
        print(f"done in {duration(time.monotonic() - started)}; open it in a browser: {page}")


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with dotted names; settings that are not set are left out."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        elif item is not None:
            yield prefix + key, item
