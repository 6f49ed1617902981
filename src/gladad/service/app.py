"""The web application of a station."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import gladad
from gladad.core.errors import ConfigError, DataError, GladError, ModelFormatError, NotFiniteError
from gladad.service import routes_data, routes_decisions, routes_jobs, routes_products
from gladad.service.console import add_console
from gladad.service.gate import BodyRefused, Gate
from gladad.service.inspector import BusyError, DeadlineError, WorkerError
from gladad.service.intake import UnsupportedTypeError
from gladad.service.jobs import Jobs
from gladad.service.line import Line, NotReadyError
from gladad.service.products import StoppedError
from gladad.service.record import StorageError
from gladad.service.station import Station, UnknownError

# The first that fits; what is none of these is a mistake of the program.
STATUS: tuple[tuple[type[GladError], int], ...] = (
    (NotReadyError, 503),
    (BusyError, 429),
    (DeadlineError, 504),
    (WorkerError, 503),
    (StorageError, 507),
    (UnknownError, 404),
    (StoppedError, 409),
    (UnsupportedTypeError, 415),
    (DataError, 422),
    (ConfigError, 422),
    (ModelFormatError, 422),
    (NotFiniteError, 422),
)
RETRY_SECONDS = 1
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]", "testserver")


def status_of(error: GladError) -> int:
    """HTTP status of an error of the service."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 422)


def make_app(station: Station, *, loopback: bool = True, threads: int | None = None) -> FastAPI:
    """The application; its inspection starts and stops with it.

    Args:
        station: Opened; it is not closed.
        loopback: Only requests to this machine's own name are answered, so that no web page can reach it by another.
        threads: Images that are inspected at a time; None is one per core.
    """
    registry = CollectorRegistry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        line = await asyncio.to_thread(Line, station, threads)
        line.on_decision.append(lambda row: decided.labels(row["product"], row["decision"]).inc())
        depth.set_function(lambda: line.inspector.depth)
        restarts.set_function(lambda: line.inspector.restarts)
        pid.set_function(lambda: line.inspector.pid or 0)
        app.state.line = line
        try:
            app.state.jobs = await asyncio.to_thread(Jobs, line)
            try:
                yield
            finally:
                await asyncio.to_thread(app.state.jobs.close)
        finally:
            await asyncio.to_thread(line.close)

    decided = Counter("gladad_decisions", "Decisions that are in the record", ("product", "decision"), registry=registry)
    depth = Gauge("gladad_queue_depth", "Images that wait or are under way", registry=registry)
    restarts = Gauge("gladad_worker_restarts", "Times that the inspection process has died", registry=registry)
    pid = Gauge("gladad_worker_pid", "Process number of the inspection process", registry=registry)
    app = FastAPI(
        title="gladad",
        version=gladad.__version__,
        summary="Inspects parts, and keeps every decision.",
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.station = station
    app.include_router(routes_decisions.router)
    app.include_router(routes_products.router)
    app.include_router(routes_jobs.router)
    app.include_router(routes_data.router)
    add_console(app)
    _add_probes(app, registry)
    _add_errors(app)
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    app.add_middleware(Gate, settings=station.settings, registry=registry)
    return app


def _add_probes(app: FastAPI, registry: CollectorRegistry) -> None:
    @app.get("/livez", tags=["probes"], response_class=PlainTextResponse)
    async def live() -> str:
        """Whether the server answers."""
        return "ok"

    @app.get(
        "/readyz", tags=["probes"], response_class=PlainTextResponse, responses={503: {"description": "Not every product inspects yet"}}
    )
    async def ready(request: Request) -> Response:
        """Whether every product that is not stopped inspects."""
        good = await asyncio.to_thread(lambda: request.app.state.line.ready)
        return PlainTextResponse("ok" if good else "not ready", 200 if good else 503)

    @app.get("/metrics", tags=["probes"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Every refusal is one sentence, with the ID of its request."""

    def answer(request: Request, status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
        content = {"detail": detail, "request_id": request.state.request_id}
        return JSONResponse(content, status, headers)

    @app.exception_handler(GladError)
    async def refused(request: Request, error: GladError) -> Response:
        status = status_of(error)
        return answer(request, status, str(error), {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else None)

    @app.exception_handler(BodyRefused)
    async def cut(request: Request, error: BodyRefused) -> Response:
        return answer(request, error.status, error.detail, {"connection": "close"})

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(request, 422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
