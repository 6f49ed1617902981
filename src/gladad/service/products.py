"""Products of a station and their versions. A version is a model folder with limits; it is never changed, only another one activated."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from gladad.core.errors import ConfigError, DataError, GladError
from gladad.core.storage import atomic_folder, read_json, read_model_file, share_files
from gladad.decision.conformal import Calibration
from gladad.detector.files import CALIBRATION_FILE
from gladad.service import audit, drift
from gladad.service.record import now, translated
from gladad.service.station import Station, UnknownError, check_name
from gladad.service.tables import products, versions
from gladad.service.worker import check_folder


class StoppedError(GladError):
    """A product does not inspect now; the message says why."""


@dataclass(frozen=True)
class Version:
    """A version of a product, as it was added."""

    product: str
    number: int  # from 1
    model_id: str
    calibration_id: str
    digest: str  # SHA-256 of the files of its folder
    warn_limit: float | None
    reject_limit: float
    created: str
    who: str
    note: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Product:
    """A product as it stands."""

    name: str
    active: int | None
    stopped: str | None
    suspended: str | None
    drift: dict[str, dict[str, Any]]  # see `gladad.service.drift.shown`


def folder_of(station: Station, product: str, number: int) -> Path:
    """Where the model of a version is."""
    return station.folder / "products" / check_name(product) / str(number)


def calibration_of(folder: Path) -> Calibration:
    """Of a model folder; reads nothing else.

    Raises:
        ModelFormatError: It is missing or damaged.
    """
    return Calibration.from_json(read_json(folder / CALIBRATION_FILE))


def add_version(
    station: Station, name: str, model: Path, who: str, *, note: str = "", warn_limit: float | None = None, reject_limit: float = 1.0
) -> Version:
    """Copy a model into the station as the next version of a product, which is made if it is not there. It is not activated.

    Args:
        station: Where.
        name: Of the product.
        model: Folder that ``gladad fit`` or ``gladad export`` wrote.
        who: Adds it.
        note: For people.
        warn_limit: Scores above it are warnings; None: there are none.
        reject_limit: Scores above it are rejected, in units of the model's threshold. The promise holds at 1 and above.

    Raises:
        ConfigError: A name or limit is wrong.
        DataError: The folder holds files that it should not.
        ModelFormatError: It is not a model.
    """
    check_name(name)
    if not 0 < reject_limit < float("inf") or (warn_limit is not None and not 0 < warn_limit < reject_limit):
        raise ConfigError(f"limits must be 0 < warn limit < reject limit, not {warn_limit} and {reject_limit}")
    check_folder(model)
    description, calibration = read_model_file(model), calibration_of(model)
    with station.record.write() as connection:
        last = connection.execute(select(func.max(versions.c.number)).where(versions.c.product == name)).scalar_one()
        number = 1 + (last or 0)
        target = folder_of(station, name, number)
        shutil.rmtree(target, ignore_errors=True)  # of a number that no version was given: an addition that was cut off
        with translated(), atomic_folder(target) as temporary:
            shutil.copytree(model, temporary, dirs_exist_ok=True)
        if last is not None:
            share_files(folder_of(station, name, last), target)
        if last is None:
            connection.execute(insert(products), [{"name": name}])
        version = Version(
            product=name,
            number=number,
            model_id=str(description.get("model_id", "")),
            calibration_id=calibration.identity,
            digest=digest_of(target),
            warn_limit=warn_limit,
            reject_limit=reject_limit,
            created=now(),
            who=who,
            note=note,
        )
        connection.execute(insert(versions), [version.to_json()])
        audit.append(connection, "version added", f"{name}/{number}", who, version.to_json())
    return version


def digest_of(folder: Path) -> str:
    """SHA-256 of the names and contents of all files of a model folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found.update(f"{path.relative_to(folder).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def check_version(station: Station, version: Version) -> None:
    """Refuse a version whose files are not those that were added.

    Raises:
        DataError: They differ.
    """
    if digest_of(folder_of(station, version.product, version.number)) != version.digest:
        raise DataError(f"{version.product}/{version.number}: its files are not those that were added; add the model again")


_SHOWN = select(products.c.name, products.c.active, products.c.stopped, products.c.suspended, products.c.drift)


def _product(row: Any) -> Product:
    return Product(row.name, row.active, row.stopped, row.suspended, drift.shown(row.drift))


def all_products(connection: Connection) -> list[Product]:
    """By name."""
    return [_product(row) for row in connection.execute(_SHOWN.order_by(products.c.name))]


def product_of(connection: Connection, name: str) -> Product:
    """A product.

    Raises:
        UnknownError: There is none of this name.
    """
    row = connection.execute(_SHOWN.where(products.c.name == name)).first()
    if row is None:
        raise UnknownError(f"there is no product {name!r}")
    return _product(row)


def all_versions(connection: Connection, name: str) -> list[Version]:
    """Of a product, the oldest first.

    Raises:
        UnknownError: There is none of this name.
    """
    product_of(connection, name)
    return [
        Version(**row._mapping)
        for row in connection.execute(select(versions).where(versions.c.product == name).order_by(versions.c.number))
    ]


def version_of(connection: Connection, name: str, number: int) -> Version:
    """A version.

    Raises:
        UnknownError: There is none of this name and number.
    """
    row = connection.execute(select(versions).where(versions.c.product == name, versions.c.number == number)).first()
    if row is None:
        raise UnknownError(f"product {name!r} has no version {number}")
    return Version(**row._mapping)


def active_version(connection: Connection, name: str) -> Version:
    """The version of a product that inspects.

    Raises:
        UnknownError: There is no such product.
        StoppedError: It has been stopped, or no version is active.
    """
    product = product_of(connection, name)
    if product.stopped is not None:
        raise StoppedError(f"product {name!r} is stopped: {product.stopped}")
    if product.active is None:
        raise StoppedError(f"product {name!r} has no active version; activate one")
    return version_of(connection, name, product.active)


def activate(station: Station, name: str, number: int, who: str) -> Version:
    """Have a version inspect from now on, without a look at it; the drift test starts anew, and a stop ends.

    Raises:
        UnknownError: There is no such version.
    """
    with station.record.read() as connection:
        version = version_of(connection, name, number)
    folder, parts = folder_of(station, name, number), station.settings.parts_per_false_alarm
    tests = drift.new(calibration_of(folder), version.reject_limit, parts)
    with station.record.write() as connection:
        before = product_of(connection, name)
        values = {"active": number, "stopped": None, "drift": tests, "suspended": None}
        connection.execute(update(products).where(products.c.name == name).values(**values))
        audit.append(connection, "version activated", f"{name}/{number}", who, {"before": before.active, "stopped": before.stopped})
    return version


def stop(station: Station, name: str, reason: str, who: str) -> None:
    """Have a product refuse images until a version is activated.

    Raises:
        UnknownError: There is no such product.
    """
    with station.record.write() as connection:
        product_of(connection, name)
        connection.execute(update(products).where(products.c.name == name).values(stopped=reason))
        audit.append(connection, "product stopped", name, who, {"reason": reason})
