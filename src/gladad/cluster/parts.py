"""Results as files: block k of the manifest is ``part-<k>.parquet``, written whole or not at all, and its maps ``part-<k>.npz``.

The name follows from the manifest alone. So what is done is what is there, and who does a block a second time, after a kill or beside
somebody who was thought dead, writes the same rows under the same name: no id can be missing or twice.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gladad.core.storage import atomic_file

_NAME = re.compile(r"part-(\d{8,})\.parquet")


class PutMap(Protocol):
    """Takes the map ``[H, W]`` of the image of an id."""

    def __call__(self, number: int, anomaly_map: NDArray[np.float32]) -> None: ...  # noqa: D102 (the class says it)


def part_file(folder: Path, block: int, suffix: str = ".parquet") -> Path:
    """The file of a block."""
    return folder / f"part-{block:08}{suffix}"


def finished(folder: Path) -> set[int]:
    """The blocks whose files are there."""
    return {int(found[1]) for entry in os.scandir(folder) if (found := _NAME.fullmatch(entry.name))}


def schema() -> Any:
    """Of a part: ``id``, the fields of ``predictions.jsonl`` (`gladad.core.records.Prediction.to_record`), ``error`` of those without."""
    import pyarrow as pa

    region = pa.struct([("box", pa.list_(pa.int32())), ("area", pa.int64()), ("peak", pa.float64())])
    kinds = {"id": pa.int64(), "image_path": pa.string(), "pred_score": pa.float64(), "p_value": pa.float64(), "pred_label": pa.int8()}
    kinds |= {"step": pa.int32(), "width": pa.int32(), "height": pa.int32(), "regions": pa.list_(region), "seconds": pa.float64()}
    return pa.schema(kinds | dict.fromkeys(("model_id", "model_version", "calibration_id", "error"), pa.string()))


def write_part(folder: Path, block: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a block."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(list(rows), schema=schema())
    with atomic_file(part_file(folder, block)) as temporary:
        parquet.write_table(table, temporary)


def counts(folder: Path, block: int) -> dict[str, int]:
    """Images, rejected and skipped ones in a block's file."""
    from pyarrow import parquet

    table = parquet.read_table(part_file(folder, block), columns=["pred_label", "error"], partitioning=None)
    skipped = len(table) - table["error"].null_count
    return {"block": block, "images": len(table), "rejected": table["pred_label"].to_pylist().count(1), "skipped": skipped}


@contextmanager
def map_writer(folder: Path | None, block: int) -> Iterator[PutMap]:
    """Writes a block's maps, one at a time, to an NPZ file whose keys are the ids: ``numpy.load(file)["17"]``."""
    if folder is None:
        yield lambda number, anomaly_map: None
        return
    with atomic_file(part_file(folder, block, ".npz")) as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def put(number: int, anomaly_map: NDArray[np.float32]) -> None:
            with archive.open(f"{number}.npy", "w") as file:
                np.lib.format.write_array(file, anomaly_map, allow_pickle=False)

        yield put
