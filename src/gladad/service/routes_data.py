"""Folders of images to learn and to measure from."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from gladad.core.images import as_pixels
from gladad.report.pictures import thumbnail, to_png
from gladad.service import data_folders
from gladad.service.access import Running, Who
from gladad.service.intake import check_image
from gladad.service.routes_decisions import IMAGE_BODY, refuse_early
from gladad.service.schemas import FOLDER, DataFolder, FolderCheck, problems

router = APIRouter(prefix="/v1/data", tags=["data"])
Folder = Annotated[str, Query(pattern=FOLDER, description="below the station's data/")]
SIDE = 320  # pixels of a small picture


@router.get("", responses=problems(401))
def folders(who: Who, line: Running) -> list[DataFolder]:
    """The folders that hold images."""
    return [DataFolder.model_validate(each) for each in data_folders.listing(line.station)]


@router.put(
    "", status_code=204, responses=problems(400, 401, 408, 413, 415, 422, 429, 507), openapi_extra=IMAGE_BODY, response_class=Response
)
async def add(request: Request, folder: Folder, name: Annotated[str, Query(max_length=64)], who: Who, line: Running) -> Response:
    """Put an image, sent as the body, into a folder, which is made if it is not there."""
    await refuse_early(request, line)
    content = await request.body()
    check_image(content, request.headers.get("content-type", ""), line.station.settings.max_pixels)
    await asyncio.to_thread(data_folders.add, line.station, folder, name, content)
    return Response(status_code=204)


@router.delete("", status_code=204, responses=problems(401, 404, 422, 507), response_class=Response)
def remove(folder: Folder, name: Annotated[str, Query(max_length=64)], who: Who, line: Running) -> Response:
    """Delete an image of a folder. What an operator has linked into the station stays."""
    data_folders.remove(line.station, folder, name)
    return Response(status_code=204)


@router.get("/names", responses=problems(401, 404, 422))
def names(folder: Folder, who: Who, line: Running) -> list[str]:
    """The images of a folder, and below it, in order."""
    return data_folders.names(line.station, folder)


@router.get("/check", responses=problems(401, 404, 422))
def check(folder: Folder, who: Who, line: Running) -> FolderCheck:
    """What is in a folder, and what is wrong with it."""
    return FolderCheck.model_validate(data_folders.check(line.station, folder))


@router.get("/image", responses={200: {"content": {"image/png": {}}}, **problems(401, 404, 422)}, response_class=Response)
def small_picture(folder: Folder, name: Annotated[str, Query(max_length=4096)], who: Who, line: Running) -> Response:
    """An image of a folder by its name among them, small."""
    pixels = thumbnail(as_pixels(data_folders.image(line.station, folder, name)), SIDE)
    return Response(to_png(pixels), media_type="image/png")
