"""A product of real images, from the first picture to a changed limit, in the browser, with a server that is killed on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from console_base import opened, paint_rectangle
from service_base import free_port, make_station, start

from gladad.client import Client

PLATE = Path(__file__).parents[2] / "shared" / "data" / "metal_plate"
pytestmark = pytest.mark.skipif(not PLATE.is_dir(), reason="no images at ../shared/data/metal_plate beside the repository")


def pictures(place: str, count: int) -> list[Path]:
    return sorted((PLATE / place).iterdir())[:count]


def taught(page: Any) -> None:
    page.get_by_role("button", name="Teach a product").click()
    page.get_by_label("Name of the product").fill("plate")
    page.get_by_label("Pictures", exact=True).set_input_files(pictures("train/good", 28))
    page.get_by_text("28 pictures").first.wait_for()
    page.get_by_text("For experts").click()
    page.get_by_label("Side in pixels to work at").fill("128")
    page.get_by_label("Steps of the training").fill("20")
    page.get_by_role("button", name="Learn plate from 28 pictures").click()
    job = page.locator("[data-state=done], [data-state=failed]")
    job.wait_for(timeout=240_000)
    job.get_by_text("a new good part is rejected with a probability").wait_for()


def inspected(page: Any, good: Path, bad: Path) -> None:
    """A good part that is accepted, and a bad one that is not, both judged by keys."""
    page.get_by_role("button", name="Inspect parts").click()
    queue = page.get_by_role("list", name="Parts, the newest first")
    for path, decision, key, word in ((good, "Accept", "g", "good"), (bad, "Reject", "b", "bad")):
        page.get_by_label("Pictures", exact=True).set_input_files([path])
        part = queue.get_by_role("button", name=path.name)
        part.click()
        page.get_by_role("img", name=f"Part {path.name}").wait_for()
        assert page.get_by_role("status", name="Decision").inner_text().strip() == decision
        page.keyboard.press(key)
        part.get_by_text(f"judged {word}").wait_for()


def limited(page: Any) -> None:
    """A stricter limit, by keys; the numbers follow."""
    page.get_by_role("link", name="Tune").click()
    held = page.locator("[data-figure=held] .big")
    held.wait_for()
    before = held.inner_text()
    for _ in range(6):
        page.get_by_role("slider", name="Reject limit").press("PageDown")
    assert held.inner_text() != before
    page.get_by_label("Note", exact=True).fill("stricter")
    page.get_by_role("button", name="Save as a new version").click()
    page.get_by_text("Version 2 was made and inspects now").wait_for()


def masked(page: Any) -> None:
    """A corner that does not count, on the picture of the part that was rejected last."""
    paint_rectangle(page, 1 / 4)
    page.get_by_label("Folder of good parts").select_option("plate/good")
    page.get_by_role("button", name="Make a version without these").click()
    page.locator("[data-state=done]").wait_for(timeout=120_000)
    page.get_by_text("Version 3 was made, and inspects now").wait_for()
    page.get_by_role("button", name="Inspect this part again").click()
    page.get_by_text("Hatched places do not count.").wait_for()


def test_taught_inspected_tuned_and_found_again(browser: Any, tmp_path: Path) -> None:
    make_station(tmp_path / "line").close()
    port, good, bad = free_port(), pictures("test/good", 1)[-1], pictures("test/defect", 17)[-1]  # a long scratch
    url = f"http://127.0.0.1:{port}"
    server = start(tmp_path / "line", port)
    try:
        with opened(browser, url) as page:
            taught(page)
            inspected(page, good, bad)
            limited(page)
            masked(page)
        server.kill()
        server.wait()
        server = start(tmp_path / "line", port)
        with opened(browser, url, "history") as page:
            page.get_by_role("combobox", name="Verdict").select_option("bad")
            found = page.get_by_role("list", name="Decisions, the newest first").get_by_role("link").filter(has_text=bad.name)
            found.first.click()
            page.get_by_text("End of the audit log").wait_for()
            page.get_by_role("link", name="Models").click()
            page.get_by_role("rowheader", name=re.compile("^3 active")).wait_for()
            page.get_by_role("cell", name="stricter").wait_for()
        with Client(url) as client:
            assert client.inspect("plate", good).version == 3
    finally:
        server.kill()
        server.wait()
