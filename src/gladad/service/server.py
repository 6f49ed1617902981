"""Running the web server of a station."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from gladad.core.errors import ConfigError
from gladad.service.app import make_app
from gladad.service.connections import check_tls, protocol
from gladad.service.gate import log_to_stderr
from gladad.service.station import Station

GRACE_SECONDS = 30


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    station: Station,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve a station until SIGTERM or Ctrl-C; requests that are under way are finished.

    Args:
        station: Which.
        host: Address to listen at.
        port: Likewise.
        threads: Images inspected at a time; None is one for each core.
        certificate: For TLS: a PEM file with the server's certificate, then those of the authorities between. None: no TLS.
        key: PEM file of its key; None where the certificate's file holds it.

    Raises:
        ConfigError: Another host than this machine's own, and the station has no key; or a file of TLS is not what it should be.
    """
    loopback = is_loopback(host)
    if not loopback and not station.keys():
        raise ConfigError(f"host {host} can be reached by others: make a key first (gladad station key STATION NAME)")
    check_tls(certificate, key)
    log_to_stderr()
    app = make_app(station, loopback=loopback, threads=threads)
    tls = {} if certificate is None else {"ssl_certfile": str(certificate), "ssl_keyfile": None if key is None else str(key)}
    uvicorn.Server(configured(app, station, host=host, port=port, **tls)).run()


def configured(app: FastAPI, station: Station, **options: Any) -> uvicorn.Config:
    """What uvicorn is told: its own log and name are left out, and headers must come in in time."""
    return uvicorn.Config(
        app,
        http=protocol(station.settings.head_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
        **options,
    )
