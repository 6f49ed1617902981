"""The page of a report, in text and in a browser; its charts and pictures."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reports import FILES, Page, mislabelled, put_report, rejected_of, rows_of

from gladad.core.records import Prediction, Report
from gladad.core.storage import WriteError
from gladad.data.samples import category_samples
from gladad.evaluation.run import evaluate
from gladad.report.charts import charts
from gladad.report.gallery import OUTCOMES, WRONG, GalleryItem, Picture, chosen, item_bytes, outcome_of, small_pictures
from gladad.report.page import write_page
from gladad.report.pictures import COLOURS
from gladad.report.text import score_table

# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, driven by Selenium; it never looks for a driver on the network."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for name in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run", "hide-scrollbars"):
        options.add_argument(f"--{name}")
    for name in ("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,1000"):
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        patch.setenv("no_proxy", "localhost,127.0.0.1")
        driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def opened(browser: Any, page: Path, width: int = 1280) -> Any:
    """Open a page at a width as a phone or a desktop does; earlier messages of the console are forgotten."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def until(browser: Any, condition: str) -> None:
    """Wait until a JavaScript condition holds."""
    end = time.monotonic() + 20
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "expected"), [("report_folder", ["scores", "roc", "pr", "pro"]), ("report_folder_without_masks", ["scores", "roc", "pr"])]
)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_charts_and_pictures(browser, request, name, expected, width):
    report_folder = request.getfixturevalue(name)
    opened(browser, report_folder / "index.html", width)
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(chart => { const svg = chart.querySelector('svg');"
        " const box = svg.getBoundingClientRect();"
        " return [chart.id, box.width, box.height, svg.querySelectorAll('path, rect').length, svg.getAttribute('aria-label')]; })"
    )
    assert [chart[0] for chart in drawn] == [f"chart-{name}" for name in expected]
    for _, chart_width, height, paths, label in drawn:
        assert 250 < chart_width <= width and 150 < height < 600 and paths > 5 and len(label) > 20
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    images = browser.execute_script("return document.querySelectorAll('#images img').length")
    masks = 4 if name == "report_folder" else 0
    assert images == 3 * len(rows_of(report_folder)) + masks
    browser.execute_script("for (const image of document.images) image.loading = 'eager'")
    until(browser, "[...document.querySelectorAll('#images img')].every(image => image.complete)")
    sizes = browser.execute_script("return [...document.querySelectorAll('#images img')].map(i => [i.naturalWidth, i.naturalHeight])")
    assert {tuple(size) for size in sizes} == {(72, 72)}
    assert browser.get_log("browser") == []


def shown(browser: Any) -> list[tuple[str, str]]:
    """Name and outcome of the images that the gallery shows, in order."""
    cells = "[...document.querySelectorAll('#images .words')]"
    texts = browser.execute_script(f"return {cells}.map(cell => ['.title', '.verdict'].map(one => cell.querySelector(one).textContent))")
    return [(name, outcome[2:]) for name, outcome in texts]


def named(row: dict[str, Any]) -> tuple[str, str]:
    """What the gallery shows of a record."""
    return f"{row['defect_type']}/{Path(row['image_path']).name}", row["outcome"]


def press(browser: Any, group: str, value: str) -> int:
    """Press a filter as a keyboard does; returns the count that it announced."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    buttons = browser.find_elements(By.CSS_SELECTOR, f"[role=group][aria-label={group}] button")
    (button,) = [button for button in buttons if re.fullmatch(rf"{re.escape(value or 'all')} \d+", button.text)]
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-pressed") == "true"
    assert sum(other.get_attribute("aria-pressed") == "true" for other in buttons) == 1
    return int(button.text.split()[-1])


def said(browser: Any) -> str:
    """How many images the page says that it shows."""
    return str(browser.execute_script("return document.querySelector('#images [role=status]').textContent"))


def test_filters(browser, report_folder):
    opened(browser, report_folder / "index.html")
    rows = rows_of(report_folder)
    assert {row["outcome"] for row in rows} == set(OUTCOMES)
    assert sorted(shown(browser)) == sorted(map(named, rows))
    for result in (*OUTCOMES, ""):
        for kind in (*sorted({row["defect_type"] for row in rows}), ""):
            press(browser, "Outcome", result)
            announced = press(browser, "Type", kind)
            expected = sorted(named(row) for row in rows if result in ("", row["outcome"]) and kind in ("", row["defect_type"]))
            assert sorted(shown(browser)) == expected and announced == len(expected)
            assert said(browser) == f"{len(expected)} of {len(rows)} images"
    assert browser.get_log("browser") == []


def test_search_and_order(browser, report_folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    opened(browser, report_folder / "index.html")
    rows = rows_of(report_folder)
    first = shown(browser)
    groups = [WRONG.index(result) if result in WRONG else len(WRONG) for _, result in first]
    assert groups == sorted(groups) and set(groups) == {0, 1, 2}
    order = Select(browser.find_element(By.CSS_SELECTOR, "#images select"))
    for value, sign in (("up", 1), ("down", -1)):
        order.select_by_value(value)
        texts = browser.execute_script("return [...document.querySelectorAll('#images .lines')].map(text => text.textContent)")
        scores = [re.match(r"score (\S+)", text)[1] for text in texts]
        assert scores == [f"{score:.3f}" for score in sorted((row["pred_score"] for row in rows), key=lambda score: sign * score)]
    order.select_by_value("")
    assert shown(browser) == first
    search = browser.find_element(By.CSS_SELECTOR, "#images input")
    search.send_keys("HOLE/002")
    assert shown(browser) == [("hole/002.png", "found")]
    search.send_keys("x")
    assert shown(browser) == [] and said(browser).startswith("0 of")


def test_a_click_shows_the_full_size_or_says_that_it_is_not_there(browser, report_folder, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, report_folder / "index.html")
    for number in range(4):
        link = browser.find_elements(By.CSS_SELECTOR, "#images a")[number]
        link.send_keys(Keys.ENTER)
        until(browser, "document.querySelector('dialog[open] img')?.naturalWidth > 0")
        assert browser.execute_script("return document.querySelector('dialog img').src") == link.get_attribute("href")
        assert "full size" not in browser.find_element(By.TAG_NAME, "dialog").text
        browser.find_element(By.CSS_SELECTOR, "dialog button").send_keys(Keys.ESCAPE)
        until(browser, "!document.querySelector('dialog')")
    assert browser.get_log("browser") == []
    alone = shutil.copy(report_folder / "index.html", tmp_path)
    opened(browser, Path(alone))
    browser.find_element(By.CSS_SELECTOR, "#images a").send_keys(Keys.ENTER)
    until(browser, "document.querySelector('dialog img')?.src.startsWith('data:')")
    assert "The full size is not beside this page" in browser.find_element(By.TAG_NAME, "dialog").text


def test_the_histogram_and_the_colour_scale_are_the_consoles(browser, report_folder):
    """The histogram counts all parts of both groups; the scale has the colours of the pictures."""
    opened(browser, report_folder / "index.html")
    bars, names, scale = browser.execute_script(
        "const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);"
        "const canvas = document.querySelector('#images canvas');"
        "return [all('#scores .bars', bars => [bars.classList[1], [...bars.querySelectorAll('title')].map(t => parseInt(t.textContent))]),"
        " all('#scores .name', name => name.textContent), [...canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data]]"
    )
    found = [rejected_of(report_folder, label) for label in (0, 1)]
    # each zone draws the columns of all parts, and shows those inside it
    assert [(zone, sum(counts)) for zone, counts in bars] == [(zone, size) for _, size in found for zone in ("accept", "warn", "reject")]
    labels = [f"{name} · {size} parts · {bad} rejected" for name, (bad, size) in zip(("Good", "Bad"), found, strict=True)]
    assert names == labels
    assert (np.array(scale).reshape(-1, 4)[:, :3] == COLOURS).all()


def test_without_a_script_the_page_has_all_scores_and_images(browser, report_folder):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, report_folder / "index.html")
        text = browser.find_element("tag name", "body").text
        images = browser.find_elements("css selector", "#images li img")
        shown = all(image.is_displayed() for image in images)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    rows = rows_of(report_folder)
    assert all(f"{row['outcome']}: " in text and named(row)[0] in text and f"score {row['pred_score']:.3f}" in text for row in rows)
    assert len(images) == 3 * len(rows) + 4 and shown
    table = [line.split()[-2:] for line in text.splitlines() if re.match(r"(up to|above|[\d.]+ to) [\d.]+ \d+ \d+$", line)]
    assert [sum(int(line[label]) for line in table) for label in (0, 1)] == [rejected_of(report_folder, label)[1] for label in (0, 1)]


def test_charts_follow_the_colours_of_the_page(browser, report_folder):
    seen = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        opened(browser, report_folder / "index.html")
        back, text, line = browser.execute_script(
            "const roc = document.querySelector('#chart-roc svg'), style = element => getComputedStyle(element);"
            "const line = [...roc.querySelectorAll('path')].find(path => style(path).strokeWidth === '2px');"
            "return [style(document.querySelector('.chart')).backgroundColor, style(document.body).color, style(line).stroke]"
        )
        assert line == text
        seen.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (back, text)])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    (light_back, light_text), (dark_back, dark_text) = seen
    assert light_back - light_text > 500 and dark_text - dark_back > 500


# ------------------------------------------------------------------------------------------------------------- as text


@pytest.mark.parametrize("name", ["report_folder", "report_folder_without_masks"])
def test_the_page_needs_nothing_but_itself_and_its_pictures(request, name):
    report_folder = request.getfixturevalue(name)
    text = (report_folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    markup, script = re.fullmatch(r"(?s)(.*)<script>(.*)</script>\s*</body>\s*</html>\s*", text).groups()
    assert not re.search(r"https?:|@import|url\((?!#)", markup) and not re.search(r"@import|url\((?!#)", script)
    addresses = set(re.findall(r"https?://[^\s\"'`)<>]+", script))  # namespaces, and where an error is explained
    assert all(address.startswith(("http://www.w3.org/", "https://svelte.dev/e/")) for address in addresses), addresses
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed"}
    assert all(re.match("data:image/jpeg;base64,", attrs["src"]) for attrs in page.all("img") if "src" in attrs)
    links = [attrs["href"] for attrs in page.all("a")]
    assert len(links) == len(page.all("img"))
    assert all((report_folder / link).is_file() for link in links)
    assert all(attrs["alt"] for attrs in page.all("img") if "src" in attrs)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', markup)) <= set(ids)
    shown = "".join(page.texts)
    (good, goods), (bad, bads) = rejected_of(report_folder, 0), rejected_of(report_folder, 1)
    headline = f"{bad} of {bads} bad parts found, {good} of {goods} good parts rejected"
    for expected in ("Widgets & <gadgets>", headline, 'odd "kind" <1> & ünï', "nearest neighbour"):
        assert expected in shown
    assert ("AUPRO" in "".join(attrs.get("aria-label") or "" for attrs in page.all("svg"))) == (name == "report_folder")
    assert ("no mask" in shown) and ("pixel AUROC" in shown) == (name == "report_folder")


def test_the_same_report_is_the_same_page(report_folder, detector, category, tmp_path):
    report = evaluate(detector, mislabelled(detector, category))
    drawn = charts(report)
    assert [chart.name for chart in drawn] == ["roc", "pr", "pro"]
    assert charts(report) == drawn
    assert not any(re.search("(fill|stroke): #", chart.svg) for chart in drawn)  # every colour is one of the page
    before = {name: (report_folder / name).read_bytes() for name in FILES}
    put_report(detector, mislabelled(detector, category), tmp_path)
    for name in ("index.html", "report.md"):  # but for the time it took
        texts = [re.sub(rb"\d\.\d{3} s", b"", data) for data in (before[name], (tmp_path / name).read_bytes())]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(("rows", "expected"), [(slice(0, 4), ["chart-scores"]), (slice(4, 8), ["chart-scores", "chart-pro"])])
def test_one_class_only(detector, category, tmp_path, rows, expected):
    report = put_report(detector, category_samples(category)[rows], tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    assert [attrs["id"] for attrs in page.all("figure") if attrs.get("class") == "chart"] == expected
    assert report.details["notes"][0] in "".join(page.texts)


def test_a_page_without_images_and_with_odd_names(detector, category, tmp_path):
    report = evaluate(detector, category_samples(category))
    write_page(tmp_path / "a.html", report, [], "Nothing")
    assert "No images." in Page((tmp_path / "a.html").read_text()).texts
    write_page(tmp_path / "a.html", report, [item("bad\udcff.png", 1.5)], "Odd {title} {body}")
    page = Page((tmp_path / "a.html").read_text())
    assert "bad?.png" in page.texts and page.texts.count("Odd {title} {body}") == 2
    assert "There are no full-size pictures" in "".join(page.texts)


def test_nothing_on_the_page_is_taken_for_markup(detector, category, tmp_path):
    nasty = "<script>alert('x')</script>&\"{body}{title}"
    report = evaluate(detector, [replace(sample, defect_type=nasty) for sample in category_samples(category)])
    write_page(tmp_path / "a.html", report, [replace(item(nasty, 1.5), defect_type=nasty)], nasty)
    text = (tmp_path / "a.html").read_text()
    assert len(Page(text).all("script")) == 1 and "alert('x')" not in text


def test_a_failed_write_keeps_the_old_page(detector, category, tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(WriteError, match="disk full"):
        write_page(path, evaluate(detector, category_samples(category)), [], "t")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.html"]


# ------------------------------------------------------------------------------------------------- charts and pictures


def test_the_threshold_is_an_edge_of_the_table_of_scores(detector, category):
    report = evaluate(detector, category_samples(category))
    pairs = ((0, 0.0), (0, 1.0), (1, 1.0), (1, float(np.nextafter(1, 2))), (1, 99.0))
    rows = [{"gt_label": label, "pred_score": score} for label, score in pairs]
    head, table = score_table(replace(report, rows=[*rows, {"error": "unreadable"}]))
    assert head == ("score", "good parts", "bad parts")
    expected = [("up to 0.5", "1", "0"), ("0.8 to 1", "1", "1"), ("1 to 1.25", "0", "1"), ("above 2", "0", "1")]
    assert [row for row in table if row[1:] != ("0", "0")] == expected


def test_charts_say_what_they_show(report_folder):
    report = Report(**{key: value for key, value in json.loads((report_folder / "report.json").read_text()).items() if key in REPORT})
    labels = {chart.name: re.search('aria-label="([^"]*)"', chart.svg)[1] for chart in charts(report)}
    (scores,) = [attrs for attrs in Page((report_folder / "index.html").read_text()).all("div") if attrs.get("id") == "scores"]
    (good, goods), (bad, bads) = rejected_of(report_folder, 0), rejected_of(report_folder, 1)
    assert scores["data-label"].endswith(f"good: {goods - good} accepted, {good} rejected; bad: {bads - bad} accepted, {bad} rejected.")
    assert f"AUROC {report.metrics['image_auroc']:.3f}" in labels["roc"] and "AUPRO" in labels["pro"]
    assert labels["roc"].endswith(f"{good / goods:.1%}, {bad / bads:.1%}.")
    assert labels["pr"].endswith(f"{bad / bads:.1%}, {bad / (good + bad):.1%}.")


REPORT = ("metrics", "counts", "rows", "details")


def predicted(size: tuple[int, int], seed: int = 0) -> tuple[Prediction, np.ndarray]:
    """A prediction about an image of noise, which JPEG can do little with, and the image."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    anomaly_map = rng.random(size, np.float32) * 2
    return Prediction(1.5, 0.01, True, 350, anomaly_map, anomaly_map > 1.9, (), size, pixels[::-1].copy()), pixels


def item(name: str, score: float, gt_label: int = 1, pictures: tuple[Picture, ...] = ()) -> GalleryItem:
    return GalleryItem(name, score, 0.5, score > 1, 350, pictures, gt_label, "kind")


def test_a_page_of_500_images_stays_below_15_megabytes(detector, category, tmp_path):
    """Of noise: photographs are smaller, and so keep larger pictures."""
    limit = item_bytes(500)
    items = []
    for seed in range(3):
        prediction, pixels = predicted((512, 512), seed)
        small = small_pictures(prediction, pixels, prediction.pred_mask, limit)
        assert [title for title, _ in small] == ["input", "reconstruction", "map", "ground truth"]
        assert sum(len(data) for _, data in small) <= limit
        items.append(item("a" * 60, 1.5, pictures=tuple(Picture(*pair, "pictures/" + "a" * 100) for pair in small)))
    report = evaluate(detector, category_samples(category))
    write_page(tmp_path / "a.html", report, [items[n % 3] for n in range(500)], "t")
    assert 5e6 < (tmp_path / "a.html").stat().st_size < 15e6


def test_pictures_are_as_large_as_there_is_room():
    prediction, pixels = predicted((400, 600))
    sides = []
    for count in (5, 500, 1000, 10**6):
        limit = item_bytes(count)
        small = small_pictures(prediction, pixels, None, limit)
        assert sum(len(data) for _, data in small) <= limit and len(small) == 3
        sizes = {Image.open(io.BytesIO(data)).size for _, data in small}
        assert len(sizes) == 1
        sides.append(sizes.pop()[0])
    assert sides == sorted(sides, reverse=True) and sides[0] > sides[2] == sides[3]
    flat = replace(prediction, anomaly_map=np.zeros((400, 600), np.float32), pred_mask=np.zeros((400, 600), bool), reconstruction=None)
    pictures = dict(small_pictures(flat, np.full_like(pixels, 99), None, item_bytes(1)))
    assert pictures.keys() == {"input", "map"} and Image.open(io.BytesIO(pictures["input"])).size == (256, 171)


def test_small_defects_are_seen_in_small_pictures():
    prediction, pixels = predicted((1000, 1000))
    speck = np.zeros((1000, 1000), bool)
    speck[501, 502] = True
    plain = replace(prediction, anomaly_map=np.zeros((1000, 1000), np.float32), pred_mask=np.zeros_like(speck))
    pictures = dict(small_pictures(plain, np.full_like(pixels, 60), speck, item_bytes(1)))
    marked, unmarked = (np.asarray(Image.open(io.BytesIO(pictures[name]))).astype(int) for name in ("ground truth", "map"))
    assert np.abs(marked - unmarked).max() > 60


@pytest.mark.parametrize(("truth", "rejected", "expected"), [(1, False, 0), (0, True, 1), (1, True, 2), (0, False, 3)])
def test_outcomes(truth, rejected, expected):
    assert outcome_of(truth, rejected) == OUTCOMES[expected]


def test_the_most_wrong_come_first():
    items = [item("a", 0.5), item("b", 0.9), item("c", 1.2, 0), item("d", 3.0, 0), item("e", 1.1), item("f", 9.0), item("g", 0.8, 0)]
    assert "".join(one.name for one in chosen(items[::-1])) == "abdcegf"


def test_of_more_wrong_decisions_than_are_shown_the_most_wrong_are():
    scores = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, 1300)).tolist()
    shown = chosen([item(f"{score}", score) for score in scores])
    assert [one.pred_score for one in shown] == sorted(scores)[:1000]
