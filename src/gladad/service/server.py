"""Running the web server of a station."""

from __future__ import annotations

import ipaddress

import uvicorn

from gladad.core.errors import ConfigError
from gladad.service.app import make_app
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


def serve(station: Station, host: str = "127.0.0.1", port: int = 8000, threads: int | None = None) -> None:
    """Serve a station until SIGTERM or Ctrl-C; requests that are under way are finished.

    Raises:
        ConfigError: Another host than this machine's own, and the station has no key.
    """
    loopback = is_loopback(host)
    if not loopback and not station.keys():
        raise ConfigError(f"host {host} can be reached by others: make a key first (gladad station key STATION NAME)")
    log_to_stderr()
    app = make_app(station, loopback=loopback, threads=threads)
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_SECONDS, server_header=False
    )
    uvicorn.Server(config).run()
