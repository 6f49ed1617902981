"""The commands that measure: evaluate, rescore, data and benchmark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from gladad.cli.cluster import Address, OverRay, interruptible, starter
from gladad.cli.common import (
    AnotherSpeed,
    Category,
    Layout,
    Model,
    Quiet,
    Rate,
    guarded,
    load_inspector,
    show_report,
    tell_failed,
    tell_skipped,
    teller,
)
from gladad.cli.console import bars, show, waiting
from gladad.core.errors import ConfigError

if TYPE_CHECKING:
    from gladad.core.records import Sample
    from gladad.data.checks import Finding, Inventory
    from gladad.data.layouts import Dataset

SHOWN_FILES = 10


@guarded
def evaluate(
    model: Model,
    dataset: Annotated[Path, typer.Argument(help="Category with test/good/ and test/<defect>/.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.", show_default=False)],
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Write full-size pictures beside the page.")] = True,
    keep_maps: Annotated[bool, typer.Option("--keep-maps", help="Keep the maps for 'gladad rescore', 0.3 MB per image.")] = False,
    false_reject_rate: Rate = None,
    speed: AnotherSpeed = None,
    category: Category = None,
    layout: Layout = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure a model on labelled images: report.json, predictions.csv, report.md and index.html."""
    from gladad.core.processes import started
    from gladad.data.layouts import labelled_samples
    from gladad.evaluation.run import evaluate as measure
    from gladad.evaluation.run import leftovers, write_report
    from gladad.evaluation.stored_maps import FOLDER as MAPS
    from gladad.report.files import check_output, output_folder
    from gladad.report.gallery import FOLDER as PICTURES
    from gladad.report.gallery import GalleryItem

    def find() -> list[Sample]:
        samples = labelled_samples(dataset, layout, category)
        check_output(output)
        return samples

    with started() as processes:
        silent = quiet or not processes.main
        samples = processes.on_main(find)
        detector = load_inspector(model, false_reject_rate, speed, silent)
        items: list[GalleryItem] = []
        with bars(silent) as progress, processes.one(lambda: output_folder(output)) as folder:
            folders = {"pictures": folder / PICTURES if pictures else None, "maps": folder / MAPS if keep_maps else None}
            report = measure(detector, samples, collect=items.append, progress=progress, processes=processes, **folders)
            if processes.main:
                write_report(report, items, folder, title=f"{samples[0].category}: evaluation")
                stale = leftovers(output, report)
    if not processes.main:
        return
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    tell_skipped(report.rows)
    if not quiet:
        show_report(report)
        print(f"report: {output / 'index.html'}")


@guarded
def rescore(
    report: Annotated[Path, typer.Argument(help="Folder that 'gladad evaluate --keep-maps' wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Another folder for the new report.", show_default=False)] = None,
    false_reject_rate: Rate = None,
    max_fpr: Annotated[float | None, typer.Option(help="Another limit of AUPRO than the report's.", show_default=False)] = None,
    quiet: Quiet = False,
) -> None:
    """Measure again from the kept maps, without model and images, and write the report anew."""
    from gladad.evaluation.rescoring import rescore as measure
    from gladad.evaluation.run import write_report
    from gladad.report.files import check_output

    target = report if output is None else output
    if output is not None:
        check_output(output)
    with bars(quiet) as progress:
        fresh, items, title = measure(report, target, false_reject_rate=false_reject_rate, max_fpr=max_fpr, progress=progress)
    page = write_report(fresh, items, target, title)
    if not quiet:
        show_report(fresh)
        print(f"report: {page}")


@guarded
def data(
    path: Annotated[Path, typer.Argument(help="Data set: folder or manifest.", show_default=False)],
    layout: Layout = "auto",
    category: Category = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show what a data set holds and what is wrong with it; exit status 1 if results would be."""
    from gladad.core.storage import printable
    from gladad.data.checks import check_dataset
    from gladad.data.layouts import read_dataset

    dataset = read_dataset(path, layout, category)
    with bars(quiet) as progress:
        inventory = check_dataset(dataset, progress=progress)
    if as_json:
        about = {"path": printable(path), "layout": dataset.layout, "unlabelled": dataset.unlabelled}
        about |= {"notes": [printable(note) for note in dataset.notes]} | inventory.to_json()
        print(json.dumps(about, indent=2))
    else:
        if not quiet:
            _show_content(dataset, inventory)
        for finding in inventory.findings:
            if finding.serious or not quiet:
                print(*_lines(finding, dataset), sep="\n")
        if inventory.sound and not quiet:
            print("no problems found")
    if not inventory.sound:
        raise typer.Exit(1)


def _show_content(dataset: Dataset, inventory: Inventory) -> None:
    """Print what is in a data set."""
    from gladad.core.storage import printable
    from gladad.data.checks import describe_sizes

    table = Table("category", "split", "kind", Column("images", justify="right"), Column("with mask", justify="right"))
    counts = sorted(inventory.counts.items())
    show(table, ((printable(key[0]), key[1], printable(key[2]), count, inventory.masks[key] or "") for key, count in counts))
    left_out = f", {dataset.unlabelled} images without a label left out" if dataset.unlabelled else ""
    print(f"layout {dataset.layout}, {len(dataset.samples)} labelled images{left_out}")
    for name, sizes in sorted(inventory.sizes.items()):
        print(f"{printable(name)}: {describe_sizes(sizes)}")
    for note in dataset.notes:
        print(f"note: {printable(note)}")


def _lines(finding: Finding, dataset: Dataset) -> Iterator[str]:
    """A finding for people, with some of its files."""
    from gladad.core.storage import printable
    from gladad.data.checks import short_name

    number = f"{len(finding.paths)} " if finding.paths else ""
    yield f"{'problem' if finding.serious else 'note'}: {number}{printable(finding.text)}"
    for file, remark in list(zip(finding.paths, finding.remarks, strict=True))[:SHOWN_FILES]:
        yield f"    {short_name(file, dataset)}{f': {printable(remark)}' if remark else ''}"
    if len(finding.paths) > SHOWN_FILES:
        yield f"    and {len(finding.paths) - SHOWN_FILES} more"


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
    ray: OverRay = False,
    address: Address = None,
    tables: Annotated[bool, typer.Option("--tables", help="Run nothing, write the tables of what is finished.")] = False,
    list_shipped: Annotated[bool, typer.Option("--list", help="Print the names of those that are shipped.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare detectors on data sets; resumes where it stopped. Writes results.md, results.csv and results.json."""
    from gladad.benchmark.config import read_config, shipped_names

    if list_shipped:
        for name in shipped_names():
            print(f"{name}: {read_config(name).title}")
        return
    if not config:
        raise ConfigError("give a TOML file or the name of a shipped benchmark; gladad benchmark --list prints those")
    chosen = read_config(config)
    with waiting("starting", quiet):
        from gladad.benchmark.plan import finished, plan, run, runnable, select
        from gladad.benchmark.products import prepared
        from gladad.benchmark.tables import write_tables
        from gladad.report.files import check_output

    tell = teller(quiet)
    check_output(output)
    chosen, unmade = prepared(chosen, output / "products", data, category)
    everything, notes = plan(chosen, data, seeds=seed or ())
    notes += unmade
    cells = select(everything, shift=shift, configuration=configuration, category=category, seed=seed or chosen.seeds)
    cells, missing = runnable(cells)
    for note in (*notes, *missing):
        tell(f"note: {note}")
    with interruptible("cells"), starter(ray and not tables, address) as workers:
        failed = [] if tables else run(cells, output, jobs=jobs, tell=tell, workers=workers)
    # The tables are of everything that is finished, not only of what was chosen this time.
    page = write_tables(output, chosen.title, finished(everything, output), failed, notes)
    if not quiet:
        print(f"{len(finished(cells, output))} of {len(cells)} cells finished, {len(failed)} failed: {page}")
    tell_failed((cell.label, problem) for cell, problem in failed)
