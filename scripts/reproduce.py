"""From a data set and a card to a table beside the published numbers: checks first, then the benchmark, which goes on where it was stopped.

    python scripts/reproduce.py --data DATA -o runs/reproduce [--benchmark mvtec_ad] [--configuration "GLAD, published constants"]
    python scripts/reproduce.py ... --check     # only the checks, with what the run would take

Before anything is trained: are all categories there, can the base be found or downloaded, does its training fit the card's memory, is there
room on the disk. ``--base``, ``--set`` and ``--category`` change what is run, for a try; the published numbers are of the whole.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from gladad.benchmark.config import BenchmarkConfig, ShiftEntry, read_config
from gladad.benchmark.plan import Cell, finished, run, select
from gladad.benchmark.plan import plan as planned
from gladad.benchmark.tables import write_tables
from gladad.core.errors import ConfigError, DataError, GladError
from gladad.core.settings import parse_assignments
from gladad.models.registry import make_settings
from gladad.models.stable_diffusion.architectures import read_configs
from gladad.models.stable_diffusion.components import locate_base
from gladad.models.stable_diffusion.device import available_memory, bytes_text, choose_device
from gladad.models.stable_diffusion.memory import check_fits, plan_training
from gladad.models.stable_diffusion.settings import DEFAULT_STEPS, StableDiffusionSettings

PUBLISHED = {  # image AUROC, pixel AUROC, AUPRO, per cent (paper; docs/reproduce.md has all)
    ("mvtec_ad", "GLAD, published constants"): (99.3, 98.6, 95.3),
    ("mvtec_ad", "GLAD, published constants, one model for all"): (97.5, 97.4, 93.0),
    ("visa", "GLAD, published constants, one model for all"): (91.8, 97.4, 91.5),
}
METRICS = ("image_auroc", "pixel_auroc", "aupro")


def main(argv: list[str] | None = None) -> int:
    """Check, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--benchmark", default="mvtec_ad")
    parser.add_argument("--configuration", default="GLAD, published constants")
    parser.add_argument("--category", action="append")
    parser.add_argument("--base")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        config = chosen(arguments.benchmark, arguments.configuration, arguments.base, arguments.set, arguments.category)
        everything, notes = planned(config, arguments.data)
        cells = select(everything)
        check(config, cells, notes, arguments.output)
        if arguments.check:
            return 0
        failed = run(cells, arguments.output, tell=lambda line: print(line, flush=True))
        page = write_tables(arguments.output, config.title, finished(cells, arguments.output), failed, notes)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    except GladError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(finished(cells, arguments.output), len(cells), PUBLISHED.get((arguments.benchmark, arguments.configuration)))
    print(f"all tables: {page}")
    return 1 if failed else 0


def chosen(benchmark: str, name: str, base: str | None, changes: list[str], categories: list[str] | None) -> BenchmarkConfig:
    """One configuration of a shipped benchmark, at its first seed, perhaps changed."""
    config = read_config(benchmark)
    known = {one.name: one for one in config.configuration}
    if name not in known:
        raise ConfigError(f"--configuration must be one of {', '.join(known)}, not {name!r}")
    if malformed := [change for change in changes if "=" not in change]:
        raise ConfigError(f"--set takes NAME=VALUE, not {malformed[0]!r}")
    settings = known[name].settings | parse_assignments(changes)
    one = replace(known[name], base=base or known[name].base, settings=settings)
    datasets = tuple(replace(entry, categories=tuple(categories or entry.categories)) for entry in config.dataset)
    return replace(config, seeds=config.seeds[:1], configuration=(one,), dataset=datasets, shift=ShiftEntry())


def check(config: BenchmarkConfig, cells: list[Cell], notes: list[str], output: Path) -> None:
    """Print what the run takes, and refuse what cannot end well.

    Raises:
        DataError: A category is not there.
        ConfigError: Memory or disk do not suffice.
        ModelFormatError: The base cannot be found.
    """
    one, wanted = config.configuration[0], sum(len(entry.categories) for entry in config.dataset)
    if notes or (not one.multi_class and len(cells) < wanted):
        raise DataError("; ".join(notes) or f"{len(cells)} of {wanted} categories are there")
    settings = make_settings(one.base, one.values(config.dataset[0].categories[0]))
    if not isinstance(settings, StableDiffusionSettings):
        raise ConfigError(f"{one.base} has nothing to be checked beforehand; run gladad benchmark --configuration {one.name!r}")
    device, size = choose_device(), (settings.image_size or 512,) * 2
    configs = read_configs(locate_base(settings.sources(one.base)))
    plan = partial(plan_training, configs, device_type=device.type)
    needed, available = plan(settings.training, size), available_memory(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    trainings = 1 if one.multi_class else len(cells)
    steps = (DEFAULT_STEPS if settings.training.steps is None else settings.training.steps) * trainings
    kept = needed["total"] - needed["activations"]
    disk = needed["weights"] * trainings + 3 * kept  # models, and two checkpoints with one being written
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    print(f"{len(cells)} categories, {trainings} trainings, {steps} steps of {settings.training.batch_size} images of {size[0]} pixels")
    print(f"memory: {bytes_text(needed['total'])} of {bytes_text(available)} on {name}")
    print(f"disk: {bytes_text(disk)} of {bytes_text(free)} free in {output}")
    print(f"time: not known before the first steps; with a second per step {math.ceil(steps / 3600)} hours, and then the inspection")
    check_fits(plan, settings.training, size, available, device.type)
    if disk > free:
        raise ConfigError(f"{output}: too little room; choose another disk with -o")


def show(records: list[dict[str, object]], wanted: int, published: tuple[float, ...] | None) -> None:
    """The means over all that is finished, beside the published ones."""
    print(f"\n{len(records)} of {wanted} categories\n{'':12} {'ours':>8} {'published':>10}")
    results = [result["metrics"] for record in records for result in record["results"]]  # type: ignore[attr-defined]
    for number, metric in enumerate(METRICS):
        values = [metrics[metric] for metrics in results if metric in metrics]
        ours = f"{100 * fmean(values):8.1f}" if values else f"{'-':>8}"
        print(f"{metric:12} {ours} {published[number] if published else '-':>10}")


if __name__ == "__main__":
    sys.exit(main())
