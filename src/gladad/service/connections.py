"""What the web server does with connections before there is a request: TLS, and an end to senders of headers that never finish."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gladad.core.errors import ConfigError

TOO_SLOW = b"the headers of the request took too long\n"


class PromptHeaders(H11Protocol):
    """HTTP/1.1 by h11, as uvicorn has it, with a limit on the time until the headers of a request are complete.

    It runs from the connection, and from the first byte of every further request; in between, uvicorn's own limit for idle ones holds.
    """

    head_seconds: float
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._heard()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Something has come in, or an answer went out."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE:
            self._heard()
        elif self._patience is None and self.conn.trailing_data[0]:
            self._wait()

    def _wait(self) -> None:
        self._patience = self.loop.call_later(self.head_seconds, self._cut_off)

    def _heard(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _cut_off(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # who has sent nothing is told nothing
            headers = [("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(TOO_SLOW))), ("connection", "close")]
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(TOO_SLOW),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol(head_seconds: float) -> type[PromptHeaders]:
    """`PromptHeaders` with so many seconds."""
    return type("Prompt", (PromptHeaders,), {"head_seconds": head_seconds})


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Refuse certificates that the server could not serve by.

    Raises:
        ConfigError: A file is missing, is none, needs a password, or they do not belong together.
    """
    if certificate is None:
        if key is not None:
            raise ConfigError(f"--tls-key {key}: give the certificate too (--tls-certificate)")
        return
    for path in (certificate, key or certificate):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give a certificate and its key, as PEM")
    own = f"{certificate}" if key is None else f"{certificate} and {key}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{own}: no certificate with its key, as PEM and without a password ({error})") from error


def _no_password() -> str:
    raise ValueError("the key has a password")
