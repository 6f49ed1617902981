"""A watched folder: complete files only, each decided exactly once, and put where its decision says."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import draw_part
from service_base import PRODUCT, make_station
from sqlalchemy import select, update

from gladad.cli.main import main
from gladad.core.errors import ConfigError
from gladad.core.threads import CancelToken
from gladad.service import audit, sorting
from gladad.service.inspector import WorkerError
from gladad.service.line import Line, NotReadyError, Origin
from gladad.service.products import StoppedError, activate, add_version, stop
from gladad.service.record import StorageError
from gladad.service.sorting import move, sorter, tag
from gladad.service.station import Station, UnknownError
from gladad.service.tables import decisions, watched
from gladad.service.watch import Watch, identity_of

SETTLE = 0.2
QUICK = {"settle": SETTLE, "retry": 0.3}


def part(seed: int, defective: bool = False) -> bytes:
    buffer = io.BytesIO()
    draw_part(seed, defective)[0].save(buffer, "PNG")
    return buffer.getvalue()


GOOD, BAD = part(5), part(2001, defective=True)


@pytest.fixture(scope="module")
def line(station: Station) -> Iterator[Line]:
    made = Line(station, 2)
    yield made
    made.close()


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


@contextmanager
def watching(line: Line, folder: Path, **options) -> Iterator[list[str]]:
    """A watch on a thread; gives what it tells. What it raises is raised at the end."""
    token, told, raised = CancelToken(), [], []

    def run() -> None:
        try:
            Watch(line, PRODUCT, folder, "tester", cancel=token, tell=told.append, **QUICK | options).run()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield told
    finally:
        token.cancel()
        thread.join()
        assert not raised, raised


def once(line: Line, folder: Path, **options) -> dict[str, int]:
    return dict(Watch(line, PRODUCT, folder, "tester", **QUICK | options).run(once=True))


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def decided(station: Station, folder: Path) -> dict[str, list[str]]:
    """Names of files -> the decisions about them."""
    query = select(watched.c.name, decisions.c.decision, decisions.c.source)
    query = query.join(decisions, decisions.c.id == watched.c.decision_id).where(watched.c.folder == str(folder.resolve()))
    found: dict[str, list[str]] = {}
    with station.record.read() as connection:
        for name, decision, source in connection.execute(query):
            assert source == "watch"
            found.setdefault(name, []).append(decision)
    return found


def names(station: Station) -> list[str]:
    """Of all images in the record."""
    with station.record.read() as connection:
        return list(connection.execute(select(decisions.c.image_name)).scalars())


def problems(station: Station, folder: Path) -> dict[str, str]:
    query = select(watched.c.name, watched.c.problem).where(watched.c.folder == str(folder.resolve()), watched.c.problem.is_not(None))
    with station.record.read() as connection:
        return {name: problem for name, problem in connection.execute(query)}


# -- what is inspected ------------------------------------------------------------------------------------------


def test_files_are_inspected_as_they_appear(line, station, inbox):
    (inbox / "a.png").write_bytes(GOOD)
    with watching(line, inbox) as told:
        until(lambda: decided(station, inbox) == {"a.png": ["accept"]})
        (inbox / "deep/er").mkdir(parents=True)
        (inbox / "deep/er/b.PNG").write_bytes(BAD)
        until(lambda: decided(station, inbox) == {"a.png": ["accept"], "deep/er/b.PNG": ["reject"]})
    assert told == []


def test_what_is_no_image_is_passed_over(line, station, inbox, tmp_path):
    (tmp_path / "elsewhere.png").write_bytes(GOOD)
    (inbox / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (inbox / ".hidden").mkdir()
    for name in (".hidden.png", "a.png.part", "b.png.tmp", "c.png.partial", "notes.txt", ".hidden/d.png"):
        (inbox / name).write_bytes(GOOD)
    os.mkfifo(inbox / "pipe.png")
    (inbox / "e.png").write_bytes(GOOD)
    assert once(line, inbox) == {"accept": 1}
    assert list(decided(station, inbox)) == ["e.png"]


def test_a_file_that_is_written_slowly_is_taken_whole(line, station, inbox):
    with watching(line, inbox, settle=0.6) as told:
        with (inbox / "slow.png").open("wb") as file:
            for start in range(0, len(GOOD), 1 + len(GOOD) // 12):
                file.write(GOOD[start : start + 1 + len(GOOD) // 12])
                file.flush()
                time.sleep(0.15)
                assert decided(station, inbox) == {}
        until(lambda: decided(station, inbox) == {"slow.png": ["accept"]})
    assert told == [] and problems(station, inbox) == {}


def test_a_file_that_is_renamed_into_place_is_taken_once(line, station, inbox):
    with watching(line, inbox):
        (inbox / "x.png.part").write_bytes(GOOD)
        time.sleep(4 * SETTLE)
        (inbox / "x.png.part").rename(inbox / "x.png")
        until(lambda: decided(station, inbox) == {"x.png": ["accept"]})


def test_once_leaves_what_is_being_written(line, station, inbox):
    (inbox / "a.png").write_bytes(GOOD)
    stop_writing = threading.Event()

    def write() -> None:
        with (inbox / "growing.png").open("wb") as file:
            while not stop_writing.is_set():
                file.write(b"x")
                file.flush()
                time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: (inbox / "growing.png").exists())
        assert once(line, inbox) == {"accept": 1}
    finally:
        stop_writing.set()
        writer.join()
    assert list(decided(station, inbox)) == ["a.png"]


# -- exactly once -----------------------------------------------------------------------------------------------


def test_each_file_is_decided_once(line, station, inbox):
    for number in range(4):
        (inbox / f"{number}.png").write_bytes(part(number))
    assert sum(once(line, inbox).values()) == 4
    (inbox / "0.png").rename(inbox / "zero.png")
    (inbox / "sub").mkdir()
    (inbox / "1.png").rename(inbox / "sub/1.png")
    assert once(line, inbox) == {}
    with watching(line, inbox):
        (inbox / "2.png").rename(inbox / "two.png")
        (inbox / "new.png").write_bytes(GOOD)
        until(lambda: "new.png" in decided(station, inbox))
    assert sorted(decided(station, inbox)) == ["0.png", "1.png", "2.png", "3.png", "new.png"]
    (inbox / "3.png").write_bytes(BAD)  # another content is another part
    assert once(line, inbox) == {"reject": 1}


def test_one_folder_has_one_watch(line, inbox):
    with watching(line, inbox):
        until(lambda: list(line.station.folder.glob(".watch-*.lock")))
        time.sleep(0.2)
        with pytest.raises(ConfigError, match="watched already"):
            once(line, inbox)
    assert once(line, inbox) == {}


def test_a_refused_image_is_told_once_and_tried_again_when_it_changes(line, station, inbox):
    (inbox / "bad.png").write_bytes(GOOD[: len(GOOD) // 2])
    (inbox / "good.png").write_bytes(GOOD)
    with watching(line, inbox) as told:
        until(lambda: problems(station, inbox) and decided(station, inbox))
        time.sleep(5 * SETTLE)
        assert len(told) == 1 and told[0].startswith("refused: bad.png: ") and "damaged" in told[0]
    assert once(line, inbox) == {}
    (inbox / "bad.png").write_bytes(GOOD)
    assert once(line, inbox) == {"accept": 1}
    assert decided(station, inbox) == {"good.png": ["accept"], "bad.png": ["accept"]}


def test_what_is_too_large_is_refused_unread(model, tmp_path, inbox):
    small = make_station(tmp_path / "line", model, max_bytes=len(GOOD) + 100)
    line = Line(small, 1)
    try:
        (inbox / "large.png").write_bytes(GOOD + b"x" * 200)
        (inbox / "good.png").write_bytes(GOOD)
        assert once(line, inbox) == {"accept": 1, "refused": 1}
        assert "more than is accepted" in problems(small, inbox)["large.png"]
    finally:
        line.close()
        small.close()


def test_an_image_that_the_worker_dies_of_is_refused_in_the_end(line, station, inbox, monkeypatch):
    (inbox / "deadly.png").write_bytes(part(7))
    (inbox / "good.png").write_bytes(GOOD)
    inspect, tried = line.inspect, []

    def dies(product, content, origin, **options):
        if origin.name != "deadly.png":
            return inspect(product, content, origin, **options)
        tried.append(origin.name)
        future = Future()
        future.set_exception(WorkerError("the inspection process ended"))
        return future

    monkeypatch.setattr(line, "inspect", dies)
    assert once(line, inbox) == {"accept": 1, "refused": 1}
    assert len(tried) == 3 and problems(station, inbox) == {"deadly.png": "the inspection process ended"}


# -- nothing is lost --------------------------------------------------------------------------------------------


def test_a_stopped_product_is_waited_for(line, station, inbox):
    stop(station, PRODUCT, "for a test", "tester")
    line.forget(PRODUCT)
    (inbox / "a.png").write_bytes(GOOD)
    with pytest.raises(StoppedError):
        once(line, inbox)
    with watching(line, inbox) as told:
        until(lambda: told)
        time.sleep(1.0)
        assert len(told) == 1 and "for a test" in told[0]
        activate(station, PRODUCT, 1, "tester")
        until(lambda: decided(station, inbox) == {"a.png": ["accept"]})


def test_a_full_disk_is_waited_for(line, station, inbox, monkeypatch):
    (inbox / "a.png").write_bytes(GOOD)
    full = threading.Event()
    full.set()
    add = station.pictures.add

    def limited(path: Path, content: bytes) -> None:
        if full.is_set():
            raise StorageError("the disk is full")
        add(path, content)

    monkeypatch.setattr(station.pictures, "add", limited)
    with watching(line, inbox) as told:
        until(lambda: told)
        time.sleep(1.0)
        assert told == ["waiting: the disk is full"] and decided(station, inbox) == {} and problems(station, inbox) == {}
        full.clear()
        until(lambda: decided(station, inbox) == {"a.png": ["accept"]})


def test_a_folder_that_goes_away_is_waited_for(line, station, inbox):
    (inbox / "a.png").write_bytes(GOOD)
    with watching(line, inbox) as told:
        until(lambda: decided(station, inbox))
        inbox.rename(inbox.with_name("away"))
        until(lambda: told)
        inbox.with_name("away").rename(inbox)
        (inbox / "b.png").write_bytes(GOOD)
        until(lambda: "b.png" in decided(station, inbox))
    assert decided(station, inbox) == {"a.png": ["accept"], "b.png": ["accept"]}


def test_mistakes_are_told_at_once(line, station, inbox):
    with pytest.raises(UnknownError, match="gear"):
        Watch(line, "gear", inbox, "tester")
    with pytest.raises(ConfigError, match="no such folder"):
        Watch(line, PRODUCT, inbox / "nothing", "tester")
    with pytest.raises(ConfigError, match="pictures"):
        Watch(line, PRODUCT, station.folder / "pictures", "tester")
    assert main(["watch", str(inbox), "--station", str(station.folder), "--product", PRODUCT, "--sort", "x", "--tag"]) == 1


# -- afterwards -------------------------------------------------------------------------------------------------


def test_files_are_sorted(line, station, inbox):
    sorted_ = inbox / "done"  # within the folder itself: what is there is not inspected again
    options = {"finish": sorter(sorted_), "apart": [sorted_ / each for each in sorting.DECISIONS]}
    (inbox / "sub").mkdir()
    (inbox / "good.png").write_bytes(GOOD)
    (inbox / "bad.png").write_bytes(BAD)
    (inbox / "sub/bad.png").write_bytes(BAD)
    (inbox / "broken.png").write_bytes(b"nothing")
    assert once(line, inbox, **options) == {"accept": 1, "reject": 2, "refused": 1}
    found = sorted(path.relative_to(inbox).as_posix() for path in inbox.rglob("*") if path.is_file())
    assert found == ["broken.png", "done/accept/good.png", "done/reject/bad-1.png", "done/reject/bad.png"]
    assert (sorted_ / "accept/good.png").read_bytes() == GOOD
    assert once(line, inbox, **options) == {}
    with station.record.read() as connection:
        assert set(connection.execute(select(watched.c.moved).where(watched.c.folder == str(inbox))).scalars()) == {True}


def test_a_move_that_was_cut_off_is_made_up_for(line, station, inbox, tmp_path):
    (inbox / "a.png").write_bytes(GOOD)
    (inbox / "b.png").write_bytes(part(6))

    def cut_off(path, row) -> None:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        once(line, inbox, finish=cut_off)
    until(lambda: len(decided(station, inbox)) == 2)
    assert len(list(inbox.iterdir())) == 2
    assert once(line, inbox, finish=sorter(tmp_path / "done")) == {}
    assert sorted(path.name for path in (tmp_path / "done/accept").iterdir()) == ["a.png", "b.png"]
    assert list(inbox.iterdir()) == []


def test_a_target_that_refuses_is_waited_for(line, station, inbox, tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done/accept").write_text("in the way")
    for number in range(3):
        (inbox / f"{number}.png").write_bytes(part(10 + number))
    with watching(line, inbox, finish=sorter(tmp_path / "done")) as told:
        until(lambda: len(decided(station, inbox)) == 3)
        time.sleep(1.5)
        assert len(told) == 1 and "done/accept" in told[0] and len(list(inbox.iterdir())) == 3
        (tmp_path / "done/accept").unlink()
        until(lambda: not list(inbox.iterdir()))
    assert len(list((tmp_path / "done/accept").iterdir())) == 3


def test_what_was_overwritten_meanwhile_is_not_moved(line, inbox, tmp_path, monkeypatch):
    """A camera that writes one name again and again."""
    (inbox / "latest.png").write_bytes(GOOD)
    place, inspect = sorter(tmp_path / "done"), line.inspect

    def overwritten(*given, **options):
        (inbox / "latest.png").write_bytes(BAD)
        return inspect(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(line, "inspect", overwritten)
        assert once(line, inbox, finish=place) == {"accept": 1}
    assert (inbox / "latest.png").read_bytes() == BAD and not (tmp_path / "done").exists()
    assert once(line, inbox, finish=place) == {"reject": 1}
    assert [path.parent.name for path in (tmp_path / "done").rglob("*.png")] == ["reject"]


def test_what_changed_after_it_was_complete_is_not_taken(line, station, inbox, monkeypatch):
    for name, changed in (("first.png", 1), ("overwritten.png", 2), ("renamed.png", 3)):
        (inbox / name).write_bytes(GOOD)
        os.utime(inbox / name, (changed, changed))  # taken in this order
    inspect = line.inspect

    def late(*given, **options):
        (inbox / "overwritten.png").write_bytes(BAD)
        (inbox / "renamed.png").rename(inbox / "new name.png")
        return inspect(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(line, "inspect", late)
        assert once(line, inbox) == {"accept": 1}
    assert once(line, inbox) == {"accept": 1, "reject": 1}
    assert decided(station, inbox) == {"first.png": ["accept"], "overwritten.png": ["reject"], "new name.png": ["accept"]}


def test_moving_never_replaces(tmp_path):
    source, target = tmp_path / "a/part.png", tmp_path / "b"
    source.parent.mkdir()
    for content in (b"1", b"2", b"3"):
        source.write_bytes(content)
        move(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"part.png": b"1", "part-1.png": b"2", "part-2.png": b"3"}
    source.write_bytes(b"4")
    os.link(source, target / "part-3.png")  # cut off between its two steps
    move(source, target)
    assert not source.exists() and len(list(target.iterdir())) == 4


@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EPERM])
def test_moving_where_files_have_no_second_names(tmp_path, monkeypatch, refusal):
    source, target, link = tmp_path / "a/part.png", tmp_path / "b", os.link
    source.parent.mkdir()

    def refuse(path: Path, other: Path) -> None:
        if refusal == errno.EPERM or path.parent == source.parent:
            raise OSError(refusal, os.strerror(refusal))
        link(path, other)

    monkeypatch.setattr(os, "link", refuse)
    for content in (b"1", b"2"):
        source.write_bytes(content)
        changed = source.stat().st_mtime
        move(source, target)
        assert not source.exists()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {"part.png": b"1", "part-1.png": b"2"}
    assert (target / "part-1.png").stat().st_mtime == pytest.approx(changed)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no second file system /dev/shm")
def test_moving_to_another_file_system(tmp_path):
    target = Path("/dev/shm") / f"gladad-{os.getpid()}"
    try:
        source = tmp_path / "part.png"
        source.write_bytes(GOOD)
        move(source, target)
        assert not source.exists() and (target / "part.png").read_bytes() == GOOD
        shutil.copy2(target / "part.png", source)  # cut off before the first one was deleted
        move(source, target)
        assert not source.exists() and [path.name for path in target.iterdir()] == ["part.png"]
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_decisions_are_written_beside_their_images(line, station, inbox):
    (inbox / "a.png").write_bytes(GOOD)
    (inbox / "b.png").write_bytes(BAD)
    assert once(line, inbox, finish=tag) == {"accept": 1, "reject": 1}
    assert sorted(path.name for path in inbox.iterdir()) == ["a.png", "a.png.json", "b.png", "b.png.json"]
    said = json.loads((inbox / "b.png.json").read_text())
    assert said["decision"] == "reject" and said["regions"] and said["image_name"] == "b.png" and said["product"] == PRODUCT
    (inbox / "a.png.json").unlink()  # as if it had been cut off
    with station.record.write() as connection:
        connection.execute(update(watched).where(watched.c.name == "a.png", watched.c.folder == str(inbox)).values(moved=False))
    assert once(line, inbox, finish=tag) == {}
    assert json.loads((inbox / "a.png.json").read_text())["decision"] == "accept"


# -- the command ------------------------------------------------------------------------------------------------


def command(station: Path, inbox: Path, *options: str) -> list[str]:
    program = [sys.executable, "-m", "gladad", "watch", str(inbox), "--station", str(station), "--product", PRODUCT]
    return [*program, "--threads", "2", "--settle", str(SETTLE), *options]


@pytest.mark.slow
def test_nothing_is_lost_or_decided_twice_when_it_is_killed(model, tmp_path, inbox):
    station = make_station(tmp_path / "line", model)
    done, total = tmp_path / "done", 60
    run = command(tmp_path / "line", inbox, "--sort", str(done))
    for number in range(total):
        (inbox / f"{number}.png").write_bytes(part(number, number % 5 == 0))
    for enough in (5, 25):
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until(lambda enough=enough: len(names(station)) >= enough, 60)
        process.kill()
        process.wait()
    assert len(names(station)) < total
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    until(lambda: not list(inbox.iterdir()), 60)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and f"decided by {PRODUCT}" in output
    assert sorted(names(station)) == sorted(f"{number}.png" for number in range(total))
    with station.record.read() as connection:
        where = dict(connection.execute(select(decisions.c.image_name, decisions.c.decision)).all())
    found = {path.name: path.parent.name for path in done.rglob("*.png")}
    assert found == where
    audit.verify(station.record)
    station.close()


def test_the_command_inspects_what_is_there(station, inbox, capsys):
    (inbox / "a.png").write_bytes(GOOD)
    (inbox / "b.png").write_bytes(b"nothing")
    options = ["--station", str(station.folder), "--product", PRODUCT, "--once", "--settle", "0.1", "--threads", "1"]
    assert main(["watch", str(inbox), *options, "--tag"]) == 0
    told = capsys.readouterr()
    assert told.out == f"1 accept, 0 warn, 0 reject, 1 refused; decided by {PRODUCT}\n"
    assert "refused: b.png: not an image" in told.err
    assert (inbox / "a.png.json").is_file()
    assert main(["watch", str(inbox), "--station", str(station.folder), "--product", "gear", "--once"]) == 1
    assert "there is no product 'gear'" in capsys.readouterr().err


def test_a_line_of_one_product_loads_that_one(model: Path, tmp_path: Path):
    small = make_station(tmp_path / "line", model)
    add_version(small, "other", model, "tester")
    activate(small, "other", 1, "tester")
    made = Line(small, 1, only=PRODUCT)
    try:
        until(lambda: made.ready)
        assert made.inspect(PRODUCT, GOOD, Origin("tester", "rest")).result()["decision"] == "accept"
        with pytest.raises(NotReadyError):
            made.inspect("other", GOOD, Origin("tester", "rest"))
        made.activate("other", 1, "tester")  # whoever asks for it gets it
        assert made.inspect("other", GOOD, Origin("tester", "rest")).result()["product"] == "other"
    finally:
        made.close()
        small.close()


def test_a_file_keeps_its_identity_when_it_is_renamed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(GOOD)
    before = identity_of(path.stat())
    path = path.rename(tmp_path / "b.png")
    assert identity_of(path.stat()) == before
    path.write_bytes(GOOD)
    os.utime(path, ns=(0, 1))
    assert identity_of(path.stat()) != before
