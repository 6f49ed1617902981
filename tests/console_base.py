"""A browser for tests of the console."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WAIT = 30_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@contextmanager
def opened(browser: Any, url: str, place: str = "inspect", refused: tuple[str, ...] = (), **options: Any) -> Iterator[Any]:
    """A page in a context of its own, which must ask nobody else, and complain of nothing (but of refusals where they are expected)."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    said: list[tuple[str, str]] = []  # and where
    elsewhere: list[str] = []
    page.on(
        "console",
        lambda message: said.append((message.text, message.location["url"])) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: said.append((str(error), "")))
    page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith((url, "blob:", "data:")) else None)
    page.goto(f"{url}/#/{place}")
    try:
        yield page
        assert not elsewhere
        assert not [(text, place) for text, place in said if not any(status in text for status in refused)]
    finally:
        context.close()


def settled(place: Any) -> dict[str, float]:
    """Where an element is, in pixels of the window, once what loads above it has moved it for the last time."""
    box: dict[str, float] = place.bounding_box()
    since = time.monotonic()
    while time.monotonic() < since + 0.5:
        time.sleep(0.05)
        if (now := place.bounding_box()) != box:
            box, since = now, time.monotonic()
    return box


def paint_rectangle(page: Any, share: float) -> None:
    """Drag the tool for rectangles from the picture's upper left corner over that share of both sides."""
    page.get_by_role("button", name="Rectangle").click()
    page.locator(".room").scroll_into_view_if_needed()
    box = settled(page.locator(".stage"))
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], box["y"] + share * box["height"], steps=4)
    page.mouse.up()
