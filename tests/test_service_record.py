"""The record of a station: what is written stays, in SQLite and in PostgreSQL, and whoever changes it is found out."""

from __future__ import annotations

import csv
import errno
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from pyarrow import parquet
from service_base import PRODUCT, a_row, make_station
from sqlalchemy import create_engine, delete, insert, select, text, update
from sqlalchemy.exc import OperationalError, TimeoutError

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.service import audit, decisions
from gladad.service.export import COLUMNS, export
from gladad.service.pictures import PictureStore
from gladad.service.record import Record, StorageError
from gladad.service.station import Station, UnknownError
from gladad.service.tables import audit as entries
from gladad.service.tables import decisions as table
from gladad.service.tables import metadata, products, verdicts, versions

VERSION = {
    "product": PRODUCT,
    "number": 1,
    "model_id": "m",
    "calibration_id": "c",
    "digest": "d",
    "warn_limit": None,
    "reject_limit": 1.0,
    "created": "2026",
    "who": "tester",
    "note": "",
}


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Station]:
    """A station with a product and no model, on either database."""
    database = ""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql")
        name = f"t{secrets.token_hex(6)}"
        admin = create_engine(url.format("postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        database = url.format(name)
    station = make_station(tmp_path / "line", database=database)
    with station.record.write() as connection:
        connection.execute(insert(products), [{"name": PRODUCT}])
        connection.execute(insert(versions), [VERSION])
    yield station
    station.close()


def fill(record: Record, count: int) -> list[str]:
    rows = [a_row(score=number / 7) for number in range(count)]
    with record.write() as connection:
        decisions.insert_all(connection, [(row, "tester") for row in rows])
    return [row["id"] for row in rows]


def test_the_tables_are_those_of_the_migrations(place):
    with place.record.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_station_opened_again_is_the_same(place):
    (identity,) = fill(place.record, 1)
    again = Station(place.folder)
    with again.record.read() as connection:
        found = decisions.one(connection, identity)
    again.close()
    assert found["score"] == 0.0 and found["verdict"] is None
    assert found["regions"] == a_row()["regions"]


def test_the_last_verdict_on_each_part_is_counted(place):
    identities = fill(place.record, 4)
    for place_of, verdict in ((0, "good"), (1, "good"), (0, "bad"), (2, "good"), (2, "good")):
        decisions.add_verdict(place.record, identities[place_of], verdict, "ann")
    with place.record.read() as connection:
        assert decisions.judged(connection, PRODUCT) == {"good": 2, "bad": 1}
        assert decisions.judged(connection, "another") == {"good": 0, "bad": 0}


def test_the_chain_verifies(place):
    identities = fill(place.record, 5)
    decisions.add_verdict(place.record, identities[0], "bad", "ann", "a scratch")
    head = audit.verify(place.record)
    assert head.sequence == 6
    assert audit.verify(place.record, head.hash) == head


class Busy(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_BUSY


class Failed(sqlite3.OperationalError):
    sqlite_errorcode = sqlite3.SQLITE_IOERR | (1 << 8)


@pytest.mark.parametrize(
    ("cause", "sqlite", "server"),  # whether either database's connections are renewed
    [
        (TimeoutError("none is free"), False, False),
        (OperationalError("BEGIN", {}, Busy("database is locked")), False, False),
        (OperationalError("COMMIT", {}, Failed("disk I/O error")), True, False),
        (OperationalError("SELECT", {}, Exception("lock timeout")), False, False),
        (OperationalError("SELECT", {}, Exception("server closed the connection"), connection_invalidated=True), False, True),
        (OSError(errno.EROFS, "Read-only file system"), True, False),
    ],
)
def test_only_broken_connections_are_renewed(tmp_path, cause, sqlite, server):
    station = make_station(tmp_path / "line")
    for kind, renewed in ((True, sqlite), (False, server)):
        station.record.sqlite, pool = kind, station.record.engine.pool
        with pytest.raises(StorageError), station.record.read():
            raise cause
        assert (station.record.engine.pool is not pool) == renewed
    station.close()


CHANGES = {
    "a score": lambda c, ids: c.execute(update(table).where(table.c.id == ids[2]).values(score=9.0)),
    "a region": lambda c, ids: c.execute(update(table).where(table.c.id == ids[2]).values(regions=[])),
    "a decision less": lambda c, ids: c.execute(delete(table).where(table.c.id == ids[3])),
    "a decision more": lambda c, ids: c.execute(insert(table), [a_row()]),
    "a verdict": lambda c, ids: c.execute(update(verdicts).values(verdict="good")),
    "a verdict less": lambda c, ids: c.execute(delete(verdicts)),
    "who": lambda c, ids: c.execute(update(entries).where(entries.c.sequence == 2).values(who="eve")),
    "an entry less": lambda c, ids: c.execute(delete(entries).where(entries.c.sequence == 2)),
    "the hash": lambda c, ids: c.execute(update(entries).where(entries.c.sequence == 2).values(hash="0" * 64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_found(tmp_path, change):
    station = make_station(tmp_path / "line")
    with station.record.write() as connection:
        connection.execute(insert(products), [{"name": PRODUCT}])
        connection.execute(insert(versions), [VERSION])
    identities = fill(station.record, 5)
    decisions.add_verdict(station.record, identities[0], "bad", "ann")
    audit.verify(station.record)
    with station.record.write() as connection:
        CHANGES[change](connection, identities)
    with pytest.raises(audit.AuditError):
        audit.verify(station.record)
    station.close()


def test_a_cut_end_is_found_by_a_noted_hash(place):
    identities = fill(place.record, 3)
    noted = audit.verify(place.record).hash
    with place.record.write() as connection:
        connection.execute(delete(entries).where(entries.c.sequence == 3))
        connection.execute(delete(table).where(table.c.id == identities[2]))
    audit.verify(place.record)  # by itself the rest is a chain
    with pytest.raises(audit.AuditError, match="cut off"):
        audit.verify(place.record, noted)


def test_many_writers_make_one_chain(place):
    """Threads with connections of their own, as several processes have."""
    problems: list[BaseException] = []

    def work() -> None:
        own = Station(place.folder)
        try:
            for _ in range(8):
                fill(own.record, 2)
        except BaseException as error:
            problems.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert audit.verify(place.record).sequence == 64


def test_a_transaction_that_fails_leaves_nothing(place):
    with pytest.raises(RuntimeError), place.record.write() as connection:
        decisions.insert_all(connection, [(a_row(), "tester")])
        raise RuntimeError
    with place.record.read() as connection:
        assert not connection.execute(select(table)).all()
    assert audit.verify(place.record).sequence == 0


def test_decisions_are_found(place):
    identities = fill(place.record, 10)
    decisions.add_verdict(place.record, identities[4], "bad", "ann")
    decisions.add_verdict(place.record, identities[5], "bad", "ann")
    decisions.add_verdict(place.record, identities[5], "good", "bob")
    with place.record.read() as connection:

        def ids(**filters: str | int) -> list[str]:
            return [row["id"] for row in decisions.search(connection, **filters)]

        newest = sorted(identities, reverse=True)
        assert ids() == newest
        assert ids(limit=3) == newest[:3]
        assert ids(before=newest[2], limit=3) == newest[3:6]
        assert ids(verdict="bad") == [identities[4]]
        assert ids(verdict="good") == [identities[5]]
        assert len(ids(verdict="none")) == 8
        assert ids(product="other") == [] == ids(decision="reject") == ids(since="2100-01-01")
        assert len(ids(until="2100-01-01")) == 10
        assert decisions.counts(connection, PRODUCT) == {"accept": 10, "warn": 0, "reject": 0}
        with pytest.raises(UnknownError):
            decisions.one(connection, "0" * 32)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_hold_everything(place, tmp_path, suffix):
    identities = fill(place.record, 3)
    decisions.add_verdict(place.record, identities[1], "good", "ann")
    path = tmp_path / f"table{suffix}"
    assert export(place.record, path) == 3
    if suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = parquet.read_table(path).to_pylist()
    assert list(rows[0]) == COLUMNS
    by_id = {row["id"]: row for row in rows}
    assert float(by_id[identities[1]]["score"]) == 1 / 7
    assert by_id[identities[1]]["verdict"] == "good"


def test_a_newer_record_is_refused(place):
    with place.record.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ModelFormatError, match="newer"):
        Station(place.folder)


def test_a_url_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="database"):
        Record(tmp_path, "nonsense")


def test_another_folder_is_no_station(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not a station"):
        Station(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_mistake_in_the_settings_names_the_file(tmp_path):
    make_station(tmp_path / "line").close()
    (tmp_path / "line/station.json").write_text('{"queu": 3}')
    with pytest.raises(ConfigError, match=r"station\.json: queu"):
        Station(tmp_path / "line")


def test_keys_are_kept_as_hashes(tmp_path):
    station = make_station(tmp_path / "line")
    key = station.add_key("robot", "ann")
    assert key not in (tmp_path / "line/keys.json").read_text()
    assert station.key_name(key) == "robot"
    assert station.key_name(key + "x") is None
    station.remove_key("robot", "ann")
    assert station.key_name(key) is None
    with pytest.raises(UnknownError):
        station.remove_key("robot", "ann")
    assert audit.verify(station.record).sequence == 2
    station.close()


def test_old_pictures_go_first(tmp_path):
    store = PictureStore(tmp_path)
    paths = [store.image_path(f"{number:064x}", "png") for number in range(6)]
    for number, path in enumerate(paths):
        store.add(path, b"x" * 2**20)
        os.utime(path, (time.time() - 86_400 * (6 - number),) * 2)  # six days old, five, ...
    assert store.clean(days=4.5, gib=1) == (2, 2 * 2**20)
    assert store.clean(days=100, gib=3 / 1024) == (1, 2**20)
    store.add(paths[3], b"x")  # inspected again: it is young
    assert store.clean(days=100, gib=2 / 1024) == (1, 2**20)
    assert [path.exists() for path in paths] == [False, False, False, True, False, True]
    assert paths[3].stat().st_size == 2**20  # the same content has the same name
