"""What may be chosen about a station: ``station.json`` in its folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gladad.core.settings import validated

Keep = Literal["all", "rejected", "none"]


@validated
class StationSettings:
    """Settings of a station; what is missing in the file keeps its default."""

    database: str = ""  # URL of SQLAlchemy, such as postgresql+psycopg://user@host/name; empty: SQLite in the folder
    queue: Annotated[int, Field(ge=1)] = 64  # images that may wait or be under way at a time; one more is refused
    deadline: Annotated[float, Field(gt=0)] = 30.0  # seconds that a request may take
    body_seconds: Annotated[float, Field(gt=0)] = 30.0  # seconds that sending a body may take
    max_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20  # of one body
    max_pixels: Annotated[int, Field(ge=64)] = 50_000_000  # of one image
    max_files: Annotated[int, Field(ge=1)] = 32  # images of one body
    loaded: Annotated[int, Field(ge=1)] = 4  # versions that are kept in memory
    keep: Keep = "all"  # pictures of which decisions are kept; "rejected" includes warnings
    keep_days: Annotated[float, Field(gt=0)] = 30.0  # pictures older than this are deleted; decisions never are
    keep_gib: Annotated[float, Field(gt=0)] = 20.0  # and the oldest ones, once they take more space than this
    parts_per_false_alarm: Annotated[int, Field(ge=100)] = 100_000  # of the drift test: good parts between two false alarms, on average
