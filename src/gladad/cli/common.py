"""What the commands have in common: their options, errors as one line, and loading a model."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.table import Table

from gladad.cli.console import show, waiting
from gladad.core.errors import GladError, Interrupted

if TYPE_CHECKING:
    from gladad.core.records import Report
    from gladad.detector.glad import Glad

P = ParamSpec("P")
DEBUG = "GLADAD_DEBUG"

Layout = Annotated[str, typer.Option(help="How the data set lies on disk; 'auto' looks. See docs/datasets.md.")]
Category = Annotated[str | None, typer.Option(help="Which product of a data set with several.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Model = Annotated[Path, typer.Argument(help="Folder that 'gladad fit' wrote.", show_default=False)]
Images = Annotated[Path, typer.Argument(help="Folder of good images, or a category with train/good/.", show_default=False)]
Rate = Annotated[float | None, typer.Option(min=0.0, max=0.5, help="Another false-reject rate than the model's.", show_default=False)]

AnotherSpeed = Annotated[
    str | None, typer.Option("--speed", help="Another speed than the model's, of Stable Diffusion.", show_default=False)
]


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
            complain("interrupted; no result was written")
            raise typer.Exit(130) from None
        except typer.Exit:
            raise
        except Interrupted as stop:
            complain(str(stop))
            raise typer.Exit(128 + stop.signal if stop.signal else 0) from None
        except Exception as error:
            if debug:
                traceback.print_exc()
            complain(f"error: {_sentence(error)}")
            raise typer.Exit(1) from None

    return run


def _sentence(error: Exception) -> str:
    """What went wrong, for people."""
    if isinstance(error, GladError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "not enough memory; use smaller images (--image-size) or fewer (--max-images)"
    return f"unexpected {type(error).__name__}: {error} (set {DEBUG}=1 to see where)"


def complain(message: str) -> None:
    """One line on standard error."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def tell_failed(failed: Iterable[tuple[str, str]]) -> None:
    """Names and reasons of jobs that failed on standard error, and exit status 1 if there are any."""
    lines = [f"failed: {name}: {problem}" for name, problem in failed]
    for line in lines:
        complain(line)
    if lines:
        raise typer.Exit(1)


def teller(silent: bool) -> Callable[[str], None]:
    """`complain`, or a function that does nothing."""
    return (lambda message: None) if silent else complain


def tell_skipped(rows: Iterable[Mapping[str, Any]]) -> None:
    """A line for every image that could not be inspected."""
    for row in rows:
        if "error" in row:
            complain(f"skipped: {row['error']}")


def show_report(report: Report) -> None:
    """Print the numbers of an evaluation as a table."""
    from gladad.report.text import cell, counted, headline, interval, summary

    rows = [(name.replace("_", " "), cell(name, value), interval(report, name)) for name, value in summary(report)]
    show(Table("metric", "value", "95 % interval"), rows)
    counts = ", ".join(f"{name}: {count}" for name, count in counted(report))
    print(headline(report), counts, *report.details["notes"], report.details["guarantee"], sep="\n")


def hush(downloads: bool = False) -> None:
    """Keep libraries off standard error, but for the bars of downloads where they are wanted and someone looks."""
    for library in ("diffusers", "transformers"):
        if module := sys.modules.get(f"{library}.utils.logging"):
            module.set_verbosity_error()
            module.disable_progress_bar()
    if downloads and sys.stderr.isatty() and (hub := sys.modules.get("huggingface_hub.utils")):
        hub.enable_progress_bars()


def load_inspector(model: Path, false_reject_rate: float | None, speed: str | None, quiet: bool) -> Glad:
    """`load_model`; tells people where the thresholds are of another speed."""
    detector = load_model(model, false_reject_rate, quiet, speed)
    caveat = detector.describe()["caveat"]
    if caveat is not None and not quiet:
        complain(f"{model}: {caveat}")
    return detector


def load_model(model: Path, false_reject_rate: float | None, quiet: bool, speed: str | None = None) -> Glad:
    """A saved model, at another false-reject rate or speed if one is given."""
    with waiting("loading the model", quiet):
        from gladad.detector.glad import Glad

        hush()
        detector = Glad.from_pretrained(model, speed=speed)
    if false_reject_rate is not None:
        detector.set_false_reject_rate(false_reject_rate)
    return detector


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
