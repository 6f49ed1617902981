"""A station with a tiny product, a server of it, and a PostgreSQL server; made once for all tests."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import insert

from gladad.core.settings import to_json
from gladad.core.storage import write_json
from gladad.service.app import make_app
from gladad.service.decisions import Row
from gladad.service.products import activate, add_version
from gladad.service.record import new_id, now
from gladad.service.server import configured
from gladad.service.settings import StationSettings
from gladad.service.station import FILE, Station
from gladad.service.tables import jobs

PRODUCT = "widget"


def make_station(folder: Path, model: Path | None = None, **settings: Any) -> Station:
    """A station; with a model it has a product that inspects."""
    folder.mkdir(parents=True)
    write_json(folder / FILE, to_json(StationSettings(**settings)))
    station = Station(folder)
    if model is not None:
        add_version(station, PRODUCT, model, "tester")
        activate(station, PRODUCT, 1, "tester")
    return station


def a_row(**values: Any) -> Row:
    """A decision as the record keeps it."""
    return {
        "id": new_id(),
        "time": now(),
        "product": PRODUCT,
        "version": 1,
        "model_id": "m",
        "calibration_id": "c",
        "source": "rest",
        "request_id": "r",
        "image_name": "part.png",
        "image_sha256": "0" * 64,
        "image_type": "png",
        "width": 72,
        "height": 64,
        "score": 0.1 + 0.2,
        "warn_limit": None,
        "reject_limit": 1.0,
        "p_value": 0.5,
        "decision": "accept",
        "step": 400,
        "regions": [{"box": [0, 0, 2, 2], "area": 4, "peak": 1.5, "contour": [[0, 0]]}],
        "brightness": 0.5,
        "sharpness": 0.1,
        "promise_suspended": False,
        "milliseconds": 12.5,
    } | values


def add_job(station: Station, kind: str, product: str = PRODUCT, *, columns: dict[str, Any] | None = None, **request: Any) -> str:
    """A job as the record keeps it, such as one with settings too small for HTTP, or one that has ended; returns its id."""
    row = {"id": new_id(), "created": now(), "who": "tester", "state": "waiting", "kind": kind, "product": product} | (columns or {})
    with station.record.write() as connection:
        connection.execute(insert(jobs), [row | {"request": {"note": "", "activate": True} | request}])
    return str(row["id"])


@contextmanager
def served(station: Station, **options: Any) -> Iterator[str]:
    """A server of a station on a thread; gives its URL once all products are ready or stopped."""
    app = make_app(station, **options)
    config = configured(app, station, port=0)
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started or not app.state.line.ready:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(folder: Path, port: int, *options: str, authority: Path | None = None) -> subprocess.Popen[bytes]:
    """A server in a process of its own, once it is ready."""
    command = [sys.executable, "-m", "gladad", "serve", "--station", str(folder), "--port", str(port), "--threads", "2", *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url, verify = f"http://127.0.0.1:{port}/readyz", True
    if authority is not None:
        url, verify = url.replace("http", "https"), ssl.create_default_context(cafile=authority)
    for _ in range(600):
        try:
            if httpx.get(url, verify=verify).status_code == 200:
                return server
        except httpx.HTTPError:
            assert server.poll() is None
        time.sleep(0.1)
    raise AssertionError("the server did not get ready")


@pytest.fixture(scope="module")
def station(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """A station whose product inspects."""
    made = make_station(tmp_path_factory.mktemp("station") / "line", model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(station: Station) -> Iterator[str]:
    """A server of the station."""
    with served(station, threads=2) as address:
        yield address


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a fresh PostgreSQL server, with the name of a database to be filled in."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs and not shutil.which("initdb"):
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    binary = programs[-1].parent if programs else Path(str(shutil.which("initdb"))).parent
    folder = Path("/tmp") / f"gladad-pg-{os.getpid()}"  # its socket's path must be short
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    as_user: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.geteuid() == 0:  # it does not run as root
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
        as_user |= {"user": "postgres", "cwd": folder}
    data = folder / "data"
    subprocess.run([binary / "initdb", "-D", data, "-U", "tester", "--auth=trust", "--no-sync"], check=True, **as_user)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    subprocess.run([binary / "pg_ctl", "-D", data, "-o", options, "-w", "-l", folder / "log", "start"], check=True, **as_user)
    try:
        yield f"postgresql+psycopg://tester@/{{}}?host={folder}"
    finally:
        subprocess.run([binary / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=True, **as_user)
        shutil.rmtree(folder, ignore_errors=True)
