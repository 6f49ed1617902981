"""The commands of the inspection service: serve, station and audit."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from gladad.cli.common import Model, Quiet, complain, guarded
from gladad.cli.console import show
from gladad.core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from gladad.service.station import Station

station = typer.Typer(help="Products, versions, golden parts and keys of an inspection station.", no_args_is_help=True)
audit = typer.Typer(help="Check and export the record of a station.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Folder of the station.", show_default=False)]
Product = Annotated[str, typer.Argument(help="Name of the product.", show_default=False)]
Who = Annotated[str | None, typer.Option(help="Who does this, for the record (default: your user name).", show_default=False)]


def opened(folder: Path, *, make: bool = False) -> Station:
    """A station.

    Args:
        folder: Where it is.
        make: Whether it is made where it is not there.

    Raises:
        ConfigError: There is no station.
        MissingExtraError: The packages of the service are not installed.
    """
    try:
        from gladad.service.station import FILE, Station
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the inspection service ({error.name})", "'gladad[serve]'") from error
    if not make and not (folder / FILE).is_file():
        raise ConfigError(f"{folder}: is not a station (no {FILE}); 'gladad station add' and 'gladad serve' make one")
    return Station(folder)


def _me(who: str | None) -> str:
    try:
        return who or getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return "operator"


@guarded
def serve(
    folder: Annotated[Path, typer.Option("--station", help="Folder of the station; made if it is not there.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    tls_certificate: Annotated[Path | None, typer.Option(help="Serve over TLS: PEM file of the certificate.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key, if that is another.", show_default=False)] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Images inspected at a time (default: one per core).", show_default=False)
    ] = None,
) -> None:
    """Inspect images that are sent over HTTP, and keep every decision. Stopped by Ctrl-C or SIGTERM."""
    open_station = opened(folder, make=True)
    try:
        from gladad.service.server import serve as run

        complain(f"serving {folder} at http{'' if tls_certificate is None else 's'}://{host}:{port} (openapi: /v1/openapi.json)")
        run(open_station, host, port, threads, tls_certificate, tls_key)
    finally:
        open_station.close()


@station.command("add")
@guarded
def add(
    folder: Folder,
    product: Product,
    model: Model,
    warn_limit: Annotated[float | None, typer.Option(help="Scores above it are warnings, such as 0.9.", show_default=False)] = None,
    reject_limit: Annotated[float, typer.Option(help="Scores above it are rejected, in units of the model's threshold.")] = 1.0,
    note: Annotated[str, typer.Option(help="For people.", show_default=False)] = "",
    active: Annotated[bool, typer.Option("--activate/--no-activate", help="Have it inspect from now on.")] = True,
    who: Who = None,
) -> None:
    """Copy a model into the station, which is made if it is not there, as a new version of a product."""
    open_station = opened(folder, make=True)
    from gladad.service.golden import promote
    from gladad.service.products import add_version
    from gladad.service.worker import in_process

    version = add_version(open_station, product, model, _me(who), note=note, warn_limit=warn_limit, reject_limit=reject_limit)
    if active:
        promote(open_station, version, _me(who), in_process(1), force=False)
    state, origin = ", active" if active else "", f"model {version.model_id}, calibration {version.calibration_id}"
    print(f"{product}: version {version.number}{state} ({origin})")
    open_station.close()


@station.command("activate")
@guarded
def activate(
    folder: Folder,
    product: Product,
    number: Annotated[int, typer.Argument(min=1, help="Of the version.", show_default=False)],
    who: Who = None,
) -> None:
    """Have a version inspect from now on; a running service takes it up within a second."""
    open_station = opened(folder)
    from gladad.service.products import activate as do

    do(open_station, product, number, _me(who))
    print(f"{product}: version {number} is active")
    open_station.close()


@station.command("golden")
@guarded
def golden(
    folder: Folder,
    product: Product,
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", show_default=False)],
    who: Who = None,
) -> None:
    """Make images golden parts: the active version's scores of them are kept, and compared whenever the service starts."""
    open_station = opened(folder)
    from gladad.data.samples import expand_paths
    from gladad.service.golden import add as add_golden
    from gladad.service.products import active_version
    from gladad.service.worker import in_process

    with open_station.record.read() as connection:
        version = active_version(connection, product)
    ask = in_process(1)
    for path in expand_paths(paths):
        row = add_golden(open_station, version, path.read_bytes(), path.name, _me(who), ask)
        print(f"{path.name}: {row['decision']}, score {row['score']:.4g}")
    open_station.close()


@station.command("list")
@guarded
def listing(folder: Folder) -> None:
    """Show products and versions."""
    open_station = opened(folder)
    from gladad.service.products import all_products, all_versions

    table = Table("product", "version", "model", "calibration", "limits", "created", "by", "note")
    rows = []
    with open_station.record.read() as connection:
        for each in all_products(connection):
            for version in all_versions(connection, each.name):
                state = " active" if version.number == each.active else ""
                if state and each.stopped:
                    state = f" stopped: {each.stopped}"
                limits = f"{version.reject_limit:g}" if version.warn_limit is None else f"{version.warn_limit:g} {version.reject_limit:g}"
                row = (each.name, f"{version.number}{state}", version.model_id, version.calibration_id, limits)
                rows.append((*row, version.created[:19], version.who, version.note))
    show(table, rows)
    open_station.close()


@station.command("key")
@guarded
def key(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Make it worthless.")] = False,
    who: Who = None,
) -> None:
    """Make an API key and print it, once. From then on every request needs one."""
    open_station = opened(folder)
    if remove:
        open_station.remove_key(name, _me(who))
    else:
        print(open_station.add_key(name, _me(who)))
    open_station.close()


@audit.command("verify")
@guarded
def verify(
    folder: Folder,
    expect: Annotated[str | None, typer.Option(metavar="HASH", help="Of an entry that was noted elsewhere.", show_default=False)] = None,
) -> None:
    """Check that no decision, verdict or entry was changed, added or removed."""
    open_station = opened(folder)
    from gladad.service.audit import verify as check

    head = check(open_station.record, expect)
    print(f"{head.sequence} entries, unchanged; the last one has the hash {head.hash}")
    open_station.close()


@audit.command("export")
@guarded
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .csv or .parquet file.", show_default=False)],
    product: Annotated[str | None, typer.Option(help="Of one product only.", show_default=False)] = None,
    quiet: Quiet = False,
) -> None:
    """Write all decisions, with the last verdict on each, into a table."""
    if output.suffix not in {".csv", ".parquet"}:
        raise ConfigError(f"{output}: write to a .csv or .parquet file")
    open_station = opened(folder)
    from gladad.service.export import export as write

    count = write(open_station.record, output, product)
    if not quiet:
        print(f"{count} decisions in {output}")
    open_station.close()
