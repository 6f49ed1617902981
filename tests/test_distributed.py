"""Several processes that share the images: results do not depend on their number, and an error of one is the error of all."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import gladad
from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError, GladError, MissingExtraError
from gladad.core.processes import Processes, started
from gladad.core.records import Prediction, Report, Sample
from gladad.decision.conformal import calibrate
from gladad.evaluation.run import evaluate, write_report
from gladad.report.gallery import GalleryItem
from gladad.report.text import cell

LIMIT = 60.0
"""Seconds after which processes count as hanging."""


class Meeting:
    """Where threads meet in the place of processes; values are pickled as between these."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=LIMIT)
        self.values = [b""] * count
        self.failed = threading.Event()


class Seat:
    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank = meeting, rank

    def exchange(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = pickle.dumps(value)
        self.meeting.barrier.wait()
        found = [pickle.loads(value) for value in self.meeting.values]
        self.meeting.barrier.wait()
        return found

    def alarm(self) -> None:
        self.meeting.failed.set()

    def alarmed(self) -> bool:
        return self.meeting.failed.is_set()


def together(count: int, run: Callable[[Processes], Any]) -> list[Any]:
    """What each of several processes returns, or the error it ends with."""
    meeting = Meeting(count)
    outcomes: list[Any] = [None] * count

    def work(rank: int) -> None:
        processes = Processes(rank, count, rank, Seat(meeting, rank))
        try:
            with processes.together():
                outcomes[rank] = run(processes)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    return outcomes


# ------------------------------------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("total", [0, 1, 4, 7])
def test_shares_are_a_partition_and_come_back_in_order(count, total):
    looked: list[int] = []

    def square(number: int) -> int:
        looked.append(number)
        return number * number

    def run(processes: Processes) -> tuple[list[int], list[int]]:
        own = dict(processes.share(square, total, 2))
        assert list(own) == sorted(own)
        return list(own), processes.merge(list(own.values()))

    outcomes = together(count, run)
    assert sorted(looked) == list(range(total))
    assert [merged for _, merged in outcomes] == [[number * number for number in range(total)]] * count
    sizes = [len(own) for own, _ in outcomes]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with started() as processes:
        assert processes.main and (processes.rank, processes.count, processes.local_rank) == (0, 1, 0)
        assert processes.gather("x") == ["x"] and processes.merge([1, 2]) == [1, 2]
        assert list(processes.share(str, 3, 1)) == [(0, "0"), (1, "1"), (2, "2")]
    with pytest.raises(DataError, match="mine"), started():
        raise DataError("mine")


def test_gathered_values_are_in_the_order_of_ranks():
    assert together(3, lambda processes: processes.gather(processes.rank * 10)) == [[0, 10, 20]] * 3


def test_the_main_process_alone_makes_what_there_is_one_of():
    events: list[str] = []

    @contextmanager
    def block() -> Iterator[str]:
        events.append("begin")
        yield "the folder"
        events.append("end")

    def ask(rank: int) -> str:
        events.append("asked")
        return f"by {rank}"

    def run(processes: Processes) -> tuple[str, str]:
        answer = processes.on_main(lambda: ask(processes.rank))
        with processes.one(block) as value:
            events.append("used")
        return answer, value

    assert together(3, run) == [("by 0", "the folder")] * 3
    assert events == ["asked", "begin", "used", "used", "used", "end"]


# ------------------------------------------------------------------------------------------------------------ failing


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_when_one_fails_all_stop_at_their_next_image(failing):
    counts = [0, 0, 0]
    begun = threading.Barrier(3, timeout=LIMIT)
    folder: list[str] = []

    def run(processes: Processes) -> None:
        def look(number: int) -> None:
            counts[processes.rank] += 1
            if counts[processes.rank] == 2:
                begun.wait()
                if processes.rank == failing:
                    raise OSError(errno.ENOSPC, "No space left on device", "a.png")
                assert processes._link is not None
                while not processes._link.alarmed():
                    pass

        @contextmanager
        def block() -> Iterator[None]:
            try:
                yield
            finally:
                folder.append(f"removed after {counts}")

        with processes.one(block):
            for _ in processes.share(look, 3000, 1):
                pass

    outcomes = together(3, run)
    assert [type(outcome) for outcome in outcomes] == [OSError] * 3
    assert {str(outcome) for outcome in outcomes} == {"[Errno 28] No space left on device: 'a.png'"}
    assert counts == [2, 2, 2]
    assert folder == ["removed after [2, 2, 2]"]
    told = outcomes[(failing + 1) % 3]
    assert f"in process {failing}:" in told.__notes__[0] and "in look" in told.__notes__[0]  # for those who debug


@pytest.mark.parametrize("place", ["on_main", "begin", "end"])
def test_when_the_main_process_fails_all_do(place):
    @contextmanager
    def block() -> Iterator[None]:
        if place == "begin":
            raise DataError(place)
        yield
        if place == "end":
            raise DataError(place)

    def fail() -> None:
        if place == "on_main":
            raise DataError(place)

    def run(processes: Processes) -> None:
        processes.on_main(fail)
        with processes.one(block):
            pass

    outcomes = together(3, run)
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(DataError, place)] * 3


def test_each_raises_its_own_error_when_several_fail():
    def run(processes: Processes) -> None:
        raise DataError(f"of {processes.rank}")

    assert [str(outcome) for outcome in together(3, run)] == ["of 0", "of 1", "of 2"]


def test_errors_that_cannot_be_sent_become_ones_that_can():
    class Local(Exception):
        pass

    def run(processes: Processes) -> None:
        if processes.rank:
            raise MissingExtraError("A plot", "plots") if processes.rank == 1 else Local("odd")
        processes.gather(None)

    first, *_ = together(2, run)
    assert type(first) is GladError and str(first) == str(MissingExtraError("A plot", "plots"))

    def odd(processes: Processes) -> None:
        if processes.rank:
            raise Local("odd")

    first, _ = together(2, odd)
    assert type(first) is RuntimeError and str(first) == "Local: odd"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2"}, "RANK is '', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, but WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0, but WORLD_SIZE 0"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "only 2 of the 4 processes are on this machine"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "do not find each other .*MASTER_ADDR.*; start them with torchrun"),
    ],
)
def test_environments_that_are_refused(monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), started():
        pytest.fail("started")


# --------------------------------------------------------------------------------------------------------- evaluation


class Brightness:
    """Brightness is the map, and the score its maximum."""

    def __init__(self) -> None:
        self.calibration_ = calibrate([50.0, 90.0, 100.0, 110.0], [1.0, 1.0, 1.0, 1.0], 0.2)
        self.workers = 2

    def inspect(self, image: NDArray[np.uint8], *, reconstruct: bool = True) -> Prediction:
        values = image[..., 0].astype(np.float32) / 110
        score = float(values.max())
        return Prediction(score, 0.5, score > 1, 300, values, values > 1, (), values.shape, None, None, 0.25)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Five normal images, and five anomalous ones of which other shares are found; one without a mask and one unreadable."""
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = []
    for index in range(5):
        for gt_label in (0, 1):
            pixels = rng.integers(20, 100 + 4 * index, (64, 64)).astype(np.uint8)
            if gt_label:
                pixels[mask > 0] = np.linspace(60, 120 + 25 * index, int((mask > 0).sum())).astype(np.uint8)
            path = tmp_path / f"{gt_label}{index}.png"
            Image.fromarray(pixels).convert("RGB").save(path)
            has_mask = gt_label and index != 2
            found.append(Sample(path, tmp_path / "mask.png" if has_mask else None, gt_label, "lamp", "spot" if gt_label else "good"))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    found.insert(4, Sample(tmp_path / "broken.png", None, 1, "lamp", "spot"))
    return found


def put(samples: list[Sample], folder: Path, processes: Processes, *, keep_maps: bool = True) -> Report:
    items: list[GalleryItem] = []
    maps = folder / "maps" if keep_maps else None
    report = evaluate(Brightness(), samples, collect=items.append, pictures=folder / "pictures", maps=maps, processes=processes)
    assert len(items) == (10 if processes.main else 0)
    if processes.main:
        write_report(report, items, folder)
    return report


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("count", [2, 3, 12])
def test_the_report_does_not_depend_on_the_number_of_processes(samples, tmp_path, count):
    expected = put(samples, tmp_path / "one", Processes())
    assert expected.counts["skipped"] == 1 and expected.counts["anomalous_without_mask"] == 1
    each = [row["aupimo"] for row in expected.rows if "aupimo" in row]
    assert len(set(each)) == 4 and sorted(each)[1] > 0  # a wrong order would be seen
    reports = together(count, lambda processes: put(samples, tmp_path / "several", processes))
    assert reports == [expected] * count
    assert files(tmp_path / "several") == files(tmp_path / "one") and len(files(tmp_path / "one")) > 30


def test_without_kept_maps_no_file_is_left(samples, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    expected = put(samples, tmp_path / "one", Processes(), keep_maps=False)
    assert together(2, lambda processes: put(samples, tmp_path / "several", processes, keep_maps=False)) == [expected] * 2
    assert files(tmp_path / "several") == files(tmp_path / "one")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_main_process_tells_of_the_progress(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told: list[tuple[int, str, int, int]] = []
    kept: list[int] = []

    def run(processes: Processes) -> Report:
        def progress(*call: Any) -> None:
            told.append((processes.rank, *call))
            kept.append(len(list(tmp_path.rglob("*.npz"))))

        return evaluate(Brightness(), samples, progress=progress, processes=processes)

    together(3, run)
    assert kept[4:] == [9, 8, 7, 6, 6, 5, 4, 3, 2, 1, 0]  # a map that has been read is removed; there is none of the fifth image
    assert told[:4] == [(0, "inspecting", done, 11) for done in (3, 6, 9, 11)]
    assert told[4:] == [(0, "reading maps", done, 11) for done in range(1, 12)]


@pytest.mark.parametrize("unreadable", [[1], [0, 2], [0, 1, 2]])
def test_shares_in_which_nothing_can_be_read(samples, unreadable):
    three = [samples[4] if number in unreadable else samples[number] for number in range(3)]
    outcomes = together(2, lambda processes: evaluate(Brightness(), three, processes=processes))
    if len(unreadable) == 3:
        assert [(type(error), str(error)) for error in outcomes] == [(DataError, "none of the 3 images could be read")] * 2
    else:
        assert outcomes == [evaluate(Brightness(), three)] * 2


# ---------------------------------------------------------------------------------------------------- real processes


@pytest.fixture
def parts(category: Path, tmp_path: Path) -> Path:
    """A category of nine test images, of which the third cannot be read."""
    parts = shutil.copytree(category, tmp_path / "widget")
    (parts / "test/good/001b.png").write_bytes((parts / "test/good/001.png").read_bytes()[:500])
    return parts


def environment(**more: str) -> dict[str, str]:
    """Of a process on one thread that imports the source under test."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gladad.__file__).parents[1]), "COLUMNS": "200"} | more


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def timeless(folder: Path) -> dict[str, Any]:
    """The content of all files of a report or of predictions but for times."""
    found: dict[str, Any] = {}
    time = ""
    for name, content in files(folder).items():
        text = content.decode() if name.endswith(("html", "md", "json", "jsonl", "csv")) else ""
        if name == "report.json":
            report = json.loads(text)
            time = cell("seconds_per_image", report["metrics"].pop("seconds_per_image"))
            found[name] = report | {"rows": [row | {"seconds": 0} for row in report["rows"]]}
        elif name.endswith("jsonl"):
            found[name] = [json.loads(line) | {"seconds": 0} for line in text.splitlines()]
        elif name.endswith("csv"):
            found[name] = [row | {"seconds": 0} for row in csv.DictReader(io.StringIO(text))]
        else:
            found[name] = text or content
    for name in {"index.html", "report.md"} & set(found):
        assert time in found[name]
        found[name] = found[name].replace(time, "")
    return found


def test_torchrun_gives_the_report_of_one_process(model, parts, tmp_path, capfd):
    arguments = ["evaluate", str(model), str(parts), "--keep-maps", "-o"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    _, skipped = capfd.readouterr()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "gladad"]
    command += [*arguments, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * LIMIT, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stderr == skipped and skipped.startswith("skipped: ") and skipped.count("\n") == 1
    assert done.stdout.endswith(f"report: {tmp_path / 'two/index.html'}\n") and done.stdout.count("image auroc") == 1
    expected = timeless(tmp_path / "one")
    assert len(expected["report.json"]["rows"]) == 9 and "maps/000001.npz" in expected and "pictures/map/good/000.jpg" in expected
    assert timeless(tmp_path / "two") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two", "widget"]


DRIVER = """
import errno, json, os, sys
from gladad.cli.main import main
from gladad.detector.glad import Glad

inspect, rank, looked = Glad.inspect, os.environ["RANK"], 0

def full(self, image, **options):
    global looked
    looked += 1
    if rank == "1" and looked == 2:
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")
    return inspect(self, image, **options)

def killed(self, image, **options):
    return inspect(self, image, **options) if rank == "0" else os._exit(9)

for patch, *arguments in json.loads(sys.argv[1]):
    looked = 0
    Glad.inspect = {"full": full, "killed": killed}.get(patch, inspect)
    status = main(arguments)
    print(f"status {status}", file=sys.stderr, flush=True)
"""


def test_two_processes_and_what_goes_wrong_with_them(model, parts, tmp_path, capfd):
    broken = tmp_path / "broken"
    (broken / "test/good").mkdir(parents=True)
    for name in ("1", "2", "3"):
        (broken / f"test/good/{name}.png").write_bytes(b"nothing")
    place = tmp_path / "place"
    (place / "temporary").mkdir(parents=True)
    (place / "file").write_text("mine")
    one_image, photos = str(parts / "test/hole/000.png"), str(parts / "test")
    calls = [
        ["", "predict", str(model), photos, "-o", str(place / "all")],
        ["", "predict", str(model), one_image, "-o", str(place / "single")],  # nothing is left for the second process
        ["", "predict", str(model), str(broken), "-o", str(place / "none"), "-q"],
        ["", "evaluate", str(model), str(broken), "-o", str(place / "none")],
        ["", "evaluate", str(model), str(parts), "-o", str(place / "file")],
        ["full", "evaluate", str(model), str(parts), "-o", str(place / "full")],
        ["full", "predict", str(model), photos, "-o", str(place / "full")],
        ["killed", "evaluate", str(model), str(parts), "-o", str(place / "killed")],
    ]
    # Without torchrun, which would end what hangs.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TMPDIR": str(place / "temporary")}
    command = [sys.executable, "-c", DRIVER, json.dumps(calls)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment(**shared, RANK=str(rank)), **pipes) for rank in range(2)]
    try:
        (out, first), (other_out, second) = (process.communicate(timeout=2 * LIMIT) for process in started)
    finally:
        for process in started:
            process.kill()
    skipped = f"skipped: {parts / 'test/good/001b.png'}: cannot be read, the file is damaged or truncated"
    unreadable = [f"skipped: {broken / 'test/good' / name}.png: not an image" for name in ("1", "2", "3")]
    expected: list[list[str]] = [
        [skipped, "status 0"],
        ["status 0"],
        [*unreadable, "error: none of the 3 images could be inspected; nothing was written", "status 1"],
        ["error: none of the 3 images could be read", "status 1"],
        [f"error: {place / 'file'}: is a file; give a folder for the results", "status 1"],
        *[[f"error: {place / 'full'}: cannot be written (No space left on device)", "status 1"]] * 2,
        ["error: one of the 2 processes has ended without a word", "status 1"],
    ]
    lines = [line for step in expected for line in step]
    assert len(first.splitlines()) == len(lines), first
    assert all(line.startswith(start) for line, start in zip(first.splitlines(), lines, strict=True)), first
    assert second.splitlines() == [step[-1] for step in expected[:-1]]  # the first alone speaks; the last call ended the second
    assert [process.returncode for process in started] == [0, 9]
    assert other_out == "" and "8 inspected" in out and "1 skipped" in out and "1 inspected" in out
    assert sorted(path.name for path in place.iterdir()) == ["all", "file", "single", "temporary"]
    assert list((place / "temporary").iterdir()) == []
    capfd.readouterr()
    for images, name in ((photos, "all"), (one_image, "single")):
        assert main(["predict", str(model), images, "-o", str(tmp_path / name)]) == 0
        assert timeless(place / name) == timeless(tmp_path / name)
    assert len(timeless(place / "all")["predictions.jsonl"]) == 9
