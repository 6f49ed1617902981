"""What is to be inspected: a table with an integer ``id`` and a ``path`` for each image, Parquet or CSV.

The rows are cut into blocks of `BLOCK` in their order. A copy whose row groups are the blocks lies with the results, so that whoever works
on a block reads that block alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gladad.core.errors import DataError, MissingExtraError
from gladad.core.storage import atomic_file

BLOCK = 256  # images in a block: some seconds to a minute of work
NEEDED = ("id", "path")


def adopt(manifest: Path, copy: Path) -> int:
    """Check a manifest and write its copy, whole or not at all; the rows pass through in pieces, of the ids alone all are held.

    Returns:
        Number of images.

    Raises:
        DataError: It is missing or no table, lacks a column, has no rows, or an id is there twice or no integer.
        MissingExtraError: pyarrow is not installed.
    """
    if not manifest.is_file():
        raise DataError(f"{manifest}: no such file; give a Parquet or CSV file with the columns id and path")
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("a manifest", "'gladad[ray]'") from error
    schema = pyarrow.schema([pyarrow.field("id", pyarrow.int64(), nullable=False), pyarrow.field("path", pyarrow.string(), nullable=False)])
    ids: list[Any] = []
    rest = schema.empty_table()
    try:
        with atomic_file(copy) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
            for table in _tables(manifest):
                if any(column.null_count for column in table.columns):
                    raise DataError(f"{manifest}: a row has no id or no path")
                ids.append(table["id"].cast(pyarrow.int64()).to_numpy())
                rest = pyarrow.concat_tables([rest, table.cast(schema)])
                if full := len(rest) // BLOCK * BLOCK:  # a table without rows would be a row group, too
                    writer.write_table(rest.slice(0, full), row_group_size=BLOCK)
                    rest = rest.slice(full)
            if len(rest):
                writer.write_table(rest)
            _check(manifest, ids)
    except pyarrow.ArrowException as error:
        raise DataError(f"{manifest}: not a table of integer ids and paths ({error})") from error
    return sum(map(len, ids))


def _tables(manifest: Path) -> Iterator[Any]:
    """Both columns in pieces."""
    import pyarrow
    from pyarrow import csv, parquet

    if manifest.suffix.lower() == ".csv":
        kinds = csv.ConvertOptions(column_types={"id": pyarrow.int64(), "path": pyarrow.string()})
        with csv.open_csv(manifest, convert_options=kinds) as reader:
            _check_columns(manifest, reader.schema)
            for batch in reader:
                yield pyarrow.Table.from_batches([batch]).select(NEEDED)
        return
    with parquet.ParquetFile(manifest) as file:
        _check_columns(manifest, file.schema_arrow)
        for batch in file.iter_batches(columns=NEEDED):
            yield pyarrow.Table.from_batches([batch]).select(NEEDED)


def _check_columns(manifest: Path, schema: Any) -> None:
    import pyarrow

    if missing := [name for name in NEEDED if name not in schema.names]:
        raise DataError(f"{manifest}: no column {' or '.join(missing)}; needed are {' and '.join(NEEDED)}, an integer and the image's path")
    if not pyarrow.types.is_integer(kind := schema.field("id").type):
        raise DataError(f"{manifest}: id is {kind}; make it an integer of its own for every image")
    if pyarrow.types.is_primitive(kind := schema.field("path").type):
        raise DataError(f"{manifest}: path is {kind}; make it text")


def _check(manifest: Path, parts: list[Any]) -> None:
    ids = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    if not len(ids):
        raise DataError(f"{manifest}: no rows; write one for each image")
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise DataError(f"{manifest}: id {twice[0]} is there twice; make ids unique")


def blocks(images: int) -> int:
    """Number of blocks of so many images."""
    return -(-images // BLOCK)


def read_block(copy: Path, number: int) -> list[tuple[int, str]]:
    """Ids and paths of one block, from the copy."""
    from pyarrow import parquet

    with parquet.ParquetFile(copy) as file:
        table = file.read_row_group(number)
    return list(zip(table["id"].to_pylist(), table["path"].to_pylist(), strict=True))
