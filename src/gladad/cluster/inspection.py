"""Any number of images through one model, over Ray Data: blocks of the manifest go to a pool of actors, results go to files.

What passes through Ray are numbers of blocks and counts. The actors read the manifest, the images and the model, and write the parts
(`gladad.cluster.parts`); so all of them need the same folders, under the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gladad.cluster.manifest import BLOCK, adopt, blocks, read_block
from gladad.cluster.parts import counts, finished, map_writer, part_file, write_part
from gladad.cluster.session import connected, places
from gladad.core.errors import ConfigError, DataError, GladError, NotFiniteError
from gladad.core.records import Prediction, Progress, no_progress
from gladad.core.storage import WriteError, printable, read_json, write_json
from gladad.core.threads import in_order
from gladad.data.manifests import locate
from gladad.data.samples import file_digest
from gladad.detector.glad import Glad

RUN_FOLDER = "_run"  # what begins with _ or . is passed over by those who read a folder of Parquet files
COPY_FILE, RECORD_FILE = "manifest.parquet", "run.json"
TASKS = 10_000  # at most, each of one or several blocks: a handful of objects of Ray for each
TRIES = 4  # of a block whose actor dies; Ray Data itself would try for ever


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done. Folders and files are those of all nodes, so they are made absolute."""

    model: Path  # folder of a fitted or exported model
    manifest: Path  # see `gladad.cluster.manifest`; its relative paths are below its own folder
    output: Path  # folder for the parts
    maps: Path | None = None  # folder for the maps; None writes none
    false_reject_rate: float | None = None  # another than the model's
    cpus: int = 1  # of an actor, and images that it inspects at a time
    gpus: float = 0.0  # of an actor; a part of one is shared

    def __post_init__(self) -> None:
        for name in ("model", "manifest", "output"):
            object.__setattr__(self, name, getattr(self, name).absolute())
        if self.maps is not None:
            object.__setattr__(self, "maps", self.maps.absolute())

    @property
    def run(self) -> Path:
        """Folder for what is not results."""
        return self.output / RUN_FOLDER

    def detector(self) -> Glad:
        """The model."""
        detector = Glad.from_pretrained(self.model)
        if self.false_reject_rate is not None:
            detector.set_false_reject_rate(self.false_reject_rate)
        return detector


@dataclass(frozen=True)
class Summary:
    """What a run has done."""

    images: int  # inspected or skipped by this run
    rejected: int
    skipped: int
    before: int  # that earlier runs of the same command had done


class Inspector:
    """An actor: one model, asked for one block after another."""

    def __init__(self, job: Job):
        os.environ["OMP_NUM_THREADS"] = str(job.cpus)  # before torch or ONNX Runtime is loaded
        self.job, self.detector = job, job.detector()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Inspect the blocks of a batch that are not there yet; counts of all, and the process that made them."""
        found = [self._block(int(number)) | {"process": os.getpid()} for number in batch["block"]]
        return {key: [one[key] for one in found] for key in found[0]}

    def _block(self, block: int) -> dict[str, int]:
        job = self.job
        if not part_file(job.output, block).is_file():
            entries = read_block(job.run / COPY_FILE, block)
            tries = self._try(block, entries)
            rows = []
            with map_writer(job.maps, block) as put:
                outcomes = in_order(self._inspect, (name for _, name in entries), min(self.detector.workers, job.cpus))
                for (number, name), outcome in zip(entries, outcomes, strict=True):
                    row: dict[str, Any] = {"id": number, "image_path": name}
                    if isinstance(outcome, Prediction):
                        put(number, outcome.anomaly_map)
                        rows.append(outcome.to_record() | row)
                    else:
                        rows.append(row | {"error": printable(str(outcome))})
            write_part(job.output, block, rows)  # where it is, the maps are
            tries.unlink(missing_ok=True)
        return counts(job.output, block)

    def _try(self, block: int, entries: Sequence[tuple[int, str]]) -> Path:
        """Count how often a block is begun, in a file that is returned: Ray Data itself would try for ever."""
        tries = part_file(self.job.run, block, ".tries")
        with tries.open("ab") as file:
            file.write(b".")
        if tries.stat().st_size > TRIES:
            place = f"{self.job.manifest}: ids {entries[0][0]} to {entries[-1][0]}"
            raise DataError(f"{place}: the process died {TRIES} times at these rows; one of their images is to blame, or memory is short")
        return tries

    def _inspect(self, name: str) -> Prediction | GladError:
        path = locate(self.job.manifest.parent, name)
        try:
            return self.detector.inspect(path, reconstruct=False)
        except DataError as error:
            return error
        except NotFiniteError as error:
            return NotFiniteError(f"{printable(path)}: {error}")


def inspect_manifest(job: Job, *, address: str | None = None, num_actors: int | None = None, progress: Progress = no_progress) -> Summary:
    """Inspect what a manifest lists, and what of it is not there yet: the same call goes on after a kill.

    Args:
        job: What is to be done.
        address: Of a Ray cluster, see `gladad.cluster.session.connected`.
        num_actors: At most; None takes as many as have room.
        progress: Told of the images of every task that is done.

    Raises:
        DataError: The manifest cannot be used.
        ConfigError: No node has room for an actor, or the results were begun otherwise.
        WriteError: The folder cannot be written to, or holds something else.
        ModelFormatError: The model cannot be used.
        GladError: Ray cannot be reached, or gave up.
    """
    images = _begun(job)
    done = finished(job.output)
    missing = [block for block in range(blocks(images)) if block not in done]
    before = images - sum(min(BLOCK, images - BLOCK * block) for block in missing)
    total = {"images": 0, "rejected": 0, "skipped": 0}
    if missing:
        with connected(address) as ray:
            size = min(places(ray, job.cpus, job.gpus), len(missing), num_actors or len(missing))
            for row in _results(ray, job, missing, size):
                for key in total:
                    total[key] += int(row[key])
                progress("inspecting", before + total["images"], images)
    if lost := len(set(range(blocks(images))) - finished(job.output)):
        raise GladError(f"{job.output}: {lost} blocks are not there; the same command goes on")
    return Summary(**total, before=before)


def _results(ray: Any, job: Job, missing: Sequence[int], size: int) -> Iterator[Mapping[str, Any]]:
    """Ray Data's work: counts of every block, as they come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    data = ray.data.from_items([{"block": block} for block in missing], override_num_blocks=min(len(missing), TASKS))
    inspected = data.map_batches(
        Inspector,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=job.cpus,
        num_gpus=job.gpus or None,
    )
    yield from inspected.iter_rows()


def _begun(job: Job) -> int:
    """Make the results ready for this job, or find that an equal one has; returns the number of images."""
    if not job.manifest.is_file():
        raise DataError(f"{job.manifest}: no such file; give a Parquet or CSV file with the columns id and path")
    detector = job.detector()  # what is wrong with it is better said here than by an actor
    asked = {"manifest": file_digest(job.manifest), "model": detector.model_id, "calibration": detector.calibration_id}
    asked["maps"] = str(job.maps or "")
    record = job.run / RECORD_FILE
    if record.is_file():
        begun = read_json(record)
        if others := [key for key, value in asked.items() if begun.get(key) != value]:
            raise ConfigError(f"{job.output}: was begun with another {' and '.join(others)}; give the same again, or another folder")
        for left in job.run.glob("*.tries"):
            left.unlink()
        return int(begun["images"])
    if job.output.exists() and (not job.output.is_dir() or any(job.output.glob("*.parquet"))):
        raise WriteError(f"{job.output}: holds something else; choose another folder")
    images = adopt(job.manifest, job.run / COPY_FILE)
    write_json(record, asked | {"images": images})  # last: what is there with it is whole
    return images
