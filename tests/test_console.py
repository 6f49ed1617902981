"""The console in a browser: what an inspector does on each page, with the keyboard too; and what is served."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import SIDE, draw_part
from console_base import WAIT, opened, paint_rectangle, settled
from fastapi.testclient import TestClient
from PIL import Image
from service_base import PRODUCT, add_job, make_station, served

from gladad.detector.files import ALIGNMENT_FILE
from gladad.service import good_parts
from gladad.service.console import FOLDER
from gladad.service.products import activate, add_version, folder_of
from gladad.service.record import new_id

SOURCES = Path(__file__).parent.parent / "console"
PAGES = ("inspect", "teach", "tune", "history", "models")
MOST_BYTES = 300_000


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def file(name: str, seed: int, defective: bool = False) -> dict[str, object]:
    return {"name": name, "mimeType": "image/png", "buffer": png(draw_part(seed, defective)[0])}


@pytest.fixture(scope="module")
def station(model, category, tmp_path_factory):
    made = make_station(tmp_path_factory.mktemp("console") / "line", model)
    good = made.folder / "data" / PRODUCT / "good"
    good.mkdir(parents=True)
    for path in (category / "train/good").iterdir():
        shutil.copyfile(path, good / path.name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(station):
    with served(station, threads=1) as address:
        yield address


def inspect(url: str, name: str, seed: int, defective: bool = False, product: str = PRODUCT) -> dict:
    path, content = f"{url}/v1/products/{product}/inspections", png(draw_part(seed, defective)[0])
    while (answer := httpx.post(path, params={"name": name}, content=content, timeout=60)).status_code == 503:
        time.sleep(0.1)  # it is being loaded
    return answer.json()


# -- what is served --------------------------------------------------------------------------------------------------


def test_pages_are_served_with_strict_headers_and_are_no_part_of_the_interface(station):
    from gladad.service.app import make_app

    app = make_app(station)
    client = TestClient(app)  # without its lifespan: the pages need no inspection
    index = client.get("/")
    assert index.status_code == 200 and "text/html" in index.headers["content-type"]
    assert index.headers["cache-control"] == "no-cache"
    assets = re.findall(r'"\./(assets/[^"]+)"', index.text)
    assert len(assets) == 2
    for answer in (index, *(client.get(f"/{name}") for name in assets)):
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert "immutable" in client.get(f"/{assets[0]}").headers["cache-control"]
    assert client.get("/favicon.svg").headers["content-type"].startswith("image/svg")
    for name in ("nothing.js", "..%2f..%2fconsole.py", "%2e%2e"):
        assert client.get(f"/assets/{name}").status_code == 404
    assert not {"/", "/assets/{name}", "/favicon.svg"} & app.openapi()["paths"].keys()


def test_everything_is_small_and_asks_nobody_else():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(len(gzip.compress(path.read_bytes())) for path in files) <= MOST_BYTES
    for path in files:
        addresses = set(re.findall(r"https?://[^\s\"'`)<>]+", path.read_text(encoding="utf-8")))
        assert all(address.startswith(("http://www.w3.org/", "https://svelte.dev/e/")) for address in addresses), (path, addresses)


def test_the_colours_are_those_of_reports(browser, url):
    """The scale of maps, and the palette of both themes: the console and the pages of reports have them from the same files."""
    identity = inspect(url, "coloured.png", 1005)["id"]
    heat = np.asarray(Image.open(io.BytesIO(httpx.get(f"{url}/v1/decisions/{identity}/heatmap.png").content)))
    with opened(browser, url, f"decision/{identity}") as page:
        page.locator("canvas.layer").wait_for()
        page.get_by_role("button", name="Heat map").click()
        page.get_by_role("button", name="Heat map", pressed=True).wait_for()
        read = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
        shown = np.array(page.locator("canvas.layer").evaluate(read)).reshape(*heat.shape[:2], 4)
        assert (shown[..., :3] == heat).all() and len(np.unique(heat.reshape(-1, 3), axis=0)) >= 10
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            colours = page.evaluate("['--accept', '--reject'].map(name => { const e = document.createElement('i'); "
                "e.style.color = `var(${name})`; document.body.append(e); return getComputedStyle(e).color; })")  # fmt: skip
            number = ("light", "dark").index(theme)
            palette = (FOLDER.parent.parent / "report/palette.css").read_text(encoding="utf-8")
            wanted = [re.search(rf"{name}: light-dark\(([^,]+), ([^)]+)\)", palette)[number + 1] for name in ("--accept", "--reject")]
            assert colours == [f"rgb({', '.join(str(int(each[at : at + 2], 16)) for at in (1, 3, 5))})" for each in wanted]


def test_the_committed_build_is_that_of_the_sources(tmp_path):
    if not (SOURCES / "node_modules").is_dir() or shutil.which("npx") is None:
        pytest.skip("console/node_modules is missing (npm ci in console/)")
    for mode, folder in (("production", FOLDER), ("report", FOLDER.parent.parent / "report/script")):
        build = ["npx", "vite", "build", "--mode", mode, "--outDir", str(tmp_path / mode), "--logLevel", "error"]
        subprocess.run(build, cwd=SOURCES, check=True, timeout=120)
        fresh, kept = (
            {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            for root in (tmp_path / mode, folder)
        )
        assert fresh == kept, "run: make console"


def test_pictures_of_a_folder_are_named_and_removed_but_not_those_behind_links(url, station, tmp_path):
    folder, parameters = station.folder / "data/named", {"folder": "named"}
    folder.mkdir()
    kept = tmp_path / "kept.png"
    kept.write_bytes(png(draw_part(1)[0]))
    (folder / "own.png").write_bytes(png(draw_part(2)[0]))
    (folder / "link.png").symlink_to(kept)
    (folder / "notes.txt").write_text("no picture")
    (station.folder / "data/linked").symlink_to(tmp_path)
    with httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/v1/data/names", params=parameters).json() == ["link.png", "own.png"]
        for place, name, status in [
            ("named", "link.png", 422),
            ("linked", "kept.png", 422),
            ("named", "notes.txt", 422),
            ("named", "other.png", 404),
            ("named", "../own.png", 422),
            ("named", "own.png", 204),
        ]:
            assert client.delete("/v1/data", params={"folder": place, "name": name}).status_code == status, name
        assert client.get("/v1/data/names", params=parameters).json() == ["link.png"]
    assert kept.is_file()
    (station.folder / "data/linked").unlink()


# -- what an inspector does --------------------------------------------------------------------------------------------


def test_inspect_judge_by_keyboard_and_find_it_again(browser, url):
    with opened(browser, url) as page:
        page.get_by_label("Pictures", exact=True).set_input_files([file("bad-1.png", 2001, True), file("good-1.png", 1001)])
        page.get_by_text("bad-1.png").first.wait_for()
        page.get_by_text("good-1.png").first.wait_for()
        queue = page.get_by_role("list", name="Parts, the newest first")
        queue.get_by_role("button", name="bad-1.png").click()
        decision = page.get_by_role("status", name="Decision")
        assert decision.inner_text().strip() == "Reject"
        assert "of 100 good parts" in page.locator("section.side").inner_text().lower()
        before = float(page.locator(".room").get_attribute("data-scale"))
        page.keyboard.press("-")
        smaller = float(page.locator(".room").get_attribute("data-scale"))
        page.get_by_role("button", name="Place 1").click()
        assert float(page.locator(".room").get_attribute("data-scale")) > smaller
        page.keyboard.press("0")
        assert float(page.locator(".room").get_attribute("data-scale")) == pytest.approx(before)
        for key in ("+", "3", "1", "2", "-"):
            page.keyboard.press(key)
        page.locator("img.layer").wait_for(state="detached")
        page.keyboard.press("h")
        page.get_by_role("dialog", name="Keys").wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("b")
        queue.get_by_role("button", name="bad-1.png").get_by_text("judged bad").wait_for()
        page.keyboard.press(" ")
        page.get_by_role("button", name="Go on").wait_for()
        page.get_by_role("link", name="History").click()
        page.get_by_role("combobox", name="Verdict").select_option("bad")
        found = page.get_by_role("list", name="Decisions, the newest first").get_by_role("link")
        page.get_by_text("good-1.png").wait_for(state="detached")
        found = found.filter(has_text="bad-1.png")
        found.wait_for()
        page.get_by_label("Name for this filter").fill("bad ones")
        page.get_by_role("button", name="Save filter").click()
        page.reload()
        page.get_by_role("button", name="bad ones", exact=True).click()
        found.click()
        page.get_by_text("End of the audit log").wait_for()
        text = page.locator("main").inner_text()
        assert all(each in text for each in ("judged “bad” by local", "SHA-256", "version 1", "request"))
    judged = [
        each for each in httpx.get(f"{url}/v1/decisions", params={"verdict": "bad"}).json()["items"] if each["image_name"] == "bad-1.png"
    ]
    entries = httpx.get(f"{url}/v1/decisions/{judged[0]['id']}/entries").json()
    assert [each["kind"] for each in entries] == ["decision", "verdict"]


def test_a_folder_is_picked_and_pictures_are_dropped(browser, url, tmp_path):
    for name in ("a/folder-1.png", "a/b/folder-2.png", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(draw_part(len(name))[0]) if path.suffix == ".png" else b"no picture")
    with opened(browser, url, refused=("415",)) as page:
        page.get_by_label("Folder of pictures").set_input_files(tmp_path / "a")
        queue = page.get_by_role("list", name="Parts, the newest first")
        queue.get_by_text("folder-1.png").wait_for()
        queue.get_by_text("folder-2.png").wait_for()
        content = list(png(draw_part(77)[0]))
        make = """bytes => { const made = new DataTransfer();
            made.items.add(new File([new Uint8Array(bytes)], 'dropped.png', {type: 'image/png'}));
            made.items.add(new File(['not a picture'], 'broken.png', {type: 'image/png'})); return made; }"""
        page.locator(".drop").dispatch_event("drop", {"dataTransfer": page.evaluate_handle(make, content)})
        queue.get_by_text("dropped.png").wait_for()
        queue.get_by_text("not an image").wait_for()
        page.get_by_text("notes.txt").wait_for(state="detached")


def test_a_folder_is_dropped(browser, url, tmp_path):
    for name in ("dropped/one.png", "dropped/below/two.png", "dropped/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(draw_part(len(name))[0]) if path.suffix == ".png" else b"no picture")
    with opened(browser, url) as page:
        box = settled(page.locator(".drop"))
        session = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(tmp_path / "dropped")], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            place = {"x": box["x"] + 20, "y": box["y"] + 20}
            session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})
        queue = page.get_by_role("list", name="Parts, the newest first")
        queue.get_by_text("one.png").wait_for()
        queue.get_by_text("two.png").wait_for()


def test_two_fingers_zoom_about_the_place_between_them_and_move(browser, url):
    inspect(url, "pinched.png", 2008, True)
    with opened(browser, url, has_touch=True) as page:
        page.locator(".room img").wait_for()
        before, room = settled(page.locator(".stage")), page.locator(".room").bounding_box()
        x, y = room["x"] + 0.4 * room["width"], room["y"] + 0.5 * room["height"]
        session = page.context.new_cdp_session(page)
        for apart in (40, 50, 60, 70, 80):
            points = [{"x": x - apart, "y": y, "id": 1}, {"x": x + apart, "y": y, "id": 2}]
            session.send("Input.dispatchTouchEvent", {"type": "touchStart" if apart == 40 else "touchMove", "touchPoints": points})
        zoomed = settled(page.locator(".stage"))
        assert zoomed["width"] == pytest.approx(2 * before["width"], rel=0.02)
        assert (x - zoomed["x"]) / zoomed["width"] == pytest.approx((x - before["x"]) / before["width"], abs=0.01)
        points = [{"x": x - 50, "y": y + 15, "id": 1}, {"x": x + 110, "y": y + 15, "id": 2}]
        session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": points})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        moved = settled(page.locator(".stage"))
        assert moved["width"] == pytest.approx(zoomed["width"], rel=0.02)
        assert moved["x"] - zoomed["x"] == pytest.approx(30, abs=3) and moved["y"] - zoomed["y"] == pytest.approx(15, abs=3)
        boxes = [page.locator(f".stage > {kind}").first.bounding_box() for kind in ("img", "canvas", "svg")]
        assert boxes[0] == boxes[1] == boxes[2]


def test_the_picture_and_its_layer_stay_aligned(browser, url):
    inspect(url, "zoomed.png", 2002, True)
    with opened(browser, url) as page:
        page.locator(".room img").wait_for()
        settled(page.locator(".stage"))
        page.locator(".room").hover()
        page.mouse.wheel(0, -400)
        page.mouse.down()
        page.mouse.move(700, 300, steps=4)
        page.mouse.up()
        boxes = [page.locator(f".stage > {kind}").first.bounding_box() for kind in ("img", "canvas", "svg")]
        assert boxes[0] == boxes[1] == boxes[2]


def test_a_limit_is_moved_and_saved(browser, url):
    for seed in range(3):
        inspect(url, f"part-{seed}.png", 3000 + seed)
    active = httpx.get(f"{url}/v1/products/{PRODUCT}").json()["active"]
    with opened(browser, url, "tune") as page:
        figure = page.locator("[data-figure=changed] .big")
        figure.wait_for()
        held = page.locator("[data-figure=held] .big")
        before = (figure.inner_text(), held.inner_text())
        handle = page.get_by_role("slider", name="Reject limit")
        box = settled(handle.locator("path"))
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] - 60, box["y"] + 10, steps=5)
        page.mouse.up()
        assert page.locator("[data-promise=lost]").is_visible()
        handle.focus()
        for _ in range(5):
            page.keyboard.press("PageDown")
        value = float(handle.get_attribute("aria-valuenow"))
        assert value < 0.6
        page.keyboard.press("ArrowRight")
        assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(value + 0.01)
        assert (figure.inner_text(), held.inner_text()) != before
        page.locator("[data-figure=changed]").click()
        listed = page.get_by_role("list", name="of the last parts would have been decided otherwise")
        assert listed.get_by_role("link").count() > 0
        for _ in range(12):
            handle.press("PageUp")
        assert page.locator("[data-promise=kept]").is_visible()
        page.get_by_role("checkbox", name="Warn above").check()
        page.get_by_role("slider", name="Warning limit").press("ArrowLeft")
        page.get_by_label("Note", exact=True).fill("less strict")
        page.get_by_role("button", name="Save as a new version").click()
        page.get_by_text("was made and inspects now").wait_for()
        page.get_by_role("link", name="Models").click()
        page.get_by_role("cell", name="less strict").wait_for()
        row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=str(active), exact=True))
        row.get_by_role("button", name="Go back to it").click()
        page.get_by_role("button", name=f"Activate version {active}").click()
        page.get_by_text(f"Version {active} inspects now").wait_for()
    versions = httpx.get(f"{url}/v1/products/{PRODUCT}/versions").json()
    (made,) = (version for version in versions if version["note"] == "less strict")
    assert made["reject_limit"] > 1 and 0.5 < made["warn_limit"] < made["reject_limit"]
    assert versions[active - 1]["active"]


def test_a_corner_that_does_not_count(browser, url, station):
    inspect(url, "corner.png", 2003, True)
    with opened(browser, url, "tune") as page:
        page.locator("[data-figure=held] .big").wait_for()
        page.locator(".room img").wait_for()
        paint_rectangle(page, 1 / 2)
        page.get_by_role("button", name="Brush", exact=False).first.click()
        box = settled(page.locator(".stage"))  # as other tools take other room
        page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9)
        page.get_by_role("button", name="Undo").click()
        page.get_by_label("Smallest spot that counts").fill("4")
        for layer in ("img", "canvas.mask", "svg:has(circle)"):  # also what is drawn over the picture lies on it
            assert page.locator(f".stage > {layer}").bounding_box() == page.locator(".stage").bounding_box()
        page.get_by_label("Folder of good parts").select_option(f"{PRODUCT}/good")
        page.get_by_role("button", name="Make a version without these").click()
        page.locator("[data-state=done]").wait_for(timeout=60_000)
        page.get_by_text("and inspects now").wait_for()
        page.get_by_role("button", name="Inspect this part again").click()
        page.get_by_text("Hatched places do not count.").wait_for()
        assert "corner.png" in page.get_by_role("heading", level=1).inner_text()
    version = httpx.get(f"{url}/v1/products/{PRODUCT}/versions").json()[-1]
    assert version["active"]
    found = httpx.get(f"{url}/v1/products/{PRODUCT}/versions/{version['number']}/calibration").json()
    assert found["masked"] and 0 < found["min_area"] < 0.01
    mask = httpx.get(f"{url}/v1/products/{PRODUCT}/versions/{version['number']}/ignored.png").content
    ignored = np.asarray(Image.open(io.BytesIO(mask)).convert("L")) > 127
    assert ignored[4:30, 4:30].all() and not ignored[40:].any() and not ignored[:, 40:].any()
    assert 0.2 < ignored.mean() < 0.3


def test_golden_parts_and_a_stop(browser, url):
    with opened(browser, url, "models") as page:
        page.get_by_label("Pictures", exact=True).set_input_files([file("golden.png", 1002)])
        page.get_by_role("list", name="Golden parts").get_by_text("golden.png").wait_for()
        page.get_by_role("button", name="Check now").click()
        page.get_by_text("1 golden part checked").wait_for()
        page.get_by_role("button", name=f"Stop {PRODUCT}").click()
        page.get_by_label("Why").fill("lamp is changed")
        page.get_by_role("dialog").get_by_role("button", name=f"Stop {PRODUCT}").click()
        page.get_by_text("lamp is changed").wait_for()
        page.get_by_role("link", name="Inspect").click()
        page.get_by_text(f"{PRODUCT} is stopped").wait_for()
        page.get_by_role("link", name="Models").click()
        page.get_by_role("button", name=re.compile("Activate|Go back")).first.click()
        page.get_by_role("dialog").get_by_role("button", name=re.compile("Activate version")).click()
        page.get_by_role("button", name=f"Stop {PRODUCT}").wait_for()


def test_the_same_place_of_a_good_part_is_shown_beside_a_defect(browser, url, station, model, category, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    good_parts.keep(tmp_path / "model", {"images": str(category / "train/good")})
    add_version(station, "widget-too", tmp_path / "model", "tester")
    activate(station, "widget-too", 1, "tester")
    made = inspect(url, "beside.png", 2005, True, product="widget-too")
    with opened(browser, url, f"decision/{made['id']}") as page:
        beside = page.get_by_role("group", name="Place 1 beside a good part")
        pictures = [beside.get_by_role("img", name=f"Place 1: {name}") for name in ("this part", "good part")]
        for picture in pictures:
            picture.wait_for()
        boxes = [picture.bounding_box() for picture in pictures]
        windows = [window.bounding_box() for window in beside.locator(".window").all()]
        for side in ("x", "y"):  # the same place of both, which is in the window
            assert boxes[0][side] - windows[0][side] == pytest.approx(boxes[1][side] - windows[1][side], abs=1)
        left, _, right, _ = made["regions"][0]["box"]
        middle = boxes[0]["x"] + boxes[0]["width"] * (left + right) / 2 / made["width"]
        assert windows[0]["x"] <= middle <= windows[0]["x"] + windows[0]["width"]


def test_verdicts_make_a_better_version_that_is_activated(browser, model, category, tmp_path):
    station = make_station(tmp_path / "line", model)
    shutil.copytree(category / "train/good", station.folder / "data" / PRODUCT / "good")
    try:
        with served(station, threads=1) as url, opened(browser, url, "models") as page:
            section = page.get_by_role("region", name="Learn from verdicts")
            section.get_by_text("0 parts were judged good").wait_for()
            assert section.get_by_role("button", name="Make a better version").is_disabled()
            for seed in range(4):  # parts with a stain, which is not bad
                stained = np.array(draw_part(700 + seed)[0])
                stained[30:36, 30:36] = 200
                made = httpx.post(f"{url}/v1/products/{PRODUCT}/inspections", content=png(Image.fromarray(stained)), timeout=60).json()
                httpx.put(f"{url}/v1/decisions/{made['id']}/verdict", json={"verdict": "good"}).raise_for_status()
            section.get_by_text("4 parts were judged good").wait_for()
            section.get_by_role("radio", name="New limits").check()
            section.get_by_label("Note of the better version").fill("stains are harmless")
            section.get_by_role("button", name="Make a better version").click()
            section.locator("[data-state=done]").wait_for(timeout=120_000)
            rows = section.get_by_role("table", name="Before and after").get_by_role("row").all_inner_texts()
            before, after = (int(cell.split(" of ")[0]) for cell in rows[1].split("\t")[1:])
            assert after < before and "4 parts judged good were used" in section.inner_text()
            section.get_by_role("button", name="Activate version 2").click()
            section.get_by_text("Version 2 inspects.").wait_for()
            row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="2 active"))
            row.get_by_text("stains are harmless").wait_for()
            # one that is worse is not offered
            side = {"good": 8, "bad": 1, "found": 1}
            result = {"golden_changed": ["edge.png"], "confirmed_good": 4, "offered": False, "promise": ""}
            result |= {"before": side | {"false_rejects": 1}, "after": side | {"false_rejects": 2, "found": 0}}
            identity = add_job(station, "feedback", columns={"state": "done", "result": result}, images="x", activate=False)
            worse = page.locator(f"[data-job='{identity}']")
            worse.get_by_text(
                "It is not offered: 1 golden part is decided otherwise (edge.png), and it would reject 2 good parts"
            ).wait_for()
            worse.get_by_text("1 bad part fewer is rejected than before.").wait_for()
            assert worse.get_by_role("button").count() == 0
            # of a model that aligns its parts no place can be painted over
            page.goto(f"{url}/#/tune")
            page.get_by_text("Paint over another part's picture").wait_for()
            (folder_of(station, PRODUCT, 2) / ALIGNMENT_FILE).touch()
            page.reload()
            page.get_by_text("a painted place would be another one on every part").wait_for()
            assert page.get_by_text("Paint over another part's picture").count() == 0
    finally:
        station.close()


def test_history_follows_without_losing_place_or_filter(browser, url):
    def accepted(seeds: Iterator[int]) -> dict:
        return next(made for seed in seeds if (made := inspect(url, f"followed-{seed}.png", seed))["decision"] == "accept")

    seeds = iter(range(6000, 7000))
    for _ in range(9):
        accepted(seeds)
    with opened(browser, url, "history") as page:
        page.set_viewport_size({"width": 700, "height": 500})
        page.get_by_role("combobox", name="Decision").select_option("accept")
        with page.expect_response(lambda answer: "since=2020-01-01" in answer.url or "since=2019-12-31" in answer.url):
            page.get_by_label("From").fill("2020-01-01")
        cards = page.get_by_role("list", name="Decisions, the newest first").get_by_role("link")
        page.wait_for_timeout(500)  # until the list is drawn anew
        cards.nth(8).scroll_into_view_if_needed()
        page.mouse.wheel(0, 40)
        top = "[...document.querySelectorAll('.parts li')].find(item => item.getBoundingClientRect().bottom > 0)"
        page.wait_for_timeout(500)
        name, before = page.evaluate(f"[{top}.querySelector('.title').textContent, {top}.getBoundingClientRect().top]")
        others = [inspect(url, "followed-bad.png", 2001, True), accepted(seeds), accepted(seeds)]
        page.get_by_role("button", name=re.compile("↑ [2-9] new parts")).wait_for()
        assert cards.filter(has_text=name).evaluate("card => card.parentElement.getBoundingClientRect().top") == pytest.approx(
            before, abs=1
        )
        assert page.get_by_role("combobox", name="Decision").input_value() == "accept"
        assert page.get_by_label("From").input_value() == "2020-01-01"
        page.get_by_role("button", name=re.compile("new parts")).click()
        assert others[-1]["image_name"] in cards.first.inner_text()
        assert others[0]["decision"] == "reject" and cards.filter(has_text="followed-bad.png").count() == 0
        page.get_by_role("checkbox", name="Follow new parts").uncheck()
        last = accepted(seeds)
        page.wait_for_timeout(3000)
        assert cards.filter(has_text=last["image_name"]).count() == 0
        page.get_by_role("checkbox", name="Follow new parts").check()
        cards.filter(has_text=last["image_name"]).wait_for()


def test_two_people_see_each_others_verdicts(browser, url):
    identity = inspect(url, "shared.png", 4001)["id"]
    with opened(browser, url, f"decision/{identity}") as one, opened(browser, url) as other:
        queue = other.get_by_role("list", name="Parts, the newest first")
        queue.get_by_text("shared.png").wait_for()
        one.get_by_label("Note, if you like").fill("a reflection")
        one.get_by_role("button", name="Good").click()
        queue.get_by_role("button", name="shared.png").get_by_text("judged good").wait_for()
        one.get_by_text("“good: a reflection”").wait_for()
        queue.get_by_role("button", name="shared.png").click()
        other.keyboard.press("b")
        one.get_by_text("judged “bad”").wait_for()


def test_two_people_see_each_others_limits_activations_and_masks(browser, model, category, tmp_path):
    from playwright.sync_api import expect

    station = make_station(tmp_path / "line", model)
    shutil.copytree(category / "train/good", station.folder / "data" / PRODUCT / "good")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:36, :36] = 255
    (station.folder / "data/masks").mkdir()
    Image.fromarray(mask).save(station.folder / "data/masks/corner.png")
    try:
        with served(station, threads=1) as url:
            inspect(url, "first.png", 2003, True)
            with opened(browser, url, "tune") as one, opened(browser, url, "tune") as two, opened(browser, url, "models") as three:
                based = [page.get_by_label("Version to begin with") for page in (one, two)]
                for page in (one, two):
                    page.locator("[data-promise=kept]").wait_for()
                three.get_by_role("rowheader", name="1 active").wait_for()
                one.get_by_role("slider", name="Reject limit").press("PageUp")
                one.get_by_label("Note", exact=True).fill("a tenth more")
                one.get_by_role("button", name="Save as a new version").click()
                three.get_by_role("rowheader", name="2 active").wait_for()
                three.get_by_role("cell", name="a tenth more").wait_for()
                expect(based[1]).to_have_value("2", timeout=WAIT)
                assert two.get_by_role("slider", name="Reject limit").get_attribute("aria-valuenow") == "1.1"
                # what somebody is changing is left alone
                two.get_by_role("slider", name="Reject limit").press("PageUp")
                three.get_by_role("row").filter(has=three.get_by_role("rowheader", name="1", exact=True)).get_by_role("button").click()
                three.get_by_role("button", name="Activate version 1").click()
                two.get_by_text("Meanwhile somebody activated version 1").wait_for()
                assert two.get_by_role("slider", name="Reject limit").get_attribute("aria-valuenow") == "1.2"
                two.get_by_role("button", name="Begin with it").click()
                for page in (one, two):
                    page.locator("[aria-valuenow='1'][aria-label='Reject limit']").wait_for()
                three.get_by_role("link", name="Inspect").click()
                three.get_by_role("list", name="Parts, the newest first").get_by_text("first.png").wait_for()
                body = {
                    "kind": "calibrate",
                    "product": PRODUCT,
                    "images": f"{PRODUCT}/good",
                    "ignore": "masks/corner.png",
                    "activate": True,
                }
                httpx.post(f"{url}/v1/jobs", json=body).raise_for_status()
                expect(based[1]).to_have_value("3", timeout=120_000)
                two.get_by_role("button", name="Make a version without these").wait_for()  # the mask is what painting goes on from
                inspect(url, "masked.png", 2003, True)
                three.get_by_text("masked.png").first.wait_for()
                three.get_by_text("Hatched places do not count.").wait_for()
    finally:
        station.close()


def remove(page, name):
    """Take a picture out once it is seen: before, the page may still ask for what is no longer there."""
    button = page.get_by_role("button", name=f"Remove {name}")
    page.get_by_role("listitem").filter(has=button).locator("img").wait_for()
    button.click()


def test_teach_then_restart_and_find_everything(browser, tmp_path):
    station = make_station(tmp_path / "new")
    try:
        with served(station, threads=1) as url, opened(browser, url) as page:
            page.get_by_role("button", name="Teach a product").click()
            page.get_by_label("Name of the product").fill("gear")
            for number, place in enumerate(("train/good", "test/hole", "ground_truth/hole")):  # as data sets lie
                (tmp_path / "set" / place).mkdir(parents=True)
                draw_part(900 + number)[0].save(tmp_path / "set" / place / f"{number}.png")
            page.get_by_label("Folder of pictures").set_input_files(tmp_path / "set")
            page.get_by_text("2 pictures in folders called “ground_truth”, “test” were left out").wait_for()
            remove(page, "0.png")
            parts = [file(f"good part {number}.png", number) for number in range(24)]
            page.get_by_label("Pictures", exact=True).set_input_files([*parts, file("twice.png", 3)])
            page.get_by_text("25 pictures").first.wait_for()
            page.get_by_text("pixel for pixel").first.wait_for()
            remove(page, "good_part_3.png")
            page.get_by_text("Nothing is wrong with them").wait_for()
            page.get_by_label("Good parts that may be rejected by mistake").select_option("0.05")
            page.get_by_text("For experts").click()
            page.get_by_label("Method").select_option("memory-bank")
            page.get_by_label("Side in pixels to work at").fill("64")
            page.get_by_role("button", name="Learn gear from 24 pictures").click()
            page.locator("[data-state=done], [data-state=failed]").wait_for(timeout=60_000)
            assert "a new good part is rejected with a probability" in page.locator("[data-state=done]").inner_text()
            page.get_by_role("button", name="Inspect parts").click()
            page.get_by_label("Pictures", exact=True).set_input_files([file("first.png", 500)])
            page.get_by_role("status", name="Decision").wait_for()
            page.keyboard.press("g")
            page.get_by_text("judged good").first.wait_for()
        with served(station, threads=1) as url, opened(browser, url, "history") as page:
            page.get_by_role("link", name="first.png").get_by_text("judged good").wait_for()
            page.get_by_role("link", name="Teach").click()
            page.locator("[data-state=done]").wait_for()
    finally:
        station.close()


def test_a_job_that_fails_says_why_and_one_can_be_cancelled(browser, url):
    with opened(browser, url, "teach") as page:
        page.get_by_label("Name of the product").fill("broken")
        page.get_by_label("Pictures", exact=True).set_input_files([file("only.png", 1)])
        page.get_by_text("These are few").wait_for()
        page.get_by_text("For experts").click()
        page.get_by_label("Method").select_option("memory-bank")
        page.get_by_role("button", name="Learn broken from 1 picture").click()
        page.locator("[data-state=failed]").wait_for(timeout=60_000)
        assert "It failed" in page.locator("[data-state=failed]").inner_text()
        page.get_by_label("Method").select_option("lite")  # which takes longer than a click
        page.get_by_label("Pictures", exact=True).set_input_files([file(f"{number}.png", number) for number in range(2, 14)])
        page.get_by_role("button", name="Learn broken from 1").click()
        page.get_by_role("button", name="Cancel").click()
        page.locator("[data-state=cancelled]").wait_for()


def test_a_training_that_failed_shows_how_far_it_had_come(browser, url, station):
    identity, pictures = new_id(), {"good-part-and-drawing": 40, "input-and-reconstruction-1": 1}
    folder = station.folder / "jobs" / identity / "examples"
    folder.mkdir(parents=True)
    for name in pictures:
        draw_part(1)[0].save(folder / f"{name}.png")
    losses = {"scale 1: denoiser": [[step, 1 / step] for step in range(1, 41)], "picture decoder": [[1, 0.5], [2, 0.25]]}
    examples = [{"name": name, "stage": "picture decoder", "step": step} for name, step in pictures.items()]
    progress = {"stage": "picture decoder", "done": 2, "total": 200, "losses": losses, "examples": examples}
    ended = {"id": identity, "state": "failed", "problem": "the lamp went out", "progress": progress}
    add_job(station, "fit", "gear", columns=ended, images="gear/good")
    with opened(browser, url, "teach") as page:
        card = page.locator(f"[data-job='{identity}']")
        card.get_by_text("the lamp went out").wait_for()
        assert card.locator("[data-curve]").count() == 2
        assert card.get_by_role("img", name="Error over 40 steps, from 1 to 0.025").is_visible()
        card.locator(".examples").scroll_into_view_if_needed()
        card.locator(".examples img").nth(1).wait_for()
        assert "part as it should be" in card.locator(".examples").inner_text()


def test_a_station_with_keys_asks_for_one(browser, model, tmp_path):
    station = make_station(tmp_path / "locked", model)
    try:
        key = station.add_key("inspector", "tester")
        with served(station, threads=1) as url, opened(browser, url, refused=("401",)) as page:
            dialog = page.get_by_role("dialog", name="This station wants a key")
            dialog.get_by_label("Key").fill("wrong")
            page.keyboard.press("Enter")
            dialog.get_by_text("not known here").wait_for()
            dialog.get_by_label("Key").fill(key)
            page.keyboard.press("Enter")
            page.get_by_text(f"Ready for {PRODUCT}").wait_for()
            page.get_by_label("Pictures", exact=True).set_input_files([file("locked.png", 1003)])
            page.locator(".room img").wait_for()  # pictures go with the key, too
            assert page.evaluate("JSON.stringify(localStorage)").find(key) < 0
            page.reload()
            page.get_by_role("status", name="Decision").wait_for()
    finally:
        station.close()


def test_pages_can_be_read_and_operated_by_everybody(browser, url):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    identity = inspect(url, "read.png", 2004, True)["id"]
    found = {}
    with opened(browser, url) as page:
        for place in (*PAGES, f"decision/{identity}", "help"):
            if place == "help":
                page.keyboard.press("h")
                page.get_by_role("dialog", name="Keys").wait_for()
            else:
                page.goto(f"{url}/#/{place}")
                page.locator("main .card, main .viewer").first.wait_for()
            page.wait_for_timeout(400)
            for theme in ("light", "dark"):
                page.emulate_media(color_scheme=theme)
                for each in axe.run(page).response["violations"]:  # by every rule that it has switched on
                    nodes = [f"{node['html'][:120]} {node['failureSummary'][:200]}" for node in each["nodes"]]
                    found[f"{place}, {theme}: {each['id']}"] = nodes[:3]
        page.keyboard.press("Escape")
        page.set_viewport_size({"width": 1024, "height": 768})
        for place in PAGES:
            page.goto(f"{url}/#/{place}")
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 1024, place
    assert not found, json.dumps(found, indent=1)
