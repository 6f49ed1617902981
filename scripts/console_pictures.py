"""Pictures of every page of the console, light, dark and at a tablet's size: ``python scripts/console_pictures.py URL FOLDER``.

It needs a running station, playwright, and Chromium. ``--theme``, ``--page`` and ``--product`` choose some; ``--small`` makes JPEG files
of what a screen shows. ``--draw`` writes pictures of an invented product into the folder instead; docs/console shows that one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright

SIZES = {"light": (1440, 900), "dark": (1440, 900), "tablet": (1024, 768)}
PAGES = ("inspect", "teach", "tune", "history", "decision", "models")
CHROMIUM = "/usr/bin/chromium"
TINT = (0.97, 1.0, 1.04)


def draw_flange(seed: int, fault: str = "") -> Image.Image:
    """A flange with six holes on a table; ``fault`` is "", "scratch", "hole" (one is missing) or "sticker", in the corner of the table."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:360, 0:480].astype(float)
    centre = np.array([180, 240]) + rng.normal(0, 1.5, 2)
    radius, angle = np.hypot(y - centre[0], x - centre[1]), rng.normal(0, 0.01)
    grey = 58 + 6 * np.sin(x / 3) * np.sin(y / 2.6)
    disc = 165 + 9 * np.sin(radius * 1.7) + 14 * np.cos(2 * np.arctan2(y - centre[0], x - centre[1]) + 0.6)
    grey = np.where((radius < 150) & (radius > 48), disc, grey)
    for number in range(6):
        around = angle + number * np.pi / 3
        place = centre + 100 * np.array([np.sin(around), np.cos(around)])
        if fault != "hole" or number != 2:
            grey = np.where(np.hypot(y - place[0], x - place[1]) < 17, 40, grey)
    picture = Image.fromarray((grey + rng.normal(0, 3, grey.shape)).clip(0, 255).astype(np.uint8)).convert("RGB")
    picture = Image.merge(
        "RGB", [channel.point(lambda level, by=by: round(level * by)) for channel, by in zip(picture.split(), TINT, strict=True)]
    )
    draw = ImageDraw.Draw(picture)
    if fault == "scratch":
        around, away = rng.uniform(0, 6.3), rng.uniform(60, 80)
        start = (centre[1] + away * np.cos(around), centre[0] + away * np.sin(around))
        draw.line([start, (start[0] + 38, start[1] + 22), (start[0] + 60, start[1] + 20)], fill=(235, 238, 240), width=3)
    if fault == "sticker":
        draw.rectangle((8, 8, 78, 52), fill=(222, 205, 120))
        draw.line([(16, 20), (66, 20), (16, 32), (58, 32)], fill=(60, 50, 30), width=3)
    return picture


def draw_all(folder: Path) -> None:
    """Good parts to teach with in ``good``, and others in ``parts``."""
    for name in ("good", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(120):
        draw_flange(number).save(folder / "good" / f"good-{number:03}.png")
    for number, fault in enumerate(["", "", "scratch", "", "hole", "", "sticker", "", "scratch", "", "sticker", "hole"] * 2):
        draw_flange(1000 + number, fault).save(folder / "parts" / f"part-{number:02}{fault and '-'}{fault}.png")


def newest(url: str, product: str) -> str | None:
    """ID of the last rejected part, or of the last one."""
    for query in ({"product": product, "decision": "reject", "limit": 1}, {"product": product, "limit": 1}):
        items = httpx.get(f"{url}/v1/decisions", params=query).json()["items"]
        if items:
            return str(items[0]["id"])
    return None


def show(page: Page, url: str, name: str, identity: str | None) -> None:
    """Open a page and wait until its pictures are there."""
    page.goto(f"{url}/#/{name}/{identity}" if name == "decision" else f"{url}/#/{name}")
    page.reload()
    page.wait_for_load_state("networkidle" if name not in ("inspect", "decision") else "load")
    page.wait_for_timeout(1500)
    for place in range(0, page.evaluate("document.documentElement.scrollHeight"), 600):  # what is fetched when it is seen
        page.evaluate("place => scrollTo(0, place)", place)
        page.wait_for_timeout(150)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(400)


def take(url: str, folder: Path, product: str, themes: list[str], pages: list[str], small: bool) -> None:
    """Write them, named by page and theme."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = newest(url, product)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or CHROMIUM, args=["--no-sandbox"])
        for theme in themes:
            width, height = SIZES[theme]
            scheme: Any = "dark" if theme == "dark" else "light"
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            context.add_init_script(f"localStorage.setItem('gladad.product', {json.dumps(json.dumps(product))})")
            page = context.new_page()
            for name in pages:
                if name == "decision" and identity is None:
                    continue
                show(page, url, name, identity)
                kind: Any = {"type": "jpeg", "quality": 70} if small else {"type": "png"}
                path = folder / f"{name}-{theme}.{'jpg' if small else 'png'}"
                page.screenshot(path=path, full_page=name != "inspect" and not small, **kind)
            context.close()
        browser.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--product", help="the first one")
    parser.add_argument("--theme", action="append", choices=SIZES)
    parser.add_argument("--page", action="append", choices=PAGES)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        return draw_all(options.folder)
    url = options.url.rstrip("/")
    product = options.product or httpx.get(f"{url}/v1/products").json()[0]["name"]
    take(url, options.folder, product, options.theme or [*SIZES], options.page or [*PAGES], options.small)


if __name__ == "__main__":
    main()
