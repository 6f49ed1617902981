"""What stands before every request: its ID, limits on its body, a line of the log, and its numbers for Prometheus."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gladad.service.record import new_id, now
from gladad.service.settings import StationSettings

REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")
MULTIPART_SLACK = 64 * 1024  # for the headers of the parts
log = logging.getLogger("gladad.service")


class BodyRefused(Exception):
    """A body is too large or too slow."""

    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status, self.detail = status, detail


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """As text."""
        line = {"time": now(), "level": record.levelname.lower(), "message": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the log of the service and of its web server there, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("gladad.service", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "gladad.service" else logging.WARNING)


class Gate:
    """ASGI middleware, see the module's text."""

    def __init__(self, app: ASGIApp, settings: StationSettings, registry: CollectorRegistry):
        self.app, self.settings = app, settings
        self.requests = Counter("gladad_requests", "Requests", ("method", "route", "status"), registry=registry)
        self.seconds = Histogram("gladad_request_seconds", "Time to the end of the answer", ("route",), registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if REQUEST_ID.fullmatch(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            limit = self._limit(headers)
            if length.isdigit() and int(length) > limit:
                await refuse(answer, 413, f"the body has {int(length)} bytes, {limit} are accepted", request_id)
            else:
                await self.app(scope, self._limited(receive, limit), answer)
        finally:
            self._note(scope, status, time.perf_counter() - started, request_id)

    def _limit(self, headers: dict[bytes, bytes]) -> int:
        """Bytes of a body: one image, or as many as the space of several allows."""
        multipart = headers.get(b"content-type", b"").startswith(b"multipart/")
        return self.settings.max_bytes + (MULTIPART_SLACK if multipart else 0)

    def _limited(self, receive: Receive, limit: int) -> Receive:
        taken, deadline, whole = 0, time.monotonic() + self.settings.body_seconds, False

        async def limited() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise BodyRefused(408, f"the body took longer than {self.settings.body_seconds:g} s") from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > limit:
                raise BodyRefused(413, f"the body has more than the {limit} bytes that are accepted")
            return message

        return limited

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.requests.labels(scope["method"], route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "milliseconds": round(1000 * seconds, 1),
            "client": (scope.get("client") or ("",))[0],
        }
        log.info("request", extra={"fields": fields})


async def refuse(send: Send, status: int, detail: str, request_id: str) -> None:
    """Answer without having read the body; the connection ends."""
    body = json.dumps({"detail": detail, "request_id": request_id}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
