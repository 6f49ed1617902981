"""What goes wrong at night: a full disk. Nothing acknowledged is lost, and the service goes on by itself when there is room again."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter

import httpx
import pytest
from service_base import make_station, served
from sqlalchemy import select
from test_service import GOOD, INSPECT

from gladad.cli.main import main
from gladad.service import audit
from gladad.service.record import StorageError
from gladad.service.station import Station
from gladad.service.tables import decisions as table


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("this machine does not let a file system be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_got_over(model, small_disk):
    station = make_station(small_disk / "line", model)
    statuses, acknowledged, stop = Counter(), set(), threading.Event()

    def load(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30) as http:
            while not stop.is_set():
                answer = http.post(INSPECT, content=GOOD)
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    acknowledged.add(answer.json()["id"])
                elif answer.status_code == 507:
                    assert "make room" in answer.json()["detail"]

    def until(condition) -> None:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < 30, statuses
            time.sleep(0.02)

    with served(station, threads=2) as url:
        threads = [threading.Thread(target=load, args=(url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: statuses[200] > 5)
        with (small_disk / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"x" * 4096)
            except OSError:
                pass
        until(lambda: statuses[507] > 5)
        assert httpx.get(f"{url}/livez").status_code == 200
        before = len(acknowledged)
        (small_disk / "filler").unlink()
        until(lambda: len(acknowledged) > before + 5)
        stop.set()
        for thread in threads:
            thread.join()
    with station.record.read() as connection:
        kept = set(connection.execute(select(table.c.id)).scalars())
    assert set(statuses) == {200, 507}
    assert acknowledged == kept
    audit.verify(station.record)
    station.close()
    assert not list((small_disk / "line").rglob("*.partial"))


def test_a_read_only_disk_is_told(model, small_disk, capsys):
    make_station(small_disk / "line", model).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        with pytest.raises(StorageError, match="Read-only"):
            Station(small_disk / "line")
        assert main(["serve", "--station", str(small_disk / "line")]) == 1
        assert "cannot be written" in capsys.readouterr().err
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    Station(small_disk / "line").close()
