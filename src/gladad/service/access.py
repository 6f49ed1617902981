"""Who asks: a key where the station has keys, anybody on this machine where it has none."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyHeader

from gladad.service.line import Line
from gladad.service.station import Station

LOCAL = "local"
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="Needed where the station has keys.")


def caller(request: Request, key: Annotated[str | None, Depends(_header)]) -> str:
    """Name of the key, or "local".

    Raises:
        HTTPException: 401, the key is missing or wrong.
    """
    station: Station = request.app.state.station
    if not station.keys():
        return LOCAL
    name = station.key_name(key or "")
    if name is None:
        raise HTTPException(401, "the API key is missing or wrong; send it as X-API-Key", {"www-authenticate": "APIKey"})
    return name


def line_of(request: Request) -> Line:
    """The running inspection."""
    line: Line = request.app.state.line
    return line


Who = Annotated[str, Depends(caller)]
Running = Annotated[Line, Depends(line_of)]
