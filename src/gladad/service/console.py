"""The console: the pages that an inspector looks at, built from ``console/``. They know the REST interface only."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parent / "console"
INDEX = "index.html"
KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
NOT_KEPT = {"cache-control": "no-cache"}
KEPT = {"cache-control": "public, max-age=31536000, immutable"}  # their names change with their contents


def add_console(app: FastAPI, folder: Path = FOLDER) -> None:
    """Serve the pages at ``/``, without a key: they hold no data, and ask for the key that their requests need."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return _answer(files, INDEX, NOT_KEPT)

    @app.get("/favicon.svg", include_in_schema=False)
    def icon() -> Response:
        return _answer(files, "favicon.svg", NOT_KEPT)

    @app.get("/assets/{name}", include_in_schema=False)
    def asset(name: str) -> Response:
        return _answer(files, f"assets/{name}", KEPT)


def _answer(files: dict[str, Path], name: str, headers: dict[str, str]) -> Response:
    path = files.get(name)  # of known names only
    if path is None or not path.is_file():
        raise HTTPException(404, "there is no such file")
    return FileResponse(path, media_type=KINDS.get(path.suffix, "application/octet-stream"), headers=HEADERS | headers)
