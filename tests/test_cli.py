"""Every command, in this process, with good input and with bad."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY as TINY_SETTINGS
from conftest import TINY_FLAGS, draw_part, write_category
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tiny_base import tiny_base  # noqa: F401 (a fixture)

from gladad import __version__
from gladad.cli import demo
from gladad.cli.console import Bars, RateColumn, bars
from gladad.cli.main import main
from gladad.core.images import load_image
from gladad.core.records import Prediction
from gladad.detector.glad import Glad
from gladad.models.registry import make_settings

NARROW = ("--batch-size", "8", "--set", "widths=[32, 32]")
TINY = ["--steps", "4", *TINY_FLAGS, *NARROW, "--calibration", "held-out", "-q"]


class Result:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err

    @property
    def line(self) -> str:
        """The one line on standard error."""
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err.rstrip("\n")


@pytest.fixture
def gladad(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line and catch what it prints, whoever prints it."""
    monkeypatch.delenv("GLADAD_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Result(status, out, err)

    return run


def truncated(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_part(0)[0].save(path)
    path.write_bytes(path.read_bytes()[:500])
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ good input


def test_fit_and_use(gladad, category, tmp_path):
    model = tmp_path / "models" / "widget"
    result = gladad("fit", category, "-o", model, "--steps", 8, *TINY_FLAGS, "--seed", 3, "--false-reject-rate", 0.2)
    assert (result.status, result.err) == (0, "")
    assert "16 good images" in result.out and "like the 16 held-out ones are rejected" in result.out and "no guarantee" in result.out
    assert names(model.parent) == ["widget"]
    loaded = Glad.from_pretrained(model)
    assert loaded.settings == make_settings("lite", TINY_SETTINGS | {"training.steps": 8, "seed": 3, "false_reject_rate": 0.2})
    assert loaded.inspect(category / "test/hole/000.png").pred_score > 1


def test_the_same_fit_gives_the_same_model(gladad, category, tmp_path):
    for name in ("a", "b"):
        assert gladad("fit", category / "train/good", "-o", tmp_path / name, *TINY).status == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files and all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_base_of_the_papers_form(gladad, category, tiny_base, tmp_path):  # noqa: F811
    """Its libraries like to talk; none of it may be heard."""
    options = ["--base", tiny_base / "sd", "--features", tiny_base / "dino", "--steps", 2, "--image-size", 64, "--calibration", "held-out"]
    options += ["--batch-size", 2, "--set", "training.pool=4", "--set", "reconstruction.num_steps=5"]
    result = gladad("fit", category, "-o", tmp_path / "model", *options)
    assert (result.status, result.err) == (0, "")
    result = gladad("predict", tmp_path / "model", category / "test/good/000.png", "-o", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert "1 inspected" in result.out


def test_a_model_is_fitted_anew_in_its_place(gladad, category, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    assert gladad("fit", category, "-o", copy, *TINY).status == 0
    assert Glad.from_pretrained(copy).settings.training.steps == 4
    assert names(tmp_path) == ["model"]


def test_predict(gladad, model, detector, category, tmp_path):
    out = tmp_path / "out"
    result = gladad("predict", model, category / "test", "-o", out)
    assert (result.status, result.err) == (0, "")
    assert "8 inspected" in result.out and "0 skipped" in result.out and "s each" in result.out
    assert names(out) == ["masks", "overlays", "predictions.csv", "predictions.jsonl"]
    rows = records(out)
    assert [Path(str(row["image_path"])).relative_to(category / "test").as_posix() for row in rows] == [
        f"{kind}/{index:03}.png" for kind in ("good", "hole") for index in range(4)
    ]
    for row in rows:
        expected = detector.inspect(str(row["image_path"]), reconstruct=False)
        same = {key: value for key, value in expected.to_record().items() if key not in {"seconds", "regions"}}
        assert {key: row[key] for key in same} == pytest.approx(same)
        assert len(row["regions"]) == len(expected.regions)
        np.testing.assert_array_equal(load_image(out / str(row["mask"])).max(axis=2) == 255, expected.pred_mask)
        assert load_image(out / str(row["overlay"])).shape == (72, 72, 3)
    table = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    for line, row in zip(table, rows, strict=True):  # the old names stay for one release
        assert line["image_path"] == line["image"] == row["image_path"] == row["image"]
        assert float(line["pred_score"]) == float(line["score"]) == row["pred_score"] == row["score"]
        assert int(line["pred_label"]) == row["pred_label"] and line["label"] == row["label"] == ("normal", "anomalous")[row["pred_label"]]
        assert line["model_id"] == row["model_id"]
    assert [int(line["regions"]) for line in table] == [len(row["regions"]) for row in rows]


def test_parts_that_are_rejected_as_a_whole_are_told(gladad, model, category, tmp_path):
    blind = shutil.copytree(model, tmp_path / "model")
    calibration = json.loads((blind / "calibration.json").read_text())
    (blind / "calibration.json").write_text(json.dumps(calibration | {"pixel_threshold": 1e6}))  # so no place is ever marked
    for path, expected in ((model, False), (blind, True)):
        result = gladad("predict", path, category / "test/hole", "-o", tmp_path / "out", "--no-pictures")
        assert result.status == 0 and "4 rejected" in result.out
        assert ("4 rejected as a whole" in result.out) == expected


def test_predict_again_into_a_folder_inside_the_images(gladad, model, category, tmp_path):
    photos = shutil.copytree(category / "test/good", tmp_path / "photos")
    for _ in range(2):
        assert gladad("predict", model, photos, "-o", photos / "out", "-q").status == 0
        assert len(records(photos / "out")) == 4
    result = gladad("predict", model, photos / "out", "-o", photos / "out")
    assert result.status == 1 and "no images but the results" in result.line


def test_predict_images_of_the_same_name(gladad, model, category, tmp_path):
    for folder in ("a", "b"):
        for suffix in ("png", "bmp"):
            path = tmp_path / folder / f"x.{suffix}"
            path.parent.mkdir(exist_ok=True)
            draw_part(1)[0].save(path)
    out = tmp_path / "out"
    assert gladad("predict", model, tmp_path / "a", tmp_path / "b/x.png", tmp_path / "b/x.bmp", "-o", out, "-q").status == 0
    assert sorted(p.relative_to(out).as_posix() for p in (out / "masks").rglob("*.png")) == [
        f"masks/{folder}/x.{suffix}.png" for folder in ("a", "b") for suffix in ("bmp", "png")
    ]


def test_predict_without_pictures_and_with_another_rate(gladad, model, category, tmp_path):
    result = gladad("predict", model, category / "test/good", "-o", tmp_path / "out", "--no-pictures", "--false-reject-rate", 0.5)
    assert result.status == 0
    assert names(tmp_path / "out") == ["predictions.csv", "predictions.jsonl"]
    strict = records(tmp_path / "out")
    assert gladad("predict", model, category / "test/good", "-o", tmp_path / "out", "--no-pictures").status == 0
    assert all(float(str(a["pred_score"])) >= float(str(b["pred_score"])) for a, b in zip(strict, records(tmp_path / "out"), strict=True))


def test_a_damaged_image_among_others_is_skipped(gladad, model, category, tmp_path):
    photos = shutil.copytree(category / "test/good", tmp_path / "photos")
    broken = truncated(photos / "001b.png")
    result = gladad("predict", model, photos, "-o", tmp_path / "out")
    assert result.status == 0
    assert result.line.startswith(f"skipped: {broken}: ")
    assert "4 inspected" in result.out and "1 skipped" in result.out
    row = records(tmp_path / "out")[2]
    assert row["image"] == row["image_path"] == str(broken) and "damaged or truncated" in str(row["error"])
    assert set(row) == {"image", "image_path", "error"}
    assert len(list((tmp_path / "out/masks").iterdir())) == 4


def test_an_image_without_a_finite_score_among_others_is_skipped(gladad, model, category, tmp_path, monkeypatch):
    inspect, spoilt = Glad.inspect, category / "test/good/001.png"

    def spoil(self: Glad, image: np.ndarray, **options: object) -> Prediction:
        found = inspect(self, image, **options)
        return replace(found, pred_score=np.nan) if np.array_equal(image, load_image(spoilt)) else found

    monkeypatch.setattr(Glad, "inspect", spoil)
    result = gladad("predict", model, category / "test/good", "-o", tmp_path / "out")
    assert result.status == 0 and result.line.startswith(f"skipped: {spoilt}: pred_score is NaN or infinite")
    assert "3 inspected" in result.out and "1 skipped" in result.out
    rows = records(tmp_path / "out")
    assert [row["image_path"] for row in rows if "error" in row] == [str(spoilt)] and "pred_score is NaN" in str(rows[1]["error"])
    assert len(list((tmp_path / "out/masks").iterdir())) == 3
    result = gladad("predict", model, spoilt, "-o", tmp_path / "none")
    assert result.status == 1 and "none of the 1 images" in result.err and not (tmp_path / "none").exists()


def test_evaluate(gladad, model, category, tmp_path):
    out = tmp_path / "report"
    result = gladad("evaluate", model, category, "-o", out)
    assert (result.status, result.err) == (0, "")
    assert names(out) == ["index.html", "pictures", "predictions.csv", "report.json", "report.md"]
    metrics = json.loads((out / "report.json").read_text())["metrics"]
    assert metrics["image_auroc"] > 0.9 and "pixel_aupro" in metrics
    assert "image auroc" in result.out and "95 % interval" in result.out and "normal: 4" in result.out
    assert "widget: evaluation" in (out / "index.html").read_text()


def test_evaluate_reports_what_it_skips(gladad, model, tmp_path):
    category = write_category(tmp_path / "widget", train=0, test=2)
    truncated(category / "test/hole/999.png")
    result = gladad("evaluate", model, category, "-o", tmp_path / "out", "-q")
    assert (result.status, result.out) == (0, "")
    assert result.line.startswith("skipped: ") and "999.png" in result.line


def test_info(gladad, model, detector):
    result = gladad("info", model)
    assert result.status == 0 and "calibration.threshold.value" in result.out
    result = gladad("info", model, "--json")
    assert json.loads(result.out) == json.loads(json.dumps(detector.describe()))


def test_info_tells_settings_as_the_training_resolved_them(gladad, category, tmp_path):
    """Except the rate, which may have been chosen anew since; and whether turned copies pay."""
    flags = ("--set", "reconstruction.adaptive=true", "--set", "reconstruction.timesteps=[600, 400]")
    assert gladad("fit", category, "-o", tmp_path / "model", *TINY, *flags).status == 0
    assert gladad("calibrate", tmp_path / "model", category, "--false-reject-rate", "0.3", "-q").status == 0
    described = json.loads(gladad("info", tmp_path / "model", "--json").out)
    resolved = described["config"]["settings"]
    assert not described["settings"]["reconstruction"]["step_thresholds"]
    assert len(resolved["reconstruction"]["step_thresholds"]) == 2 and resolved["false_reject_rate"] == 0.01
    told = dict(line.split(maxsplit=1) for line in gladad("info", tmp_path / "model").out.splitlines() if line.startswith(" settings."))
    assert told["settings.false_reject_rate"].strip() == "0.3"
    assert len(told) > 20


def test_demo(tmp_path):
    cells = tmp_path / "cells"
    (cells / "images").mkdir(parents=True)
    lines = []
    for index in range(36):
        bad = index >= 24
        draw_part(index, defective=bad)[0].save(cells / "images" / f"cell{index:04}.png")
        lines.append(f"images/cell{index:04}.png  {float(bad)}                 mono")
    lines += ["images/missing.png  0.3333333333333333  mono", "images/missing.png  1.0  poly"]
    (cells / "labels.csv").write_text("\n".join(lines) + "\n")
    settings = make_settings("lite", TINY_SETTINGS | {"training.steps": 8})
    _, page = demo.run(tmp_path / "out", cells, settings=settings)
    assert page == tmp_path / "out/index.html"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["counts"]["normal"] == 12 and report["counts"]["anomalous"] == 6
    assert report["metrics"]["image_auroc"] > 0.9


def test_the_demo_judges_only_what_it_has_not_seen():
    pytest.importorskip("elpv_dataset")
    train, test = demo.solar_cells()
    assert (len(train), len(test)) == (400, 300)
    assert sum(sample.gt_label for sample in test) == 150
    assert not {sample.image_path for sample in test} & set(train)
    assert all(path.is_file() for path in [*train, *(sample.image_path for sample in test)])
    assert (train, test) == demo.solar_cells()
    assert (train, test) != demo.solar_cells(seed=1)


def test_version_and_help(gladad):
    assert gladad("--version").out.strip() == f"gladad {__version__}"
    result = gladad("--help")
    assert result.status == 0 and all(command in result.out for command in ("fit", "predict", "evaluate", "info", "demo"))


# ------------------------------------------------------------------------------------------------------- bad input


def empty(root: Path) -> Path:
    root.mkdir()
    return root


def unreadable(root: Path) -> Path:
    shutil.copytree(write_category(root / "widget", train=8, test=1) / "train/good", root / "photos")
    (root / "photos/000.png").write_bytes(b"this is no image")
    return root / "photos"


def one_pixel(root: Path) -> Path:
    photos = unreadable(root)
    Image.new("RGB", (1, 1)).save(photos / "000.png")
    return photos


def cut_off(root: Path) -> Path:
    photos = unreadable(root)
    truncated(photos / "000.png")
    return photos


def too_few(root: Path) -> Path:
    return write_category(root, train=3, test=1)


FIT_ERRORS: dict[str, tuple[Callable[[Path], Path], list[str], str]] = {
    "empty folder": (empty, [], "no images to learn from"),
    "missing folder": (lambda root: root / "nowhere", [], "no such folder"),
    "a file": (lambda root: Path(__file__), [], "is a single file"),
    "no image": (unreadable, [], "000.png: not an image"),
    "truncated image": (cut_off, [], "000.png: cannot be read, the file is damaged or truncated"),
    "1x1 image": (one_pixel, [], "000.png: 1x1 pixels is too small"),
    "too few images": (too_few, [], "good images are needed, there are 3"),
    "test images": (lambda root: write_category(root) / "test", [], "test images are not for learning"),
    "rate": (write_category, ["--false-reject-rate", "0.7"], "false_reject_rate: input should be less than or equal to 0.5"),
    "steps": (write_category, ["--steps", "0"], "training.steps: input should be greater than or equal to 1"),
    "steps and minutes": (write_category, ["--minutes", "1"], "training.steps and training.minutes: give one of them"),
    "size": (write_category, ["--image-size", "10"], "image_size"),
    "textures": (write_category, ["--textures", "/nowhere/textures"], "no such folder of textures"),
    "base": (write_category, ["--base", "/nowhere/base"], "/nowhere/base"),
}


@pytest.mark.parametrize("case", FIT_ERRORS)
def test_fit_refuses(gladad, tmp_path, case):
    make, options, message = FIT_ERRORS[case]
    images = make(tmp_path / "data")
    (tmp_path / "models").mkdir()
    result = gladad("fit", images, "-o", tmp_path / "models/m", "--image-size", 64, "--steps", 4, *options)
    assert result.status == 1 and result.out == ""
    assert result.line.startswith("error: ") and message in result.line
    assert names(tmp_path / "models") == []


def test_a_bad_target_is_refused_before_the_work(gladad, category, tmp_path, monkeypatch):
    monkeypatch.setattr(Glad, "fit", lambda *args, **kwargs: pytest.fail("worked for nothing"))
    file = tmp_path / "file"
    file.write_text("mine")
    result = gladad("fit", category, "-o", file)
    assert result.status == 1 and "is not a folder" in result.line
    result = gladad("fit", category, "-o", category)
    assert result.status == 1 and "will not be overwritten" in result.line
    result = gladad("fit", category, "-o", file / "model")
    assert result.status == 1 and "cannot be written" in result.line
    assert file.read_text() == "mine" and names(tmp_path) == ["file"]


def test_predict_refuses(gladad, model, category, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    broken = truncated(tmp_path / "broken/1.png")
    image = category / "test/good/000.png"
    for arguments, message in [
        ((tmp_path / "nowhere", image, "-o", out), "no such folder; give the folder that 'gladad fit' wrote"),
        ((category, image, "-o", out), "is not a gladad model"),
        ((model, tmp_path / "nowhere.png", "-o", out), "nowhere.png: no such file or folder"),
        ((model, tmp_path / "empty", "-o", out), "no images in this folder"),
        ((model, image, "-o", tmp_path / "file"), "is a file"),
        ((model, image, "-o", tmp_path / "file/out"), "cannot be written"),
        ((model, image, "-o", out, "--false-reject-rate", "0"), "false_reject_rate"),
    ]:
        result = gladad("predict", *arguments)
        assert result.status == 1 and result.out == ""
        assert result.line.startswith("error: ") and message in result.line
    result = gladad("predict", model, broken, "-o", out)
    assert result.status == 1
    first, second = result.err.splitlines()
    assert first.startswith("skipped: ") and second.startswith("error: none of the 1 images")
    assert not out.exists() and names(tmp_path) == ["broken", "empty", "file"]


def test_evaluate_and_info_refuse(gladad, model, category, tmp_path):
    result = gladad("evaluate", model, category / "train/good", "-o", tmp_path / "out")
    assert result.status == 1 and "no labels" in result.line
    result = gladad("evaluate", tmp_path, category, "-o", tmp_path / "out")
    assert result.status == 1 and "is not a gladad model" in result.line
    result = gladad("info", tmp_path)
    assert result.status == 1 and "is not a gladad model" in result.line
    assert names(tmp_path) == []


@pytest.mark.parametrize("file", ["model.json", "calibration.json", "base/lite.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "other"])
def test_damaged_models(gladad, model, tmp_path, file, damage):
    copy = shutil.copytree(model, tmp_path / "model")
    if damage == "missing":
        (copy / file).unlink()
    else:
        (copy / file).write_text("" if damage == "empty" else '{"format": "gladad-model", "format_version": 1}')
    result = gladad("info", copy)
    assert result.status == 1 and result.line.startswith("error: ") and "unexpected" not in result.line


def test_the_demo_without_its_data(gladad, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "elpv_dataset", None)
    result = gladad("demo", "-o", tmp_path / "out")
    assert result.status == 1 and result.line.endswith("pip install 'gladad[demo]'")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["fit"], ["fit", "x"], ["predict", "m", "-o", "x"], ["fit", "x", "-o", "y", "--seed", "z"]]
)
def test_wrong_usage(gladad, arguments):
    result = gladad(*arguments)
    assert result.status == 2 and "Usage" in result.err


# ----------------------------------------------------------------------------------------- when the world intervenes


def test_interrupted_fit(gladad, category, tmp_path, monkeypatch):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gladad.models.feature_diffusion.family.train_models", interrupt)
    result = gladad("fit", category, "-o", tmp_path / "model")
    assert (result.status, result.line) == (130, "interrupted; no result was written")
    assert names(tmp_path) == []


def test_interrupted_predict(gladad, model, category, tmp_path, monkeypatch):
    inspect, calls = Glad.inspect, []

    def interrupt(self: Glad, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return inspect(self, *args, **kwargs)

    monkeypatch.setattr(Glad, "inspect", interrupt)
    result = gladad("predict", model, category / "test", "-o", tmp_path / "out")
    assert (result.status, result.line) == (130, "interrupted; no result was written")
    assert names(tmp_path) == []


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_what_other_threads_do_ends_before_the_folder_is_removed(gladad, model, category, tmp_path, monkeypatch, command):
    inspect, report, started, there = Glad.inspect, Bars.__call__, threading.Semaphore(0), []

    def slow(self: Glad, *args: object, **kwargs: object) -> object:
        started.release()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)  # the interrupt comes meanwhile
            there.append(any(tmp_path.glob(".gladad-*")))
        return inspect(self, *args, **kwargs)

    def interrupt(self: Bars, stage: str, done: int, total: int) -> None:
        if done == 2:
            for _ in range(4):
                assert started.acquire(timeout=60)
            raise KeyboardInterrupt
        report(self, stage, done, total)

    monkeypatch.setattr(Glad, "inspect", slow)
    monkeypatch.setattr(Glad, "workers", 2)
    monkeypatch.setattr(Bars, "__call__", interrupt)
    images = category / "test" if command == "predict" else category
    result = gladad(command, model, images, "-o", tmp_path / "out")
    assert (result.status, result.line) == (130, "interrupted; no result was written")
    assert len(there) > 2 and all(there)
    assert names(tmp_path) == []


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_during_fit(gladad, category, tmp_path, monkeypatch):
    monkeypatch.setattr("gladad.models.feature_diffusion.model.save_tensors", full_disk)
    result = gladad("fit", category, "-o", tmp_path / "model", *TINY)
    assert result.status == 1 and "No space left on device" in result.line and "nothing was changed" in result.line
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["gladad.core.storage.os.fsync", "PIL.Image.Image.save"])
def test_full_disk_during_predict(gladad, model, category, tmp_path, monkeypatch, place):
    monkeypatch.setattr(place, full_disk)
    result = gladad("predict", model, category / "test/good", "-o", tmp_path / "out")
    assert result.status == 1 and "No space left on device" in result.line
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("odd\nthing"), "unexpected ValueError: odd thing (set GLADAD_DEBUG=1 to see where)"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: No space left on device"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_any_other_error_is_one_line_too(gladad, category, tmp_path, monkeypatch, error, message):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Glad, "fit", fail)
    result = gladad("fit", category, "-o", tmp_path / "model")
    assert result.status == 1 and result.line.startswith(f"error: {message}")


def test_debugging_shows_where(capfd, category, tmp_path, monkeypatch):
    monkeypatch.setenv("GLADAD_DEBUG", "1")
    assert main(["info", str(tmp_path)]) == 1
    assert "Traceback" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------------- progress


def test_bars_appear_for_slow_stages_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gladad.cli.console.time.monotonic", lambda: now[0])
    with Progress(RateColumn(), console=Console(quiet=True)) as progress:
        report = Bars(progress)
        for stage, seconds in (("quick", 0.01), ("slow", 0.5), ("quick", 0.01), ("slow", 0.5)):
            for done in range(1, 11):
                now[0] += seconds
                report(stage, done, 10)
        assert [(task.description, task.completed, task.total) for task in progress.tasks] == [("slow", 10, 10)] * 2
        assert progress.columns[0].render(progress.tasks[0]).plain in {"", "1"} or "s" in str(progress.columns[0].render(progress.tasks[0]))


def test_no_bars_where_nobody_looks(capfd):
    with bars(quiet=False) as report:
        for done in range(1, 4):
            report("stage", done, 3)
    assert capfd.readouterr() == ("", "")
