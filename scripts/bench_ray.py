"""`gladad inspect` against a plain loop over `Glad.predict`, and three kills: actor, driver, raylet.

    taskset -c 1 python scripts/bench_ray.py IMAGES WORK [--images 100000] [--plain 2560] [--killed 5120]

IMAGES is a folder of real images, of which 64x64 JPEG crops are cut; WORK gets crops, a small model and all results, and is taken up
again. Rates are given by the clock, and per second of the processor that the loop or the actor itself used, which a busy machine leaves
alone. Exit status 0 if after the kills every id is there exactly once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image
from pyarrow import dataset, parquet

from gladad import Glad
from gladad.cluster.parts import finished
from gladad.core.images import list_images, load_image

SIDE, TRAINED, PATIENCE = 64, 40, 900.0
SETTINGS = {"image_size": SIDE, "false_reject_rate": 0.1}  # of a memory bank, the fastest base: what Ray costs shows most
ACTOR, RAYLET = "MapWorker(MapBatches(Inspector))", "raylet/raylet"


def crops(source: Path, work: Path, count: int) -> Path:
    """Cut crops in turn from all images and list them in a manifest; ids have gaps."""
    manifest, folder = work / f"{count}.parquet", work / "crops"
    if not manifest.is_file():
        paths, rng = list_images(source), np.random.default_rng(0)
        for first in range(len(paths)):
            numbers = [number for number in range(first, count, len(paths)) if not (folder / f"{number:06}.jpg").is_file()]
            pixels = load_image(paths[first]) if numbers else None
            for number in numbers:
                (folder).mkdir(parents=True, exist_ok=True)
                top, left = (int(rng.integers(0, side - SIDE + 1)) for side in pixels.shape[:2])
                Image.fromarray(pixels[top : top + SIDE, left : left + SIDE]).save(folder / f"{number:06}.jpg", quality=90)
        names = [f"crops/{number:06}.jpg" for number in range(count)]
        parquet.write_table(pa.table({"id": pa.array(range(7, 7 + 3 * count, 3), pa.int64()), "path": names}), manifest)
    return manifest


def plain(model: Path, paths: list[Path]) -> tuple[float, float]:
    """Images per second of a plain loop, by the clock and by its processor."""
    detector = Glad.from_pretrained(model)
    detector.predict(paths[:8], reconstruct=False)
    wall, own = time.perf_counter(), time.process_time()
    for start in range(0, len(paths), 256):
        detector.predict(paths[start : start + 256], reconstruct=False)
    return len(paths) / (time.perf_counter() - wall), len(paths) / (time.process_time() - own)


class Run:
    """One call of the command, and the processes below it."""

    def __init__(self, model: Path, manifest: Path, output: Path):
        self.output = output
        command = [sys.executable, "-m", "gladad", "inspect", str(model), "--manifest", str(manifest), "-o", str(output)]
        environment = os.environ | {"RAY_worker_niceness": "0"}  # else 15: on a busy machine actors would get next to nothing
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.driver = psutil.Popen([*command, "--num-actors", "1"], env=environment, **streams)
        self.seen: dict[int, psutil.Process] = {}

    def all(self) -> list[psutil.Process]:
        """The driver and all below it."""
        found = [self.driver]
        try:
            found += self.driver.children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen |= {process.pid: process for process in found}
        return found

    def find(self, part: str) -> psutil.Process | None:
        """The process whose command line holds a text."""
        for process in self.all():
            try:
                if part in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    def watch(self, until: Callable[[], bool]) -> Iterator[None]:
        """Every second until something is so, or the command has ended."""
        limit = time.monotonic() + PATIENCE
        while not until() and self.driver.poll() is None:
            if time.monotonic() > limit:
                raise SystemExit("nothing happens any more")
            self.all()
            yield
            time.sleep(1)

    def wait_for(self, parts: int) -> None:
        """Wait until so many more blocks are there."""
        goal = len(finished(self.output)) + parts if self.output.is_dir() else parts
        for _ in self.watch(lambda: self.output.is_dir() and len(finished(self.output)) >= goal):
            pass

    def end(self) -> str:
        """Wait for the command and for what it started; what it said."""
        try:
            said = self.driver.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            said = "did not end by itself"
            self.driver.kill()
        _, left = psutil.wait_procs([process for process in self.seen.values() if process.pid != self.driver.pid], timeout=60)
        for process in left:
            process.kill()
        return f"{said.strip()} [status {self.driver.poll()}, {len(left)} processes left over]"


def over_ray(model: Path, manifest: Path, output: Path) -> None:
    """Print rates and memory of a run in peace."""
    run, memory = Run(model, manifest, output), []
    used, first, last = [], 0.0, 0.0
    for _ in run.watch(lambda: False):
        there = len(finished(output)) if output.is_dir() else 0
        if there == (used[-1][0] if used else 0):
            continue
        try:
            actor = run.find(ACTOR)
            times, resident = actor.cpu_times(), [process.memory_info().rss for process in (run.driver, actor)]
            everything = sum(process.memory_full_info().uss for process in run.all())
        except (psutil.Error, AttributeError):
            continue
        last = time.perf_counter()
        first = first or last
        used.append((there, times.user + times.system))
        memory.append((there, *(round(size / 2**20) for size in (*resident, everything))))
    print(run.end())
    images = 256 * (used[-1][0] - used[0][0])
    clock, own = images / (last - first), images / (used[-1][1] - used[0][1])
    print(f"Ray: {clock:.2f} images/s by the clock, {own:.2f} per second of the actor's core ({images} images)")
    for row in memory[:: max(1, len(memory) // 12)]:
        print("blocks {:4d}: driver {} MiB, actor {} MiB, all processes {} MiB (unshared)".format(*row))


def killed(model: Path, manifest: Path, output: Path, count: int) -> bool:
    """Kill what is in charge, one after the other, and compare ids."""
    run = Run(model, manifest, output)
    run.wait_for(2)
    actor = run.find(ACTOR)
    actor.kill()
    run.wait_for(2)
    print(f"actor killed: the run went on, {len(finished(output))} blocks; another actor: {run.find(ACTOR).pid != actor.pid}")
    run.driver.kill()
    print("driver killed:", run.end(), len(finished(output)), "blocks")
    run = Run(model, manifest, output)
    run.wait_for(2)
    run.find(RAYLET).kill()
    print("raylet killed:", run.end(), len(finished(output)), "blocks")
    print("once more:", Run(model, manifest, output).end())
    ids = np.sort(dataset.dataset(output).to_table(columns=["id"])["id"].to_numpy())
    expected = np.sort(parquet.read_table(manifest)["id"].to_numpy())
    left = sorted(path.name for path in output.glob(".*"))
    print(f"{count} ids expected, {len(ids)} rows, {len(np.unique(ids))} different ids, leftovers: {left}")
    return bool(np.array_equal(ids, expected))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--plain", type=int, default=2560)
    parser.add_argument("--killed", type=int, default=5120)
    arguments = parser.parse_args()
    work, model = arguments.work.absolute(), arguments.work.absolute() / "model"
    work.mkdir(parents=True, exist_ok=True)
    manifest = crops(arguments.source, work, max(arguments.images, TRAINED))
    paths = list_images(work / "crops")
    if not model.is_dir():
        Glad.from_base("memory-bank", settings=SETTINGS).fit(paths[:TRAINED]).save_pretrained(model)
    clock, own = plain(model, paths[: arguments.plain])
    print(f"plain loop: {clock:.2f} images/s by the clock, {own:.2f} per second of its core ({arguments.plain} images)", flush=True)
    if arguments.images:
        over_ray(model, manifest, work / f"results-{arguments.images}")
    return (
        0
        if not arguments.killed or killed(model, crops(arguments.source, work, arguments.killed), work / "killed", arguments.killed)
        else 1
    )


if __name__ == "__main__":
    raise SystemExit(main())
