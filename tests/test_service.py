"""The inspection service over HTTP: decisions as everywhere else, kept before they are told; refusals that name what is wrong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from conftest import TINY, draw_part
from PIL import Image
from safetensors.numpy import save
from service_base import PRODUCT, add_job, free_port, make_station, served, start
from sqlalchemy import func, select, update
from starlette.requests import Request

from gladad.cli.main import main
from gladad.client import AsyncClient, Client, ServiceError
from gladad.core.errors import DataError
from gladad.core.images import as_pixels
from gladad.data.samples import file_digest
from gladad.detector.glad import Glad
from gladad.service import audit
from gladad.service.inspector import BusyError, Inspector
from gladad.service.record import new_id
from gladad.service.tables import decisions as table
from gladad.service.tables import goldens
from gladad.service.worker import check_folder

INSPECT = f"/v1/products/{PRODUCT}/inspections"


@pytest.fixture(scope="module")
def client(url):
    with Client(url) as made:
        yield made


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def png(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def count(station) -> int:
    with station.record.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


# -- decisions --------------------------------------------------------------------------------------------------


def test_every_way_gives_the_same(client, category, detector, model, tmp_path, url):
    paths = sorted(category.glob("test/*/*.png"))
    expected = detector.predict(paths)
    several = client.inspect_many(PRODUCT, paths)
    assert main(["predict", str(model), *map(str, paths), "-o", str(tmp_path / "out"), "-q", "--no-pictures"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    for path, prediction, item, record in zip(paths, expected, several, records, strict=True):
        one = client.inspect(PRODUCT, path)
        assert item.status == 200 and item.decision is not None
        scores = {prediction.pred_score, one.score, item.decision.score, record["pred_score"]}
        assert len(scores) == 1
        assert one.decision == item.decision.decision == ("reject" if prediction.pred_label else "accept")
        assert one.p_value == prediction.p_value
        assert (one.model_id, one.calibration_id) == (detector.model_id, detector.calibration_id)
        assert [region.box for region in one.regions] == [list(region.box) for region in prediction.regions]
        assert (one.width, one.height, one.step) == (72, 72, prediction.step)


def test_a_decision_can_be_found_again(client, category, http):
    content = (category / "test/hole/001.png").read_bytes()
    made = client.inspect(PRODUCT, content, name="part 7.png")
    assert client.decision(made.id) == made
    assert next(client.decisions(limit=1)) == made
    assert made.image_name == "part 7.png"
    assert client.picture(made.id, "image") == content
    for link in (made.links.map, made.links.overlay, made.links.reconstruction, made.links.map.replace("map", "heatmap")):
        response = http.get(link)
        assert response.status_code == 200 and response.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(response.content)).size == (72, 72)
    assert client.judge(made.id, "good", "a stain").verdict == "good"
    assert client.judge(made.id, "bad").verdict == "bad"
    assert made.id in {each.id for each in client.decisions(verdict="bad")}


def test_a_region_has_its_outline(client, category):
    made = client.inspect(PRODUCT, category / "test/hole/001.png")
    assert made.decision == "reject" and made.regions
    for region in made.regions:
        left, top, right, bottom = region.box
        xs, ys = zip(*region.contour, strict=True)
        assert (min(xs), min(ys), max(xs), max(ys)) == (left, top, right, bottom)


def test_large_pictures_have_small_maps(client):
    made = client.inspect(PRODUCT, png(draw_part(7)[0].resize((1200, 600))))
    assert Image.open(io.BytesIO(client.picture(made.id, "map.png"))).size == (512, 256)
    assert Image.open(io.BytesIO(client.picture(made.id, "overlay.png"))).size == (1200, 600)


def test_the_async_client_does_the_same(url, category, client):
    async def work() -> None:
        async with AsyncClient(url) as other:
            made = await asyncio.gather(*(other.inspect(PRODUCT, path) for path in sorted(category.glob("test/good/*.png"))))
            assert len({each.id for each in made}) == len(made)
            assert await other.decision(made[0].id) == made[0]
            assert (await other.judge(made[0].id, "good")).verdict == "good"
            assert [item.status for item in await other.inspect_many(PRODUCT, [category / "test/good/000.png", b"nothing"])] == [200, 415]
            assert len(await other.picture(made[0].id)) > 100
            found = [each async for each in other.decisions(product=PRODUCT, limit=3)]
            assert {each.id for each in made} <= {each.id for each in found}
            assert (await other.products())[0].name == PRODUCT and len(await other.versions(PRODUCT)) >= 1
            with pytest.raises(ServiceError) as problem:
                await other.job("0" * 32)
            assert problem.value.status == 404
            assert (await other.audit_head()).sequence > 0

    asyncio.run(work())


def test_the_chain_verifies_afterwards(client, station):
    head = client.audit_head()
    assert audit.verify(station.record, head.hash).sequence >= head.sequence


# -- refusals ---------------------------------------------------------------------------------------------------


def animated() -> bytes:
    first, second = draw_part(1)[0], draw_part(2)[0]
    return png(first, "WEBP", save_all=True, append_images=[second], lossless=True)


GOOD = png(draw_part(5)[0])
REFUSED = {
    "nothing": (b"", {}, 422, "empty"),
    "text": (b"hello world", {}, 415, "not an image"),
    "a lie": (GOOD, {"content-type": "image/jpeg"}, 415, "it is PNG"),
    "a page": (GOOD, {"content-type": "text/html"}, 415, "text/html"),
    "truncated": (GOOD[: len(GOOD) // 2], {}, 422, "damaged"),
    "tiny": (png(np.zeros((4, 4, 3), np.uint8)), {}, 422, "4x4"),
    "a film": (animated(), {}, 422, "frames"),
    "a gif": (png(draw_part(1)[0], "GIF"), {}, 415, "not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_image_is_refused_and_not_kept(http, station, case):
    content, headers, status, words = REFUSED[case]
    before = count(station)
    response = http.post(INSPECT, content=content, headers=headers)
    assert response.status_code == status
    assert words in response.json()["detail"]
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert count(station) == before


@pytest.mark.parametrize("name", ["../part.png", "a/b.png", "..", "c:\\part.png", "a\x00b", "x" * 256])
def test_a_name_that_is_a_path_is_refused(http, station, name):
    before = count(station)
    assert http.post(INSPECT, content=GOOD, params={"name": name}).status_code == 422
    assert count(station) == before


def test_one_bad_image_of_several_is_refused_alone(http):
    files = [("images", ("a.png", GOOD)), ("images", ("b.png", b"nothing")), ("images", ("c.png", GOOD, "image/jpeg"))]
    items = http.post(f"{INSPECT}/batch", files=files).json()["items"]
    assert [item["status"] for item in items] == [200, 415, 415]
    assert [item["image_name"] for item in items] == ["a.png", "b.png", "c.png"]


def test_forms_of_something_else_are_refused(http):
    assert http.post(f"{INSPECT}/batch", files=[("other", ("a.png", GOOD))]).status_code == 422
    assert http.post(f"{INSPECT}/batch", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert http.post(f"{INSPECT}/batch", files=[("images", (f"{n}", b"x")) for n in range(40)]).status_code == 400
    broken = http.post(f"{INSPECT}/batch", content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=y"})
    assert broken.status_code in (400, 422)


def test_what_is_not_there_is_not_found(http):
    for path in ("/v1/products/gear", "/v1/products/gear/versions", f"/v1/decisions/{'0' * 32}", "/v1/jobs/x", "/v1/nothing"):
        response = http.get(path)
        assert response.status_code == 404 and response.json()["detail"]
    assert http.post("/v1/products/gear/inspections", content=GOOD).status_code == 404
    assert http.post(INSPECT, content=GOOD, headers={"host": "evil.example"}).status_code == 400


def test_a_request_has_its_id(http):
    made = http.post(INSPECT, content=GOOD, headers={"x-request-id": "robot-17"})
    assert made.headers["x-request-id"] == made.json()["request_id"] == "robot-17"
    assert http.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_curl_needs_no_content_type(http):
    for kind in ("application/x-www-form-urlencoded", "application/octet-stream", "image/png"):
        assert http.post(INSPECT, content=GOOD, headers={"content-type": kind}).status_code == 200


def test_probes_and_metrics(http):
    assert http.get("/livez").text == "ok" == http.get("/readyz").text
    text = http.get("/metrics").text
    assert f'gladad_decisions_total{{decision="accept",product="{PRODUCT}"}}' in text
    assert 'gladad_requests_total{method="POST",route="/v1/products/{product}/inspections",status="200"}' in text


@pytest.fixture(scope="module")
def strict(model, tmp_path_factory):
    """A server with small limits, and its station."""
    settings = {"max_bytes": 20_000, "max_pixels": 10_000, "queue": 2, "deadline": 20.0, "keep": "none"}
    station = make_station(tmp_path_factory.mktemp("strict") / "line", model, **settings)
    with served(station, threads=1) as address:
        yield station, address
    station.close()


def test_limits_hold_before_bodies_are_read(strict):
    station, url = strict
    host, port = "127.0.0.1", int(url.rsplit(":", 1)[1])
    with socket.create_connection((host, port), 10) as sent:  # nothing but the head is sent
        sent.sendall(f"POST {INSPECT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 20001\r\n\r\n".encode())
        assert b" 413 " in sent.recv(4096)
    with httpx.Client(base_url=url, timeout=20) as http:
        chunks = (b"x" * 1000 for _ in range(30))  # without a length
        assert http.post(INSPECT, content=chunks).status_code == 413
        assert http.post(INSPECT, content=png(np.zeros((200, 60, 3), np.uint8))).status_code == 422
        assert http.post(INSPECT, content=GOOD).status_code == 200
    assert count(station) == 1


def test_slow_senders_are_cut_off(model, tmp_path):
    station = make_station(tmp_path / "line", model, body_seconds=0.5)
    with served(station, threads=1) as url:
        host, port = "127.0.0.1", int(url.rsplit(":", 1)[1])
        with socket.create_connection((host, port), 10) as sent:
            sent.sendall(f"POST {INSPECT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\nx".encode())
            assert b" 408 " in sent.recv(4096)
    station.close()


def test_a_full_queue_refuses_at_once(strict):
    station, url = strict
    before = count(station)
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: http.post(INSPECT, content=GOOD), range(36)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 429)
    assert count(station) - before == statuses.count(200)
    with Client(url, patience=30) as client, ThreadPoolExecutor(6) as pool:  # who waits and asks again is served
        assert len(list(pool.map(lambda _: client.inspect(PRODUCT, GOOD), range(12)))) == 12


@pytest.mark.parametrize(
    ("method", "path"), [("POST", INSPECT), ("POST", f"/v1/products/{PRODUCT}/golden?name=a.png"), ("PUT", "/v1/data?folder=a&name=a.png")]
)
def test_what_finds_no_room_is_not_held(strict, monkeypatch, method, path):
    """Not even an image that is none: its body is passed over."""
    station, url = strict

    def full(self) -> None:
        raise BusyError("2 images wait or are under way; send it again a little later")

    monkeypatch.setattr(Inspector, "check_room", full)
    monkeypatch.setattr(Request, "body", None)
    refused = httpx.request(method, url + path, content=b"x" * 15_000, timeout=20)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    too_large = httpx.request(method, url + path, content=b"x" * 20_001, timeout=20)
    assert too_large.status_code == 413
    assert not (station.folder / "data").exists()


def test_pictures_are_not_kept_where_they_are_not_wanted(strict):
    station, url = strict
    with Client(url) as client:
        made = client.inspect(PRODUCT, GOOD)
        with pytest.raises(ServiceError, match="not kept") as problem:
            client.picture(made.id)
    assert problem.value.status == 404
    assert not station.pictures.folder.exists()


# -- keys -------------------------------------------------------------------------------------------------------


def test_where_there_are_keys_one_is_needed(strict):
    station, url = strict
    key = station.add_key("robot", "tester")
    try:
        with Client(url) as stranger, pytest.raises(ServiceError, match="API key") as problem:
            stranger.inspect(PRODUCT, GOOD)
        assert problem.value.status == 401
        with Client(url, key + "x") as stranger, pytest.raises(ServiceError):
            stranger.products()
        assert httpx.get(f"{url}/livez").status_code == 200
        with Client(url, key) as robot:
            made = robot.inspect(PRODUCT, GOOD)
            with station.record.read() as connection:
                entry = connection.execute(select(audit.audit).where(audit.audit.c.subject == made.id)).one()
        assert entry.who == "robot"
    finally:
        station.remove_key("robot", "tester")


def test_another_host_needs_a_key(tmp_path, capsys):
    make_station(tmp_path / "line").close()
    assert main(["serve", "--station", str(tmp_path / "line"), "--host", "0.0.0.0"]) == 1
    assert "make a key first" in capsys.readouterr().err


# -- the worker -------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_started_again(model, tmp_path):
    station = make_station(tmp_path / "line", model)
    with served(station, threads=2) as url, Client(url) as client, ThreadPoolExecutor(4) as pool:
        expected = client.inspect(PRODUCT, GOOD).score
        line_pid = int(httpx.get(f"{url}/metrics").text.split("\ngladad_worker_pid ")[1].split()[0].split(".")[0])
        waiting = [pool.submit(client.inspect, PRODUCT, GOOD) for _ in range(12)]
        os.kill(line_pid, signal.SIGKILL)
        assert {future.result().score for future in waiting} == {expected}
        assert "gladad_worker_restarts 1.0" in httpx.get(f"{url}/metrics").text
        assert count(station) == 13
        audit.verify(station.record)
    station.close()


# -- products ---------------------------------------------------------------------------------------------------


def test_versions_are_listed_switched_and_kept(model, detector, tmp_path, category, capsys):
    folder = tmp_path / "line"
    station = make_station(folder, model)
    other = Glad.from_pretrained(model)
    other.set_false_reject_rate(0.5)
    other.save_pretrained(tmp_path / "other")
    with served(station, threads=2) as url, Client(url) as client, ThreadPoolExecutor(4) as pool:
        path = category / "test/hole/000.png"
        client.add_golden(PRODUCT, path)
        before = client.inspect(PRODUCT, path)
        assert main(["station", "add", str(folder), PRODUCT, str(tmp_path / "other"), "--no-activate", "--warn-limit", "0.5"]) == 0
        load = [pool.submit(client.inspect, PRODUCT, path) for _ in range(20)]
        assert client.activate(PRODUCT, 2).active
        after = client.inspect(PRODUCT, path)
        assert (before.version, after.version) == (1, 2) and after.warn_limit == 0.5
        assert after.calibration_id != before.calibration_id
        assert {future.result().version for future in load} <= {1, 2}  # nothing was dropped
        assert [version.number for version in client.versions(PRODUCT)] == [1, 2]
        assert [version.active for version in client.versions(PRODUCT)] == [False, True]
        assert "rejected" in client.versions(PRODUCT)[0].promise
        client.activate(PRODUCT, 1)
        assert client.inspect(PRODUCT, path).score == before.score
        with pytest.raises(ServiceError) as problem:
            client.activate(PRODUCT, 3)
        assert problem.value.status == 404
        assert main(["station", "list", str(folder)]) == 0
        assert "2" in capsys.readouterr().out
        assert main(["audit", "verify", str(folder)]) == 0
        assert main(["audit", "export", str(folder), "-o", str(tmp_path / "all.csv")]) == 0
    station.close()


def test_a_changed_golden_part_stops_the_product(model, category, tmp_path):
    station = make_station(tmp_path / "line", model)
    assert main(["station", "golden", str(tmp_path / "line"), PRODUCT, str(category / "test/good")]) == 0
    with served(station, threads=2) as url, Client(url) as client:
        assert len(httpx.get(f"{url}/v1/products/{PRODUCT}/golden").json()) == 4
        assert httpx.post(f"{url}/v1/products/{PRODUCT}/golden/check").json() == {"golden_parts": 4, "stopped": None}
        client.inspect(PRODUCT, GOOD)
        with station.record.write() as connection:  # as if another library rounded otherwise
            connection.execute(update(goldens).values(score=goldens.c.score * 1.01))
        assert "golden part 000.png scores" in httpx.post(f"{url}/v1/products/{PRODUCT}/golden/check").json()["stopped"]
        with pytest.raises(ServiceError, match="golden part") as problem:
            client.inspect(PRODUCT, GOOD)
        assert problem.value.status == 409
    with served(station, threads=2) as url, Client(url) as client:  # it stays stopped
        assert client.products()[0].stopped
    station.close()


def test_changed_files_stop_the_product(model, tmp_path):
    station = make_station(tmp_path / "line", model)
    file = tmp_path / "line/products" / PRODUCT / "1/images.json"
    file.write_text(file.read_text() + " ")
    with served(station, threads=2) as url, Client(url) as client:
        assert "not those that were added" in str(client.products()[0].stopped)
    station.close()


@pytest.mark.parametrize("harm", ["pickle", "link", "program"])
def test_a_harmful_model_is_refused(model, tmp_path, capsys, harm):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    if harm == "pickle":
        (copy / "base/extra.bin").write_bytes(b"\x80\x04harm")
    elif harm == "link":
        (copy / "base/extra.json").symlink_to("/etc/passwd")
    else:
        (copy / "base/extra.py").write_text("harm()")
    assert main(["station", "add", str(tmp_path / "line"), PRODUCT, str(copy)]) == 1
    assert "base/extra" in capsys.readouterr().err
    assert not (tmp_path / "line/products").exists()


def test_weights_are_not_taken_for_a_pickle(tmp_path):
    """Whatever the length of their header, which is what the file begins with; and a pickle is one under any name."""
    path = tmp_path / "weights.safetensors"
    for length in range(0x200, 0x600, 8):
        path.write_bytes(save({}, {"name": "x" * (length - 28)}))
        assert int.from_bytes(path.read_bytes()[:8], "little") == length
        check_folder(tmp_path)
    path.write_bytes(pickle.dumps({"harm": 1}))
    with pytest.raises(DataError, match="looks like a pickle"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a..b"])
def test_names_that_are_paths_are_refused(model, tmp_path, name):
    assert main(["station", "add", str(tmp_path / "line"), name, str(model)]) == 1


def test_drift_suspends_the_promise(model, tmp_path):
    station = make_station(tmp_path / "line", model, parts_per_false_alarm=100)
    with served(station, threads=2) as url, Client(url) as client:
        assert client.products()[0].suspended is None
        for _ in range(400):
            made = client.inspect(PRODUCT, GOOD)  # the same part again and again is not what parts are like
            if client.products()[0].suspended:
                break
        assert "have become" in str(client.products()[0].suspended)
        assert not made.promise_suspended
        assert client.inspect(PRODUCT, GOOD).promise_suspended
        client.activate(PRODUCT, 1)
        assert client.products()[0].suspended is None
    station.close()


# -- jobs -------------------------------------------------------------------------------------------------------


def test_jobs(model, category, tmp_path):
    station = make_station(tmp_path / "line", model)
    (tmp_path / "line/data").mkdir()
    (tmp_path / "line/data/widget").symlink_to(category)
    (tmp_path / "line/data/light").mkdir()
    for number in range(6):
        draw_part(300 + number)[0].save(tmp_path / f"line/data/light/{number}.png")
    with served(station, threads=2) as url, Client(url) as client:
        folder = client.add_job("inspect", PRODUCT, "widget/test")
        seen = []
        with httpx.stream("GET", f"{url}/v1/jobs/{folder.id}/events", timeout=60) as events:
            seen = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
        assert seen[-1]["state"] == "done" and sum(seen[-1]["result"]["counts"].values()) == 8
        assert {each.request_id for each in client.decisions(product=PRODUCT)} == {folder.id}
        done = client.wait(client.add_job("evaluate", PRODUCT, "widget").id)
        assert done.state == "done" and 0 <= done.result["metrics"]["image_auroc"] <= 1, done
        done = client.wait(client.add_job("calibrate", PRODUCT, "light", note="new light").id)
        assert done.state == "done", done
        assert client.inspect(PRODUCT, GOOD).version == 2
        assert client.versions(PRODUCT)[1].note == f"new light; calibrate by job {done.id}"
        failed = client.wait(client.add_job("calibrate", PRODUCT, "widget/ground_truth").id)
        assert failed.state == "failed" and failed.problem
        for bad in ("../etc", "nothing", "widget/../widget", "/etc"):
            with pytest.raises(ServiceError):
                client.add_job("inspect", PRODUCT, bad)
        audit.verify(station.record)
    station.close()


@pytest.mark.slow
def test_a_fit_by_a_job(category, tmp_path):
    station = make_station(tmp_path / "line")
    (tmp_path / "line/data").mkdir()
    (tmp_path / "line/data/widget").symlink_to(category)
    with served(station, threads=2) as url, Client(url) as client:
        job = client.add_job("fit", "gear", "widget/train", base="memory-bank", settings={"image_size": 64, "false_reject_rate": 0.2})
        done = client.wait(job.id)
        assert done.state == "done", done
        assert client.inspect("gear", GOOD).version == 1
        cancelled = client.add_job("fit", "gear", "widget/train", settings={"image_size": 64, "steps": 5000})
        while client.job(cancelled.id).state == "waiting":
            time.sleep(0.05)
        client.cancel_job(cancelled.id)
        assert client.wait(cancelled.id).state == "cancelled"
        assert len(client.versions("gear")) == 1
    station.close()


def test_verdicts_make_a_better_version(model, category, tmp_path):
    station = make_station(tmp_path / "line", model)
    (tmp_path / "line/data").mkdir()
    (tmp_path / "line/data/widget").symlink_to(category)
    with served(station, threads=2) as url, Client(url) as client:
        client.add_golden(PRODUCT, category / "test/hole/000.png")
        nothing = client.wait(client.add_job("feedback", PRODUCT, "widget/train").id)
        assert nothing.state == "failed" and "called good" in nothing.problem
        for seed in range(4):  # parts with a stain, which is not bad
            stained = np.array(draw_part(700 + seed)[0])
            stained[30:36, 30:36] = 200
            client.judge(client.inspect(PRODUCT, png(stained)).id, "good")
        client.judge(client.inspect(PRODUCT, category / "test/hole/001.png").id, "bad")
        done = client.wait(client.add_job("feedback", PRODUCT, "widget/train").id)
        assert done.state == "done", done
        before, after = done.result["before"], done.result["after"]
        assert before["good"] == after["good"] == 4 + 4  # held out, and called good
        assert (before["bad"], done.result["confirmed_good"]) == (1, 4)
        assert after["false_rejects"] < before["false_rejects"]
        assert after["model_id"] == before["model_id"] and after["calibration_id"] != before["calibration_id"]
        assert done.result["offered"] and done.result["version"] == 2
        assert not client.versions(PRODUCT)[1].active  # offered, not forced
        client.activate(PRODUCT, 2)
    station.close()


def test_a_model_that_is_not_offered_leaves_nothing(model, tmp_path):
    """As if its process had found that it is worse just before the service ended."""
    station = make_station(tmp_path / "line", model)
    (tmp_path / "line/data/parts").mkdir(parents=True)
    job, folder = new_id(), tmp_path / "line/jobs"
    with served(station) as url, Client(url) as client:
        client.judge(client.inspect(PRODUCT, GOOD).id, "good")
        shutil.copytree(model, folder / job / "model")
        (folder / job / "result.json").write_text(json.dumps({"offered": False}))
        add_job(station, "feedback", columns={"id": job}, images="parts", mode="calibrate")
        done = client.wait(job)
        assert (done.state, done.result) == ("done", {"offered": False})
        assert len(client.versions(PRODUCT)) == 1 and not list(folder.iterdir())
    station.close()


def test_verdicts_are_trained_on(category, tmp_path):
    """From the present weights, by the latents that a fit of the service keeps: of the old images only those held out are there."""
    station = make_station(tmp_path / "line")
    data = tmp_path / "line/data"
    for folder in ("good", "held"):
        (data / folder).mkdir(parents=True)
    for number in range(25):
        draw_part(number)[0].save(data / f"good/{number}.png")
    small = add_job(station, "fit", images="good", base="lite", settings=TINY | {"false_reject_rate": 0.2, "training.steps": 20})
    with served(station, threads=2) as url, Client(url) as client:
        assert client.wait(small).state == "done"
        client.add_golden(PRODUCT, category / "test/hole/000.png")
        held_out = Glad.from_pretrained(tmp_path / f"line/products/{PRODUCT}/1")._fitted.seen.held_out
        for path in (data / "good").iterdir():
            if file_digest(path) in held_out:
                shutil.copyfile(path, data / "held" / path.name)
        for seed in range(5):
            stained = np.array(draw_part(700 + seed)[0])
            stained[30:36, 30:36] = 200
            client.judge(client.inspect(PRODUCT, png(stained)).id, "good")
        done = client.wait(client.add_job("feedback", PRODUCT, "held", mode="continue").id)
        assert done.state == "done", done
        before, after = done.result["before"], done.result["after"]
        assert before["good"] == after["good"] == len(held_out) + 1  # four of the confirmed ones were trained on
        assert after["model_id"] != before["model_id"]
        assert done.result["offered"] is (not done.result["golden_changed"] and after["false_rejects"] <= before["false_rejects"])
        assert len(client.versions(PRODUCT)) == 1 + done.result["offered"]
    station.close()


# -- kill -9 ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_the_server_is_killed(model, tmp_path):
    station = make_station(tmp_path / "line", model)
    (tmp_path / "line/data").mkdir()
    (tmp_path / "line/data/parts").mkdir()
    for number in range(30):
        draw_part(number)[0].save(tmp_path / f"line/data/parts/{number}.png")
    acknowledged: set[str] = set()
    stop = threading.Event()
    port = free_port()

    def load() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            while not stop.is_set():
                try:
                    answer = http.post(INSPECT, content=GOOD)
                    if answer.status_code == 200:
                        acknowledged.add(answer.json()["id"])
                except httpx.HTTPError:
                    time.sleep(0.05)

    threads = [threading.Thread(target=load) for _ in range(4)]
    server = start(tmp_path / "line", port)
    with Client(f"http://127.0.0.1:{port}") as client:
        job = client.add_job("inspect", PRODUCT, "parts").id
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(1.0)
        server.kill()
        server.wait()
        server = start(tmp_path / "line", port)
    stop.set()
    for thread in threads:
        thread.join()
    with Client(f"http://127.0.0.1:{port}") as client:
        assert client.wait(job).result["counts"]
    server.terminate()
    server.wait()
    with station.record.read() as connection:
        rows = connection.execute(select(table.c.id, table.c.request_id, table.c.image_name)).all()
    assert acknowledged and acknowledged <= {row.id for row in rows}
    assert sorted(row.image_name for row in rows if row.request_id == job) == sorted(f"{number}.png" for number in range(30))
    audit.verify(station.record)
    station.close()


def test_appearance_is_recorded(client):
    made = client.inspect(PRODUCT, GOOD)
    assert made.brightness == pytest.approx(as_pixels(GOOD).mean() / 255, abs=0.02)


# -- what the console asks for ----------------------------------------------------------------------------------


def test_data_folders(http, station):
    assert http.get("/v1/data").json() == []
    for number in range(3):
        sent = http.put("/v1/data", params={"folder": "gear/good", "name": f"{number}.png"}, content=png(draw_part(number % 2)[0]))
        assert sent.status_code == 204
    assert http.get("/v1/data").json() == [{"name": "gear/good", "images": 3}]
    found = http.get("/v1/data/check", params={"folder": "gear/good"}).json()
    assert found["findings"][0]["files"] == ["2.png"]  # the same picture as 0.png
    second, folder = {"folder": "gear/good", "name": "1.png"}, {"folder": "gear/good"}
    assert http.get("/v1/data/names", params=folder).json() == ["0.png", "1.png", "2.png"]
    shown = http.get("/v1/data/image", params=second)
    assert Image.open(io.BytesIO(shown.content)).size == (72, 72)
    for params in ({"folder": "../x", "name": "a.png"}, {"folder": "x", "name": "../a.png"}, {"folder": "x", "name": "a.txt"}):
        assert http.put("/v1/data", params=params, content=GOOD).status_code == 422
    assert http.put("/v1/data", params={"folder": "x", "name": "a.png"}, content=b"no").status_code == 415
    assert http.delete("/v1/data", params={**folder, "name": "0.png"}).status_code == 204
    assert http.get("/v1/data/image", params=second).content == shown.content  # whatever else comes and goes
    assert http.get("/v1/data/image", params={**folder, "name": "0.png"}).status_code == 404
    assert http.get("/v1/data/image", params={**folder, "name": "../2.png"}).status_code == 404
    shutil.rmtree(station.folder / "data")


def test_limits_make_a_version(model, tmp_path, detector):
    station = make_station(tmp_path / "line", model)
    with served(station, threads=2) as url, Client(url) as client, httpx.Client(base_url=url) as http:
        one = client.inspect(PRODUCT, GOOD)
        body = {"model_of": 1, "warn_limit": one.score / 3, "reject_limit": one.score / 2, "note": "stricter"}
        made = http.post(f"/v1/products/{PRODUCT}/versions", json=body).json()
        assert (made["number"], made["active"], made["note"]) == (2, False, "stricter")
        assert http.post(f"/v1/products/{PRODUCT}/versions", json=body | {"model_of": 9}).status_code == 404
        assert http.post(f"/v1/products/{PRODUCT}/versions", json=body | {"warn_limit": 5.0}).status_code == 422
        client.activate(PRODUCT, 2)
        two = client.inspect(PRODUCT, GOOD)
        assert two.score == one.score and (one.decision, two.decision) == ("accept", "reject")
        assert "none" in client.versions(PRODUCT)[1].promise or two.reject_limit >= 1
        weights = [next((tmp_path / f"line/products/{PRODUCT}/{number}").rglob("lite.safetensors")) for number in (1, 2)]
        if weights[0].stat().st_size >= 2**20:
            assert weights[0].samefile(weights[1])
        found = http.get(f"/v1/products/{PRODUCT}/versions/1/calibration").json()
        threshold = detector.calibration_.threshold
        assert found["scores"] == [score / threshold.value for score in detector.calibration_.scores]
        assert (found["images"], found["promised_rate"]) == (threshold.n, threshold.promised_rate)
        client.judge(two.id, "good")
        scores = http.get(f"/v1/products/{PRODUCT}/scores").json()
        assert [(each["id"], each["verdict"]) for each in scores] == [(two.id, "good"), (one.id, None)]
        periods = http.get(f"/v1/products/{PRODUCT}/periods", params={"days": 1, "count": 24}).json()
        assert len(periods) == 24 and (periods[-1]["accept"], periods[-1]["reject"]) == (1, 1)
        assert sum(each["accept"] + each["reject"] for each in periods) == 2
    station.close()


def test_commands_do_not_make_stations_by_mistake(tmp_path, capsys):
    for command in (["audit", "verify"], ["station", "list"], ["station", "key"]):
        arguments = [*command, str(tmp_path / "typo"), *(["robot"] if command[1] == "key" else [])]
        assert main(arguments) == 1
        assert "is not a station" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
