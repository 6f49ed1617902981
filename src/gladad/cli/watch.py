"""The command that inspects the images of a folder as they appear."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gladad.cli.common import complain, guarded
from gladad.cli.serve import _me, opened
from gladad.core.errors import ConfigError


@guarded
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder whose images are inspected, with those below it.", show_default=False)],
    station: Annotated[Path, typer.Option("--station", help="Folder of the station.", show_default=False)],
    product: Annotated[str, typer.Option("--product", help="Name of the product.", show_default=False)],
    sort: Annotated[Path | None, typer.Option(help="Move files to accept/, warn/ and reject/ of this folder.", show_default=False)] = None,
    tag: Annotated[bool, typer.Option("--tag", help="Write each decision beside its image: part.png.json.")] = False,
    settle: Annotated[float, typer.Option(min=0.0, max=3600.0, help="Seconds that a file must not have changed to be complete.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Inspect what is there, then exit.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Images inspected at a time (default: one per core).", show_default=False)
    ] = None,
) -> None:
    """Inspect images as they appear in a folder, each once, and keep every decision. Stopped by Ctrl-C or SIGTERM."""
    if sort is not None and tag:
        raise ConfigError("--sort and --tag: give one of them, not both")
    open_station = opened(station)
    try:
        from gladad.core.threads import CancelToken, cancelled_by_signals
        from gladad.service.line import Line
        from gladad.service.sorting import DECISIONS, sorter
        from gladad.service.sorting import tag as write_tag
        from gladad.service.watch import Watch

        finish = sorter(sort) if sort is not None else write_tag if tag else None
        apart = [] if sort is None else [sort / decision for decision in DECISIONS]
        token = CancelToken()
        with cancelled_by_signals(token):
            line = Line(open_station, threads, only=product)
            try:
                watching = Watch(line, product, folder, _me(None), settle=settle, finish=finish, apart=apart, tell=complain, cancel=token)
                if not once:
                    complain(f"watching {folder}")
                counts = watching.run(once)
            finally:
                line.close()
    finally:
        open_station.close()
    told = ", ".join(f"{counts[each]} {each}" for each in (*DECISIONS, "refused"))
    print(f"{told}; decided by {product}")
