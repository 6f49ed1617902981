"""Golden parts: images whose scores are known. A version that scores one otherwise is not what it was, and does not inspect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select

from gladad.core.errors import DataError
from gladad.service import audit, decisions
from gladad.service.intake import check_image
from gladad.service.pictures import sha256
from gladad.service.products import Version, activate, check_version, folder_of, product_of
from gladad.service.station import Station
from gladad.service.tables import goldens
from gladad.service.worker import Outcome

TOLERANCE = 1e-3  # relative: another machine or version of a library rounds otherwise
Ask = Callable[[str, bytes], Outcome]
"""Inspects the bytes of an image with the model of a folder."""


def add(station: Station, version: Version, content: bytes, name: str, who: str, ask: Ask) -> dict[str, Any]:
    """Keep an image, and what the version says of it, as a golden part.

    Raises:
        DataError: The image is refused.
    """
    ending = check_image(content, "", station.settings.max_pixels)
    row = _row(version, ask(str(folder_of(station, version.product, version.number)), content)) | {
        "image_sha256": sha256(content),
        "image_name": name,
        "image_type": ending,
    }
    path = path_of(station, row)
    station.pictures.add(path, content)
    with station.record.write() as connection:
        known = goldens.c.product == version.product, goldens.c.version == version.number
        if connection.execute(select(goldens).where(*known, goldens.c.image_sha256 == row["image_sha256"])).first() is None:
            connection.execute(insert(goldens), [row])
            audit.append(connection, "golden part added", f"{version.product}/{version.number}", who, row)
    return row


def of(connection: Connection, product: str, number: int) -> list[dict[str, Any]]:
    """The golden parts of a version."""
    found = connection.execute(
        select(goldens).where(goldens.c.product == product, goldens.c.version == number).order_by(goldens.c.image_name)
    )
    return [dict(row._mapping) for row in found]


def check(station: Station, version: Version, ask: Ask) -> int:
    """Inspect the golden parts of a version again; returns their number.

    Raises:
        DataError: One is missing, or scores otherwise than it did.
    """
    with station.record.read() as connection:
        known = of(connection, version.product, version.number)
    folder = str(folder_of(station, version.product, version.number))
    for row in known:
        present = _row(version, ask(folder, _read(station, row)))
        if present["decision"] != row["decision"] or abs(present["score"] - row["score"]) > TOLERANCE * abs(row["score"]):
            found = f"scores {present['score']:.6g} ({present['decision']}), it was {row['score']:.6g} ({row['decision']})"
            raise DataError(f"golden part {_name(row)} {found}; the machine or a library has changed, look before you activate it again")
    return len(known)


def promote(station: Station, version: Version, who: str, ask: Ask, *, force: bool) -> None:
    """Check a version, then have it inspect: its files, and the golden parts of the active version, which become its own.

    Raises:
        DataError: Its files were changed, or it decides a golden part otherwise and that is not forced. Nothing has changed.
    """
    check_version(station, version)
    _carry_over(station, version, ask, force=force)
    activate(station, version.product, version.number, who)


def _carry_over(station: Station, version: Version, ask: Ask, *, force: bool) -> None:
    """Make the golden parts of the active version those of another, which must decide them alike.

    Raises:
        DataError: It decides one otherwise, and that is not forced.
    """
    with station.record.read() as connection:
        active = product_of(connection, version.product).active
        if active is None or active == version.number or of(connection, version.product, version.number):
            known = []
        else:
            known = of(connection, version.product, active)
    if not known:
        check(station, version, ask)
        return
    folder = str(folder_of(station, version.product, version.number))
    made = [_row(version, ask(folder, _read(station, row))) | {key: row[key] for key in _IMAGE} for row in known]
    changed = [_name(row) for row, new in zip(known, made, strict=True) if row["decision"] != new["decision"]]
    if changed and not force:
        raise DataError(
            f"version {version.number} decides {len(changed)} golden parts otherwise ({', '.join(changed[:5])}); nothing was changed"
        )
    with station.record.write() as connection:
        connection.execute(insert(goldens), made)


_IMAGE = ("image_sha256", "image_name", "image_type")


def _row(version: Version, outcome: Outcome) -> dict[str, Any]:
    decision = decisions.decide(outcome.score, version.warn_limit, version.reject_limit)
    return {"product": version.product, "version": version.number, "score": outcome.score, "decision": decision}


def _name(row: dict[str, Any]) -> str:
    return str(row["image_name"] or row["image_sha256"][:12])


def path_of(station: Station, row: dict[str, Any]) -> Path:
    """Where the image of a golden part is."""
    return station.folder / "golden" / f"{row['image_sha256']}.{row['image_type']}"


def _read(station: Station, row: dict[str, Any]) -> bytes:
    path = path_of(station, row)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the golden part cannot be read ({error.strerror})") from error
    if sha256(content) != row["image_sha256"]:
        raise DataError(f"{path}: is not the golden part that was added")
    return content
