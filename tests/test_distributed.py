"""Several processes that share the images: results do not depend on their number, and an error of one is the error of all."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gladad
from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError
from gladad.core.processes import Processes, process_count, started
from gladad.report.text import cell


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("total", [0, 1, 7])
def test_shares_are_a_partition(count: int, total: int) -> None:
    shares = [list(Processes(rank, count).share(lambda number: number**2, total, 2)) for rank in range(count)]
    assert sorted(pair for share in shares for pair in share) == [(number, number**2) for number in range(total)]
    assert all(share == sorted(share) for share in shares)


def test_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with started() as processes, processes.one(lambda: memoryview(b"x")) as value:
        assert processes.main and (processes.rank, processes.count) == (0, 1)
        assert processes.merge([1, 2]) == [1, 2] and processes.on_main(lambda: 3) == 3 and bytes(value) == b"x"
    with pytest.raises(DataError, match="mine"), started():
        raise DataError("mine")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "only 2 of the 4 processes are on this machine"),
    ],
)
def test_environments_that_are_refused(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert process_count() == 1
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), started():
        pytest.fail("started")


def test_one_process_needs_no_accelerate() -> None:
    code = """
import sys, gladad.training.loop
from gladad.core.processes import started
with started() as processes:
    print(processes.merge([1]), "accelerate" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == "[1] False\n"


# ---------------------------------------------------------------------------------------------------- real processes


def environment(**more: str) -> dict[str, str]:
    """Of a process on one thread that imports the source under test."""
    own = {name: value for name, value in os.environ.items() if name != "GLADAD_DEBUG"}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gladad.__file__).parents[1]), "COLUMNS": "200"} | more


def torchrun(code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Two processes that run some code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, sys.executable, "-c", code, *arguments], env=environment(**more), **pipes)


def timeless(folder: Path) -> dict[str, Any]:
    """The content of all files of a report or of predictions but for times."""
    found: dict[str, Any] = {}
    spent = ""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        text = content.decode() if name.endswith(("html", "md", "json", "jsonl", "csv")) else ""
        if name == "report.json":
            report = json.loads(text)
            spent = cell("seconds_per_image", report["metrics"].pop("seconds_per_image"))
            found[name] = report | {"rows": [row | {"seconds": 0} for row in report["rows"]]}
        elif name.endswith("jsonl"):
            found[name] = [json.loads(line) | {"seconds": 0} for line in text.splitlines()]
        elif name.endswith("csv"):
            found[name] = [row | {"seconds": 0} for row in csv.DictReader(io.StringIO(text))]
        else:
            found[name] = text or content
    for name in {"index.html", "report.md"} & set(found):
        assert spent in found[name]
        found[name] = found[name].replace(spent, "")
    return found


COMMANDS = """
import errno, json, os, sys
from gladad.cli.main import main
from gladad.detector.glad import Glad

inspect, looked = Glad.inspect, 0
if os.environ["RANK"] == "1":
    sys.stdout = sys.stderr = open(sys.argv[2], "w")

def full(self, image, **options):
    global looked
    looked += 1
    if os.environ["RANK"] == "1" and looked == 2:
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")
    return inspect(self, image, **options)

for patch, *arguments in json.loads(sys.argv[1]):
    looked, Glad.inspect = 0, full if patch else inspect
    print("status", main(arguments), file=sys.stderr, flush=True)
"""


def test_two_processes_give_the_files_and_the_messages_of_one(
    model: Path, category: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = shutil.copytree(category, tmp_path / "widget")  # nine test images, of which the third cannot be read
    (parts / "test/good/001b.png").write_bytes((parts / "test/good/001.png").read_bytes()[:500])
    place, one = tmp_path / "place", tmp_path / "one"
    (place / "temporary").mkdir(parents=True)
    (place / "file").write_text("mine")
    photos, single = str(parts / "test"), str(parts / "test/hole/000.png")
    calls = {
        "kept": ["evaluate", str(model), str(parts), "--keep-maps"],
        "report": ["evaluate", str(model), str(parts), "--no-pictures"],  # its maps go through temporary files
        "all": ["predict", str(model), photos],
        "single": ["predict", str(model), single],  # nothing is left for the second process
        "file": ["evaluate", str(model), str(parts)],
    }
    failing = [["full", *calls["report"], "-o", str(place / "full")], ["full", *calls["all"], "-o", str(place / "full")]]
    commands = [["", *command, "-o", str(place / name)] for name, command in calls.items()] + failing
    process = torchrun(COMMANDS, json.dumps(commands), str(tmp_path / "second"), TMPDIR=str(place / "temporary"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    skipped = f"skipped: {parts / 'test/good/001b.png'}: cannot be read, the file is damaged or truncated (image file is truncated)"
    full = "error: process 1: OSError: [Errno 28] No space left on device: 'a.png'"
    is_file = f"error: {place / 'file'}: is a file; give a folder for the results"
    first = [*[skipped, "status 0"] * 3, "status 0", is_file, "status 1", *[full, "status 1"] * 2]
    assert err.splitlines() == first
    assert (tmp_path / "second").read_text().splitlines() == ["status 0"] * 7  # the first alone speaks
    assert "8 inspected" in out and "1 skipped" in out and "1 inspected" in out and out.count("image auroc") == 2
    assert sorted(path.name for path in place.iterdir()) == ["all", "file", "kept", "report", "single", "temporary"]
    assert [path for path in (place / "temporary").iterdir() if not path.name.startswith("torchelastic")] == []  # which is torchrun's
    capfd.readouterr()
    for name in ("kept", "report", "all", "single"):
        assert main([*calls[name], "-o", str(one / name)]) == 0
        assert timeless(place / name) == timeless(one / name)
    assert len(timeless(place / "kept")["report.json"]["rows"]) == 9 and (place / "kept/maps/000001.npz").is_file()


SHARING = """
import os, sys, tempfile, time
from functools import partial
from gladad.cli.common import guarded
from gladad.core.processes import started

def look(number):
    if sys.argv[2] == "killed":
        number == 3 and os._exit(9)
    else:
        os.write(1, b"working\\n")  # whole, though two processes write
        time.sleep(0.1)

@guarded
def run():
    with started() as processes:
        with processes.one(partial(tempfile.TemporaryDirectory, dir=sys.argv[1])):
            processes.merge(list(processes.share(look, 6000 if sys.argv[2] == "ended" else 6, 1)))

run()
"""


def told(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith(("error: ", "interrupted; "))]


def test_nothing_is_left_by_processes_that_are_ended(tmp_path: Path) -> None:
    process = torchrun(SHARING, str(tmp_path), "ended")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)] == ["working\n"] * 4
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and list(tmp_path.iterdir()) == []
    assert told(err) == ["interrupted; no result was written"]


def test_nothing_is_left_by_processes_of_which_one_is_killed(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without torchrun, which may end the first before it has seen by itself that the second is gone.
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", SHARING, str(tmp_path), "killed"],
            env=environment(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            **pipes,
        )
        for rank in "01"
    )
    ends = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert first.returncode == 1 and second.returncode == 9 and list(tmp_path.iterdir()) == []
    assert told("".join(ends)) == ["error: one of the 2 processes has ended without a word, perhaps for want of memory"]
