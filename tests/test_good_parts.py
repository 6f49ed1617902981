"""The good part beside a defect: which are kept with a version, and which of them is shown."""

from __future__ import annotations

import errno
import io
import json
import shutil

import httpx
import numpy as np
from conftest import draw_part
from PIL import Image
from service_base import PRODUCT, make_station, served
from test_alignment import draw, places

from gladad.client import Client
from gladad.core.storage import load_arrays, save_arrays
from gladad.data.alignment import Alignment
from gladad.detector.files import ALIGNMENT_FILE
from gladad.service import good_parts


def shifted(number: int) -> Image.Image:
    """A part whose stripes lie elsewhere for each number."""
    return Image.fromarray(np.roll(np.asarray(draw_part(7)[0]), 5 * number, axis=1))


def test_the_part_most_alike_is_found_though_it_has_a_defect(tmp_path, monkeypatch):
    (tmp_path / "good").mkdir()
    (tmp_path / "model").mkdir()
    for number in range(6):
        shifted(number).save(tmp_path / "good" / f"{number}.png")
    digests = {number: good_parts.file_digest(tmp_path / "good" / f"{number}.png") for number in range(6)}
    (tmp_path / "model/images.json").write_text(json.dumps({"trained": [digests[n] for n in (0, 1, 2, 3)], "held_out": [digests[4]]}))
    good_parts.keep(tmp_path / "model", {"images": str(tmp_path / "good")})
    assert len(load_arrays(tmp_path / "model" / good_parts.FILE)) == 4  # those that were trained on
    for number in range(4):
        broken = np.asarray(shifted(number)).copy()
        broken[10:30, 20:40] = 255 * (number % 2)
        found = good_parts.nearest(tmp_path / "model", broken)
        assert found is not None
        differences = [np.abs(found.astype(float) - np.asarray(shifted(other))).mean() for other in range(4)]
        assert int(np.argmin(differences)) == number and differences[number] < 8
    assert good_parts.nearest(tmp_path, broken) is None
    (tmp_path / "next").mkdir()
    (tmp_path / "next/images.json").write_text(json.dumps({"trained": ["0" * 64], "held_out": [digests[5]]}))
    good_parts.keep(tmp_path / "next", {"images": str(tmp_path / "good"), "model": str(tmp_path / "model")})
    assert (tmp_path / "next" / good_parts.FILE).read_bytes() == (tmp_path / "model" / good_parts.FILE).read_bytes()
    monkeypatch.setattr(good_parts, "MOST", 2)
    good_parts.keep(tmp_path / "model", {"images": str(tmp_path / "good")})
    assert len(load_arrays(tmp_path / "model" / good_parts.FILE)) == 2


def test_around_a_place_other_places_do_not_count(tmp_path):
    """Of parts whose halves differ independently, the half with the place decides; a box that leaves nothing around it does not."""
    (tmp_path / "good").mkdir()
    kinds = {(left, right): np.hstack([np.full((96, 48, 3), left, np.uint8), np.full((96, 48, 3), right, np.uint8)])
             for left in (60, 120) for right in (90, 200)}  # fmt: skip
    for number, pixels in enumerate(kinds.values()):
        Image.fromarray(pixels).save(tmp_path / "good" / f"{number}.png")
    digests = [good_parts.file_digest(path) for path in (tmp_path / "good").iterdir()]
    (tmp_path / "images.json").write_text(json.dumps({"trained": digests, "held_out": []}))
    good_parts.keep(tmp_path, {"images": str(tmp_path / "good")})
    broken = kinds[60, 90].copy()
    broken[:, 48:] = 200  # the right half is like another kind's, but for ...
    broken[:, :20] = 120  # ... most of the left one
    broken[40:56, 4:12] = 0
    for box, left in (((4, 40, 12, 56), 120), ((30, 40, 38, 56), 60)):
        found = good_parts.nearest(tmp_path, broken, box)
        assert found is not None and abs(float(found[48, 24].mean()) - left) < 8
    whole = good_parts.nearest(tmp_path, broken, (0, 0, 96, 96))
    assert whole is not None and np.array_equal(whole, good_parts.nearest(tmp_path, broken))


def test_a_full_disk_or_a_damaged_picture_costs_the_pictures_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "good").mkdir()
    shifted(0).save(tmp_path / "good/0.png")
    (tmp_path / "images.json").write_text(json.dumps({"trained": [good_parts.file_digest(tmp_path / "good/0.png")], "held_out": []}))

    def full(path, arrays):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(good_parts, "save_arrays", full)
    good_parts.keep(tmp_path, {"images": str(tmp_path / "good")})
    (tmp_path / "good/0.png").write_bytes(b"no picture")
    (tmp_path / "images.json").write_text(json.dumps({"trained": [good_parts.file_digest(tmp_path / "good/0.png")], "held_out": []}))
    good_parts.keep(tmp_path, {"images": str(tmp_path / "good")})
    assert not good_parts.has(tmp_path) and good_parts.nearest(tmp_path, np.zeros((64, 64, 3), np.uint8)) is None
    assert [text in caplog.text for text in ("No space left on device", "0.png")] == [True, True]


def test_a_calibrated_version_shows_good_parts_and_one_without_says_so(model, category, tmp_path):
    station = make_station(tmp_path / "line", model)
    shutil.copytree(category / "train/good", station.folder / "data/good")
    try:
        with served(station) as url, Client(url) as client:
            first = client.inspect(PRODUCT, category / "test/hole/000.png")
            answer = httpx.get(f"{url}/v1/decisions/{first.id}/nearest-good.png")
            assert answer.status_code == 404 and "keeps no pictures" in answer.json()["detail"]
            done = client.wait(client.add_job("calibrate", PRODUCT, "good").id)
            assert done.state == "done", done.problem
            known = [httpx.get(f"{url}/v1/products/{PRODUCT}/versions/{number}/calibration").json()["good_parts"] for number in (1, 2)]
            assert known == [False, True]
            second = client.inspect(PRODUCT, category / "test/hole/000.png")
            shown = np.asarray(Image.open(io.BytesIO(client.picture(second.id, "nearest-good.png"))))
            assert shown.shape == (72, 72, 3)
            hole = np.asarray(Image.open(category / "ground_truth/hole/000_mask.png")) > 0
            assert hole.any() and shown[hole].min() > 60  # where the part is dark
            assert httpx.get(f"{url}/v1/decisions/{'0' * 32}/nearest-good.png").status_code == 404
            address = f"{url}/v1/decisions/{second.id}/nearest-good.png"
            statuses = [httpx.get(address, params={"place": place}).status_code for place in (1, 999, 0)]
            assert second.regions and statuses == [200, 404, 422]
    finally:
        station.close()


def test_where_parts_are_aligned_the_good_one_lies_as_the_part_does(tmp_path):
    (tmp_path / "good").mkdir()
    for number, place in enumerate(places(12)):
        Image.fromarray(draw(*place)).save(tmp_path / "good" / f"{number:02}.png")
    alignment = Alignment.learn([draw(*place) for place in places(12)])
    save_arrays(tmp_path / ALIGNMENT_FILE, alignment.arrays())
    digests = [good_parts.file_digest(path) for path in (tmp_path / "good").iterdir()]
    (tmp_path / "images.json").write_text(json.dumps({"trained": digests, "held_out": []}))
    good_parts.keep(tmp_path, {"images": str(tmp_path / "good")})
    place = (200, 0.45, 0.5)
    broken, whole = draw(*place, hole=True), draw(*place)
    hole = np.abs(broken.astype(int) - whole).max(2) > 60
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    for around in (None, box):
        shown = good_parts.nearest(tmp_path, broken, around)
        assert shown is not None and shown.shape == broken.shape
        assert np.abs(shown.astype(int) - whole)[hole].mean() < 25 < np.abs(shown.astype(int) - broken)[hole].mean()
