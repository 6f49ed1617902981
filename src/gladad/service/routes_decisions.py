"""Inspecting images, and the decisions that were made."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import Future
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request, Response
from PIL import Image
from starlette.datastructures import UploadFile

from gladad.core.errors import DataError, GladError
from gladad.core.images import as_pixels, resize_map
from gladad.core.records import Region
from gladad.report.pictures import VMAX, heatmap, overlay, thumbnail, to_png
from gladad.service import audit, decisions
from gladad.service.access import Running, Who
from gladad.service.decisions import Row
from gladad.service.inspector import BusyError, DeadlineError
from gladad.service.intake import check_filename
from gladad.service.line import Line, Origin
from gladad.service.schemas import Batch, BatchItem, DecisionOut, EntryOut, Page, VerdictIn, problems, shown
from gladad.service.station import UnknownError

T = TypeVar("T")
router = APIRouter(prefix="/v1", tags=["inspection"])
SMALL = 160  # pixels of a small picture
PNG: dict[str, Any] = {"responses": {200: {"content": {"image/png": {}}}, **problems(401, 404, 422)}, "response_class": Response}
ANY_IMAGE: dict[str, Any] = {"responses": {200: {"content": {"image/*": {}}}, **problems(401, 404)}, "response_class": Response}
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("application/octet-stream", "image/png", "image/jpeg")
        },
    }
}
FILES_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}
INSPECTING = problems(400, 401, 404, 408, 409, 413, 415, 422, 429, 503, 504, 507)
Deadline = Annotated[float | None, Query(gt=0, le=600, description="Seconds in which it must be done; the station's if it is left out.")]
Time = Annotated[str | None, Query(pattern=r"^\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?$", description="ISO 8601, in UTC")]


@router.post("/products/{product}/inspections", responses=INSPECTING, openapi_extra=IMAGE_BODY)
async def inspect(
    request: Request,
    product: str,
    who: Who,
    line: Running,
    name: Annotated[str, Query(max_length=255, description="Name of the image, for the record.")] = "",
    deadline: Deadline = None,
) -> DecisionOut:
    """Inspect one image, sent as the body. The answer follows once the decision is in the record."""
    await refuse_early(request, line)
    content = await request.body()
    origin = Origin(who, "rest", check_filename(name), request.state.request_id)
    kind = request.headers.get("content-type", "")
    future = await asyncio.to_thread(line.inspect, product, content, origin, kind, deadline)
    return shown(await unless_gone(request, future, deadline or line.station.settings.deadline))


@router.post("/products/{product}/inspections/batch", responses=INSPECTING, openapi_extra=FILES_BODY)
async def inspect_several(request: Request, product: str, who: Who, line: Running, deadline: Deadline = None) -> Batch:
    """Inspect several images, sent as files of a form. Each is decided, or refused, by itself."""
    await asyncio.to_thread(line.active, product)
    settings = line.station.settings
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "send the images as multipart/form-data, each as a file called 'images'")
    await refuse_early(request, line)
    async with request.form(max_files=settings.max_files, max_fields=0, max_part_size=settings.max_bytes) as form:
        files = form.getlist("images")
        if not files or len(files) != len(form.multi_items()) or not all(isinstance(file, UploadFile) for file in files):
            raise DataError("send the images as files called 'images', and nothing else")
        parts = [(file.filename or "", await file.read(), file.content_type or "") for file in files if isinstance(file, UploadFile)]
    items = await asyncio.gather(*(_item(request, line, product, who, part, deadline) for part in parts))
    return Batch(items=list(items))


async def _item(request: Request, line: Line, product: str, who: str, part: tuple[str, bytes, str], deadline: float | None) -> BatchItem:
    from gladad.service.app import status_of

    name, content, kind = part
    try:
        origin = Origin(who, "rest", check_filename(name), request.state.request_id)
        future = await asyncio.to_thread(line.inspect, product, content, origin, kind, deadline)
        row = await _in_time(asyncio.wrap_future(future), deadline or line.station.settings.deadline)
    except GladError as error:
        return BatchItem(image_name=name, status=status_of(error), problem=str(error))
    return BatchItem(image_name=name, status=200, decision=shown(row))


@router.get("/decisions", responses=problems(401, 422))
def find(
    who: Who,
    line: Running,
    product: Annotated[str | None, Query(max_length=64)] = None,
    decision: Literal["accept", "warn", "reject"] | None = None,
    verdict: Literal["good", "bad", "none"] | None = None,
    since: Time = None,
    until: Time = None,
    before: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$", description="ID of the last decision of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page:
    """Decisions, the newest first."""
    with line.station.record.read() as connection:
        rows = decisions.search(
            connection, product=product, decision=decision, verdict=verdict, since=since, until=until, before=before, limit=limit
        )
    return Page(items=[shown(row) for row in rows], next=rows[-1]["id"] if len(rows) == limit else None)


@router.get("/decisions/{identity}", responses=problems(401, 404))
def decision(identity: str, who: Who, line: Running) -> DecisionOut:
    """One decision."""
    return shown(_row(line, identity))


@router.put("/decisions/{identity}/verdict", responses=problems(400, 401, 404, 422, 507))
def judge(identity: str, body: VerdictIn, who: Who, line: Running) -> DecisionOut:
    """Say what the part really is. A later verdict supersedes an earlier one, which stays in the record."""
    decisions.add_verdict(line.station.record, identity, body.verdict, who, body.note)
    return shown(_row(line, identity))


@router.get("/decisions/{identity}/entries", responses=problems(401, 404))
def entries(identity: str, who: Who, line: Running) -> list[EntryOut]:
    """What the audit log says of a decision: who asked for it, and every verdict on it."""
    with line.station.record.read() as connection:
        decisions.one(connection, identity)
        return [EntryOut.model_validate(entry) for entry in audit.about(connection, identity)]


@router.get("/decisions/{identity}/image", **ANY_IMAGE)
def image(identity: str, who: Who, line: Running) -> Response:
    """The image as it was sent."""
    row = _row(line, identity)
    kind = {"jpg": "jpeg", "tif": "tiff"}.get(row["image_type"], row["image_type"])
    return Response(line.image(row), media_type=f"image/{kind}", headers={"x-content-type-options": "nosniff"})


@router.get("/decisions/{identity}/small.png", **PNG)
def small_picture(identity: str, who: Who, line: Running, side: Annotated[int, Query(ge=32, le=4096)] = SMALL) -> Response:
    """The image, shrunk until its longer side has at most so many pixels."""
    return _png_response(to_png(thumbnail(as_pixels(line.image(_row(line, identity))), side)))


@router.get("/decisions/{identity}/map.png", **PNG)
def map_picture(identity: str, who: Who, line: Running) -> Response:
    """The anomaly map, grey: 255 is twice the threshold or more. The longer side has at most 512 pixels."""
    return _png_response(_map_bytes(line, _row(line, identity)))


@router.get("/decisions/{identity}/heatmap.png", **PNG)
def heatmap_picture(identity: str, who: Who, line: Running) -> Response:
    """The anomaly map in colours."""
    return _png_response(to_png(heatmap(_map(line, _row(line, identity)))))


@router.get("/decisions/{identity}/overlay.png", **PNG)
def overlay_picture(identity: str, who: Who, line: Running) -> Response:
    """The image with the map laid over it, and boxes around the regions."""
    row = _row(line, identity)
    pixels = as_pixels(line.image(row))
    values = resize_map(_map(line, row), (pixels.shape[0], pixels.shape[1]))
    regions = [Region(box=tuple(each["box"]), area=each["area"], peak=each["peak"]) for each in row["regions"]]
    return _png_response(to_png(overlay(pixels, values, values > 1, regions)))


@router.get("/decisions/{identity}/reconstruction.png", **PNG | {"responses": PNG["responses"] | problems(429, 503, 504)})
async def reconstruction(request: Request, identity: str, who: Who, line: Running) -> Response:
    """The part as the model thinks it should be, made anew from the image."""
    row = await asyncio.to_thread(_row, line, identity)
    future = await asyncio.to_thread(line.reconstruction, row)
    content = await unless_gone(request, future, line.station.settings.deadline)
    if content is None:
        raise UnknownError("this model makes no reconstructions")
    return _png_response(content)


@router.get("/decisions/{identity}/nearest-good.png", **PNG | {"responses": PNG["responses"] | problems(429, 503, 504)})
async def nearest_good(
    request: Request,
    identity: str,
    who: Who,
    line: Running,
    place: Annotated[int | None, Query(ge=1, description="number of a region: alike around it, not everywhere")] = None,
) -> Response:
    """Of the good parts that the version has learnt from and keeps, the one that looks most alike, as it would lie in this picture."""
    row = await asyncio.to_thread(_row, line, identity)
    content = await unless_gone(request, await asyncio.to_thread(line.nearest_good, row, place), line.station.settings.deadline)
    if content is None:
        raise UnknownError("this version keeps no pictures of good parts")
    return _png_response(content)


async def refuse_early(request: Request, line: Line) -> None:
    """Where there is no room, pass over the body instead of holding it; not to read it would break the connection of who sends it.

    Raises:
        BusyError: There is no room.
    """
    try:
        line.inspector.check_room()
    except BusyError:
        async for _ in request.stream():
            pass
        raise


async def unless_gone(request: Request, future: Future[T], seconds: float) -> T:
    """Wait for a result; cancelled when the client goes away or the time is up.

    Raises:
        DeadlineError: The time is up.
    """
    waiting = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        both: set[asyncio.Future[Any]] = {waiting, gone}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done() and gone.done():
            raise HTTPException(499, "the client has gone away")
        return await _in_time(waiting, 0)
    finally:
        waiting.cancel()
        gone.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _in_time(waiting: asyncio.Future[T], seconds: float) -> T:
    done, _ = await asyncio.wait({waiting}, timeout=seconds)
    if not done:
        waiting.cancel()
        raise DeadlineError("not done within its deadline; send it again later")
    return waiting.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _row(line: Line, identity: str) -> Row:
    with line.station.record.read() as connection:
        return decisions.one(connection, identity)


def _map_bytes(line: Line, row: Row) -> bytes:
    try:
        return line.station.pictures.map_path(row["id"]).read_bytes()
    except FileNotFoundError:
        raise UnknownError(f"the map of decision {row['id']} is not kept any more") from None


def _map(line: Line, row: Row) -> np.ndarray[Any, np.dtype[np.float32]]:
    levels = np.asarray(Image.open(io.BytesIO(_map_bytes(line, row))))
    return (levels * np.float32(VMAX / 255)).astype(np.float32)


def _png_response(content: bytes) -> Response:
    return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=3600"})
