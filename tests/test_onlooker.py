"""What people see of a training while it runs: losses, examples, and that nobody's looking on changes a model."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import httpx
import numpy as np
import pytest
from conftest import TINY, draw_part
from PIL import Image
from service_base import add_job, make_station, served
from test_training_loop import CONFIG, Regression

from gladad.core.records import Watch
from gladad.detector.glad import Glad
from gladad.service.onlooker import POINTS, Curve, Onlooker
from gladad.training.loop import TrainingRun, train

QUICK = TINY | {"memory": 100, "training.pool": 8, "false_reject_rate": 0.3}


class Looking:
    def __init__(self) -> None:
        self.losses: list[tuple[str, int, float]] = []
        self.pictures: dict[str, np.ndarray] = {}

    def loss(self, stage, step, value):
        self.losses.append((stage, step, value))

    def show(self, stage, step, pictures):
        self.pictures |= pictures


def test_a_curve_is_bounded_and_keeps_means():
    values = np.random.default_rng(0).random(POINTS * 5 + 3)
    curve = Curve()
    for count, value in enumerate(values, 1):
        curve.add(value)
        points = curve.points()
        assert len(points) <= POINTS and points[-1][0] == count
    start = 0
    for end, mean in points:
        assert mean == pytest.approx(values[start:end].mean(), rel=1e-3)
        start = end
    assert curve.width == 8


def test_what_cannot_be_shown_fails_no_job_and_is_logged_once(tmp_path, caplog):
    told = []
    (tmp_path / "examples").write_text("in the way of the folder")
    onlooker = Onlooker(tmp_path, lambda **line: told.append(line))
    with caplog.at_level("WARNING", "gladad.service.jobs"):
        for step in (1, 2):
            onlooker.show("line", step, {"line": np.zeros((2, 2, 3), np.uint8)})
    assert len(caplog.records) == 1 and "examples of the training are not shown" in caplog.text
    assert told[-1] == {"examples": []}


def test_looking_on_changes_nothing(tmp_path):
    for number in range(8):
        draw_part(number)[0].save(tmp_path / f"{number}.png")
    settings = QUICK | {"training.steps": 6, "calibration": "cross-fit"}  # whose other trainings are not looked at
    looking = Looking()
    assert isinstance(looking, Watch)
    watched, plain = (Glad.from_base("lite", settings=settings).fit(tmp_path, run=TrainingRun(watch=each)) for each in (looking, None))
    assert watched.model_id == plain.model_id and watched.calibration_id == plain.calibration_id
    stages = {"scale 1: denoiser": 6, "picture decoder": 5, "scale 2: denoiser": 6}
    assert [(stage, step) for stage, step, _ in looking.losses] == [
        (stage, step) for stage, count in stages.items() for step in range(1, count + 1)
    ]
    assert all(np.isfinite(value) for _, _, value in looking.losses)
    names = ["good-part-and-drawing", *(f"input-and-reconstruction-{number}" for number in (1, 2, 3))]
    assert list(looking.pictures) == names
    assert all(picture.shape == (64, 128, 3) and picture.dtype == np.uint8 for picture in looking.pictures.values())


def test_the_loop_tells_its_losses_and_shows_its_examples(tmp_path):
    looking = Looking()
    task = Regression()
    task.examples = lambda: {"line": np.zeros((2, 2, 3), np.uint8)}  # type: ignore[method-assign]
    losses = train(task, CONFIG, TrainingRun(folder=tmp_path, tracker="none", watch=looking), stage="line")
    assert [value for _, _, value in looking.losses] == losses and list(looking.pictures) == ["line"]
    one = Looking()
    run = replace(TrainingRun(watch=one), folder=None)
    assert run.part("all").watch is one and run.part("fold-1", watched=False).watch is None


def test_a_job_tells_losses_and_shows_examples(category, tmp_path):
    station = make_station(tmp_path / "line")
    (station.folder / "data").mkdir()
    (station.folder / "data/widget").symlink_to(category)
    job = add_job(station, "fit", "gear", images="widget/train", base="lite", settings=QUICK | {"training.steps": 12}, activate=False)
    with served(station) as url:
        picture, last = None, None
        with httpx.stream("GET", f"{url}/v1/jobs/{job}/events", timeout=120) as events:
            for line in events.iter_lines():
                if not line.startswith("data: "):
                    continue
                last = json.loads(line.removeprefix("data: "))
                shown = (last["progress"] or {}).get("examples", [])
                if shown and last["state"] == "running":
                    answer = httpx.get(f"{url}/v1/jobs/{job}/examples/{shown[-1]['name']}.png")
                    picture = Image.open(io.BytesIO(answer.content)) if answer.status_code == 200 else picture
        assert last["state"] == "done", last["problem"]
        curve = last["progress"]["losses"]["scale 1: denoiser"]
        assert [step for step, _ in curve] == list(range(1, 13)) and np.isfinite([value for _, value in curve]).all()
        assert picture is not None and picture.size[0] == 2 * picture.size[1]
        for name, status in [("input-and-reconstruction-1", 404), ("..%2f..%2fstation", 404), (".hidden", 422)]:
            assert httpx.get(f"{url}/v1/jobs/{job}/examples/{name}.png").status_code == status
    station.close()
