"""The commands for many images and many products: inspect and fit-all, over Ray or, for fits, in processes of this machine."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gladad.cli.common import Layout, Model, Quiet, Rate, duration, guarded, hush, tell_failed, teller
from gladad.cli.console import bars, waiting
from gladad.cli.options import FIT, Set, collects
from gladad.core.errors import Interrupted

if TYPE_CHECKING:
    from gladad.benchmark.workers import Starter

ADDRESS_HELP = "Ray cluster, such as 'auto' or HOST:6379; without one, this machine."
Address = Annotated[str | None, typer.Option(help=ADDRESS_HELP, envvar="RAY_ADDRESS", show_default=False)]
OverRay = Annotated[bool, typer.Option("--ray", help="Run them as tasks of Ray, on the machines of --address.")]


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """Say of Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished {what} are kept, and the same command goes on from there", signal.SIGINT) from None


@contextmanager
def starter(ray: bool, address: str | None) -> Iterator[Starter | None]:
    """Where jobs run: tasks of Ray if wanted, else None, which is here."""
    if not ray:
        yield None
        return
    from gladad.cluster.session import connected
    from gladad.cluster.tasks import RayTasks

    with connected(address) as module:
        yield RayTasks(module)


@guarded
def inspect(
    model: Model,
    manifest: Annotated[Path, typer.Option(help="Parquet or CSV file with the columns id and path.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the Parquet files of results.", show_default=False)],
    maps: Annotated[Path | None, typer.Option(help="Folder for the anomaly maps, an NPZ file for 256 images.", show_default=False)] = None,
    address: Address = None,
    num_actors: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model (default: all that have room).", show_default=False)
    ] = None,
    cpus_per_actor: Annotated[int, typer.Option(min=1, help="Images at a time of each.")] = 1,
    gpus_per_actor: Annotated[float, typer.Option(min=0.0, help="Of each; 0.5 shares one between two.")] = 0.0,
    false_reject_rate: Rate = None,
    quiet: Quiet = False,
) -> None:
    """Inspect a manifest of any length over Ray, on this machine or a cluster. Killed, the same command goes on."""
    with waiting("starting", quiet):
        from gladad.cluster.inspection import Job, inspect_manifest

        hush()
    started = time.monotonic()
    what = Job(model=model, manifest=manifest, output=output, maps=maps, false_reject_rate=false_reject_rate)
    job = replace(what, cpus=cpus_per_actor, gpus=gpus_per_actor)
    with interruptible("blocks"), bars(quiet) as progress:
        done = inspect_manifest(job, address=address, num_actors=num_actors, progress=progress)
    if not quiet:
        inspected = done.images - done.skipped
        counted = f"{inspected} inspected, {done.rejected} rejected, {inspected - done.rejected} accepted, {done.skipped} skipped"
        print(counted + (f"; {done.before} were done before" if done.before else ""))
        print(f"results in {output}, after {duration(time.monotonic() - started)}")


@guarded
@collects(values=FIT)
def fit_all(
    data: Annotated[Path, typer.Argument(help="Data set with one or several products.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that gets a model for each product.", show_default=False)],
    base: Annotated[str, typer.Option(help="'lite' or a baseline.")] = "lite",
    set: Set = None,
    layout: Layout = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Fits at a time; they share the cores.")] = 1,
    ray: OverRay = False,
    address: Address = None,
    quiet: Quiet = False,
    *,
    values: dict[str, Any],
) -> None:
    """Fit a model for every product of a data set; those that are done are passed over, and the same command goes on."""
    from gladad.core.settings import parse_assignments

    with waiting("starting", quiet):
        from gladad.cluster.fits import plan_fits, run_fits
        from gladad.models.registry import make_settings

        hush()
    settings = make_settings(base, values | parse_assignments(set or ()))
    fits = plan_fits(data, output, base, settings, layout)
    with interruptible("models"), starter(ray, address) as workers:
        failed = run_fits(fits, base, settings, jobs=jobs, tell=teller(quiet), workers=workers)
    if not quiet:
        print(f"{len(fits) - len(failed)} of {len(fits)} products are fitted: {output}")
    tell_failed((fit.product, problem) for fit, problem in failed)
