"""A client of the inspection service, for programs on the line: `Client`, and `AsyncClient` for asyncio.

Example:
    >>> with Client("http://127.0.0.1:8000") as client:
    ...     decision = client.inspect("gear", "part.png")
    ...     print(decision.decision, decision.score)

It needs httpx and pydantic, and neither torch nor the models.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import httpx
from pydantic import TypeAdapter

from gladad.core.errors import ConfigError, GladError
from gladad.service.schemas import Batch, BatchItem, DecisionOut, GoldenOut, HeadOut, JobOut, Page, ProductOut, VersionOut

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)
Image = str | Path | bytes
Picture = Literal["image", "map.png", "heatmap.png", "overlay.png", "reconstruction.png", "nearest-good.png"]
AGAIN = (429, 503)  # statuses of requests that are sent again
FINAL = ("done", "failed", "cancelled")


class ServiceError(GladError):
    """The service refused a request.

    Attributes:
        status: HTTP status; 0 where it could not be reached.
        request_id: In its log.
    """

    def __init__(self, message: str, status: int, request_id: str = ""):
        super().__init__(message)
        self.status, self.request_id = status, request_id


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request, and what reads its answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    options: Mapping[str, Any] = field(default_factory=dict)


def _json(kind: Any) -> Callable[[httpx.Response], Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    return lambda response: adapter.validate_json(response.content)


def _bytes(image: Image) -> tuple[str, bytes]:
    """Name and content of an image."""
    return ("", image) if isinstance(image, bytes) else (Path(image).name, Path(image).read_bytes())


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Calls:
    """The requests, for both clients."""

    def inspect(self, product: str, image: Image, name: str | None, deadline: float | None) -> _Call[DecisionOut]:
        own, content = _bytes(image)
        options = {"content": content, "params": _known(name=name if name is not None else own or None, deadline=deadline)}
        return _Call("POST", f"/v1/products/{product}/inspections", _json(DecisionOut), options)

    def inspect_many(self, product: str, images: Sequence[Image], deadline: float | None) -> _Call[list[BatchItem]]:
        files = [("images", (name or f"{number}", content)) for number, (name, content) in enumerate(map(_bytes, images))]
        read = _json(Batch)
        options = {"files": files, "params": _known(deadline=deadline)}
        return _Call("POST", f"/v1/products/{product}/inspections/batch", lambda response: list(read(response).items), options)

    def page(self, filters: Mapping[str, Any]) -> _Call[Page]:
        return _Call("GET", "/v1/decisions", _json(Page), {"params": _known(**filters)})

    def decision(self, identity: str) -> _Call[DecisionOut]:
        return _Call("GET", f"/v1/decisions/{identity}", _json(DecisionOut))

    def picture(self, identity: str, kind: Picture) -> _Call[bytes]:
        return _Call("GET", f"/v1/decisions/{identity}/{kind}", lambda response: response.content)

    def judge(self, identity: str, verdict: Literal["good", "bad"], note: str) -> _Call[DecisionOut]:
        return _Call("PUT", f"/v1/decisions/{identity}/verdict", _json(DecisionOut), {"json": {"verdict": verdict, "note": note}})

    def products(self) -> _Call[list[ProductOut]]:
        return _Call("GET", "/v1/products", _json(list[ProductOut]))

    def versions(self, product: str) -> _Call[list[VersionOut]]:
        return _Call("GET", f"/v1/products/{product}/versions", _json(list[VersionOut]))

    def activate(self, product: str, version: int, force: bool) -> _Call[VersionOut]:
        return _Call("PUT", f"/v1/products/{product}/active", _json(VersionOut), {"json": {"version": version, "force": force}})

    def golden(self, product: str, image: Image) -> _Call[GoldenOut]:
        name, content = _bytes(image)
        return _Call("POST", f"/v1/products/{product}/golden", _json(GoldenOut), {"content": content, "params": {"name": name}})

    def add_job(self, kind: str, product: str, images: str, options: Mapping[str, Any]) -> _Call[JobOut]:
        return _Call("POST", "/v1/jobs", _json(JobOut), {"json": {"kind": kind, "product": product, "images": images, **options}})

    def job(self, identity: str) -> _Call[JobOut]:
        return _Call("GET", f"/v1/jobs/{identity}", _json(JobOut))

    def cancel_job(self, identity: str) -> _Call[JobOut]:
        return _Call("DELETE", f"/v1/jobs/{identity}", _json(JobOut))

    def audit_head(self) -> _Call[HeadOut]:
        return _Call("GET", "/v1/audit/head", _json(HeadOut))


_calls = _Calls()


def _settings(url: str, key: str | None, timeout: float, authority: str | Path | None) -> dict[str, Any]:
    try:
        verify = True if authority is None else ssl.create_default_context(cafile=authority)
    except OSError as error:
        raise ConfigError(f"{authority}: no certificate as PEM ({error}); give the file that the service's is checked by") from error
    return {"base_url": url, "timeout": timeout, "headers": {"X-API-Key": key} if key else {}, "verify": verify}


def _pause(response: httpx.Response, until: float) -> float | None:
    """Seconds to wait before a request is sent again; None: it is not."""
    if response.status_code not in AGAIN or time.monotonic() >= until:
        return None
    given = response.headers.get("retry-after", "1")
    return min(float(given) if given.isdigit() else 1.0, max(0.0, until - time.monotonic()))


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        told = response.json()
        raise ServiceError(str(told["detail"]), response.status_code, str(told["request_id"]))
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"the service answered with status {response.status_code}", response.status_code) from None


class _Connection(Generic[H]):
    """What both clients are made of."""

    _open: Callable[..., H]
    _http: H

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        patience: float = 30.0,
        authority: str | Path | None = None,
    ):
        self._http = self._open(**_settings(url, key, timeout, authority))
        self._patience = patience


class Client(_Connection[httpx.Client]):
    """A connection to a service.

    Every method raises `ServiceError` where the service refuses or cannot be reached. Requests that it has no room for are sent again
    for ``patience`` seconds.

    Args:
        url: Such as ``http://127.0.0.1:8000``.
        key: API key, where the station has any.
        timeout: Seconds to wait for an answer.
        patience: Seconds in which refusals for lack of room are tried again.
        authority: PEM file by which the service's certificate is checked, such as the certificate itself; None: the usual authorities.

    Raises:
        ConfigError: The authority is no such file.
    """

    _open = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._http.close()

    def inspect(self, product: str, image: Image, *, name: str | None = None, deadline: float | None = None) -> DecisionOut:
        """Inspect an image: a path, or the bytes of a file. The decision is in the record."""
        return self._do(_calls.inspect(product, image, name, deadline))

    def inspect_many(self, product: str, images: Sequence[Image], *, deadline: float | None = None) -> list[BatchItem]:
        """Inspect several images with one request; each has a decision, or a problem."""
        return self._do(_calls.inspect_many(product, images, deadline))

    def decisions(self, **filters: Any) -> Iterator[DecisionOut]:
        """Decisions, the newest first; filters are product, decision, verdict, since, until."""
        while True:
            page = self._do(_calls.page(filters))
            yield from page.items
            if page.next is None:
                return
            filters["before"] = page.next

    def decision(self, identity: str) -> DecisionOut:
        """One decision."""
        return self._do(_calls.decision(identity))

    def picture(self, identity: str, kind: Picture = "overlay.png") -> bytes:
        """A picture of a decision, as the bytes of a file."""
        return self._do(_calls.picture(identity, kind))

    def judge(self, identity: str, verdict: Literal["good", "bad"], note: str = "") -> DecisionOut:
        """Say what the part of a decision really is."""
        return self._do(_calls.judge(identity, verdict, note))

    def products(self) -> list[ProductOut]:
        """All products."""
        return self._do(_calls.products())

    def versions(self, product: str) -> list[VersionOut]:
        """Of a product, the oldest first."""
        return self._do(_calls.versions(product))

    def activate(self, product: str, version: int, *, force: bool = False) -> VersionOut:
        """Have a version inspect."""
        return self._do(_calls.activate(product, version, force))

    def add_golden(self, product: str, image: Image) -> GoldenOut:
        """Make an image a golden part."""
        return self._do(_calls.golden(product, image))

    def add_job(self, kind: str, product: str, images: str, **options: Any) -> JobOut:
        """Queue a job: kind is fit, calibrate, evaluate or inspect, images a folder below the station's data."""
        return self._do(_calls.add_job(kind, product, images, options))

    def job(self, identity: str) -> JobOut:
        """One job."""
        return self._do(_calls.job(identity))

    def cancel_job(self, identity: str) -> JobOut:
        """Stop a job."""
        return self._do(_calls.cancel_job(identity))

    def wait(self, identity: str, *, every: float = 0.5, tell: Callable[[JobOut], None] = lambda job: None) -> JobOut:
        """Wait until a job is finished, one way or the other."""
        while (job := self.job(identity)).state not in FINAL:
            tell(job)
            time.sleep(every)
        return job

    def audit_head(self) -> HeadOut:
        """The last entry of the audit log."""
        return self._do(_calls.audit_head())

    def _do(self, call: _Call[T]) -> T:
        until = time.monotonic() + self._patience
        while True:
            try:
                response = self._http.request(call.method, call.path, **call.options)
            except httpx.HTTPError as error:
                raise ServiceError(f"{self._http.base_url}: cannot be reached ({error or type(error).__name__})", 0) from error
            pause = _pause(response, until)
            if pause is None:
                return call.read(_checked(response))
            time.sleep(pause)


class AsyncClient(_Connection[httpx.AsyncClient]):
    """`Client` for asyncio: the same methods, to be awaited."""

    _open = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection."""
        await self._http.aclose()

    async def inspect(self, product: str, image: Image, *, name: str | None = None, deadline: float | None = None) -> DecisionOut:
        """See `Client.inspect`."""
        return await self._do(_calls.inspect(product, image, name, deadline))

    async def inspect_many(self, product: str, images: Sequence[Image], *, deadline: float | None = None) -> list[BatchItem]:
        """See `Client.inspect_many`."""
        return await self._do(_calls.inspect_many(product, images, deadline))

    async def decisions(self, **filters: Any) -> AsyncIterator[DecisionOut]:
        """See `Client.decisions`."""
        while True:
            page = await self._do(_calls.page(filters))
            for item in page.items:
                yield item
            if page.next is None:
                return
            filters["before"] = page.next

    async def decision(self, identity: str) -> DecisionOut:
        """See `Client.decision`."""
        return await self._do(_calls.decision(identity))

    async def picture(self, identity: str, kind: Picture = "overlay.png") -> bytes:
        """See `Client.picture`."""
        return await self._do(_calls.picture(identity, kind))

    async def judge(self, identity: str, verdict: Literal["good", "bad"], note: str = "") -> DecisionOut:
        """See `Client.judge`."""
        return await self._do(_calls.judge(identity, verdict, note))

    async def products(self) -> list[ProductOut]:
        """See `Client.products`."""
        return await self._do(_calls.products())

    async def versions(self, product: str) -> list[VersionOut]:
        """See `Client.versions`."""
        return await self._do(_calls.versions(product))

    async def activate(self, product: str, version: int, *, force: bool = False) -> VersionOut:
        """See `Client.activate`."""
        return await self._do(_calls.activate(product, version, force))

    async def add_golden(self, product: str, image: Image) -> GoldenOut:
        """See `Client.add_golden`."""
        return await self._do(_calls.golden(product, image))

    async def add_job(self, kind: str, product: str, images: str, **options: Any) -> JobOut:
        """See `Client.add_job`."""
        return await self._do(_calls.add_job(kind, product, images, options))

    async def job(self, identity: str) -> JobOut:
        """See `Client.job`."""
        return await self._do(_calls.job(identity))

    async def cancel_job(self, identity: str) -> JobOut:
        """See `Client.cancel_job`."""
        return await self._do(_calls.cancel_job(identity))

    async def audit_head(self) -> HeadOut:
        """See `Client.audit_head`."""
        return await self._do(_calls.audit_head())

    async def _do(self, call: _Call[T]) -> T:
        until = time.monotonic() + self._patience
        while True:
            try:
                response = await self._http.request(call.method, call.path, **call.options)
            except httpx.HTTPError as error:
                raise ServiceError(f"{self._http.base_url}: cannot be reached ({error or type(error).__name__})", 0) from error
            pause = _pause(response, until)
            if pause is None:
                return call.read(_checked(response))
            await asyncio.sleep(pause)
