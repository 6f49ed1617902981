"""The record as a table for other programs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Boolean, Float, Integer

from gladad.core.errors import MissingExtraError
from gladad.core.storage import atomic_file
from gladad.service import decisions
from gladad.service.record import Record
from gladad.service.tables import decisions as table

CHUNK = 10_000
COLUMNS = [column.name for column in table.columns] + ["verdict"]


def export(record: Record, path: Path, product: str | None = None) -> int:
    """Write decisions, the newest first, each with its last verdict; regions are JSON text.

    Args:
        record: Of the station.
        path: Ending in .csv or .parquet; written whole or not at all.
        product: Of one product only.

    Returns:
        Number of decisions.

    Raises:
        MissingExtraError: Parquet needs pyarrow.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_csv
    with atomic_file(path) as temporary:
        return write(temporary, _chunks(record, product))


def _chunks(record: Record, product: str | None) -> Iterator[list[dict[str, Any]]]:
    last: str | None = None
    with record.read() as connection:
        while rows := decisions.search(connection, product=product, before=last, limit=CHUNK):
            last = rows[-1]["id"]
            yield [decisions.plain(row) for row in rows]


def _write_csv(path: Path, chunks: Iterator[list[dict[str, Any]]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for rows in chunks:
            writer.writerows(rows)
            count += len(rows)
    return count


def _write_parquet(path: Path, chunks: Iterator[list[dict[str, Any]]]) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("Parquet", "pyarrow") from error
    kinds = {Boolean: pyarrow.bool_(), Float: pyarrow.float64(), Integer: pyarrow.int64()}
    types = {
        column.name: next((kind for sql, kind in kinds.items() if isinstance(column.type, sql)), pyarrow.string())
        for column in table.columns
    }
    schema, count = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in COLUMNS]), 0
    with parquet.ParquetWriter(path, schema) as writer:
        for rows in chunks:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count
