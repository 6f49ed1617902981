"""Maps that are kept, reports that are scored again from them, and the commands that do it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_category
from reports import FILES, Page, mislabelled

from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError
from gladad.decision.conformal import conformal_threshold
from gladad.detector.glad import Glad
from gladad.evaluation.rescoring import rescore
from gladad.evaluation.run import evaluate, write_report
from gladad.evaluation.stored_maps import KeptMap, load_map, map_file, save_map
from gladad.metrics import image as metrics


@pytest.fixture
def copy(report_folder: Path, tmp_path: Path) -> Path:
    """A report that may be changed."""
    return Path(shutil.copytree(report_folder, tmp_path / "report"))


# --------------------------------------------------------------------------------------------- kept maps and rescoring


@pytest.mark.parametrize("masked", [True, False])
def test_kept_maps_are_exact(tmp_path, masked):
    rng = np.random.default_rng(0)
    mask = rng.random((7, 9)) > 0.5 if masked else None
    kept = KeptMap(rng.normal(size=(7, 9)).astype(np.float32), mask, [("input", b"\xff\xd8\x00"), ("map", b"")])
    save_map(tmp_path / "maps", 12, kept)
    again = load_map(tmp_path / "maps", 12)
    assert again.anomaly_map.dtype == np.float32 and again.anomaly_map.tobytes() == kept.anomaly_map.tobytes()
    assert (again.mask is None) == (mask is None) and (mask is None or np.array_equal(again.mask, mask))
    assert again.pictures == kept.pictures
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["000012.npz"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_maps_that_are_not_finite_are_named(tmp_path, value):
    save_map(tmp_path, 3, KeptMap(np.full((7, 9), value, np.float32), None))
    with pytest.raises(DataError, match=r"000003.npz: damaged .*not finite"):
        load_map(tmp_path, 3)


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"", lambda data: data[:-40], lambda data: b"not a zip file"])
def test_damaged_maps_are_named(tmp_path, damage):
    save_map(tmp_path, 3, KeptMap(np.zeros((7, 9), np.float32), None))
    path = map_file(tmp_path, 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"000003.npz: damaged .*--keep-maps"):
        load_map(tmp_path, 3)
    with pytest.raises(DataError, match=r"000004.npz: missing; .*--keep-maps"):
        load_map(tmp_path, 4)


@pytest.mark.parametrize("name", ["report_folder", "report_folder_without_masks"])
def test_scored_again_everything_is_the_same_to_the_last_byte(request, name, tmp_path):
    original = request.getfixturevalue(name)
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    seen: list[tuple[str, int, int]] = []
    report, items, title = rescore(copy, progress=lambda *call: seen.append(call))
    assert title == "Widgets & <gadgets>" and len(items) == 10 and seen[-1] == ("reading maps", 10, 10)
    stored = json.loads((original / "report.json").read_text())
    assert report.metrics == stored["metrics"] and len(report.metrics) == (15 if name == "report_folder" else 9)
    for path in (copy / file for file in FILES):
        path.unlink()
    write_report(report, items, copy, title)
    for file in FILES:
        assert (copy / file).read_bytes() == (original / file).read_bytes(), file


def test_a_report_of_the_first_version_is_read(copy, report_folder):
    """It has the old names only, and nothing about masks that vanish."""
    stored = json.loads((copy / "report.json").read_text())
    new = {"image_path", "pred_score", "pred_label", "mask_vanished", "model_id", "model_version", "calibration_id"}
    rows = [{key: value for key, value in row.items() if key not in new} for row in stored["rows"]]
    assert {"image", "score", "label"} <= rows[0].keys() and {row["label"] for row in rows} == {"normal", "anomalous"}
    rows.insert(4, {"image": "a.png", "error": "broken", "gt_label": 1, "defect_type": "hole", "category": "widget", "split": "test"})
    for number in range(9, 3, -1):
        map_file(copy / "maps", number).rename(map_file(copy / "maps", number + 1))
    (copy / "report.json").write_text(json.dumps(stored | {"schema_version": 1, "rows": rows}))
    (report, items, _), (expected, expected_items, _) = rescore(copy), rescore(report_folder)
    assert report.rows.pop(4)["image_path"] == "a.png" and report.counts.pop("skipped") == 1
    assert report.metrics == expected.metrics and items == expected_items
    for ours, theirs in zip(report.rows, expected.rows, strict=True):
        assert ours == {key: theirs[key] for key in theirs if not key.startswith(("model_", "calibration_"))}


def test_scored_again_at_another_rate_is_as_if_inspected_at_it(report_folder, model, category):
    again, items, _ = rescore(report_folder, false_reject_rate=0.5)
    detector = Glad.from_pretrained(model)
    samples = mislabelled(detector, category)  # those of the report, chosen at its rate
    detector.set_false_reject_rate(0.5)
    fresh = evaluate(detector, samples)
    assert again.metrics.keys() == fresh.metrics.keys()
    # in the first so few normal pixels are above the threshold, and in the second so few pixels are bad, that one more counts
    bounds = {"pixel_aupimo": 1e-4, "pixel_f1max": 1e-4}
    for name, value in fresh.metrics.items():
        if name != "seconds_per_image":
            # maps are scaled anew in float32, which may swap pixels that are all but equal
            assert again.metrics[name] == pytest.approx(value, rel=bounds.get(name, 1e-5 if name.startswith("pixel_") else 1e-6)), name
    for ours, theirs in zip(again.rows, fresh.rows, strict=True):
        assert ours["pred_score"] == pytest.approx(theirs["pred_score"]) and ours["p_value"] == theirs["p_value"]
        assert (ours["pred_label"], ours["outcome"]) == (theirs["pred_label"], theirs["outcome"])
    assert [(item.pred_score, item.outcome) for item in items] == [(row["pred_score"], row["outcome"]) for row in again.rows]
    before = json.loads((report_folder / "report.json").read_text())
    assert again.metrics["threshold"] < before["metrics"]["threshold"]
    assert again.details["guarantee"] == conformal_threshold(detector.calibration_.scores, 0.5).statement
    assert again.details["notes"][-1].startswith("decided again at 50.00% false rejects")


def test_scores_of_copies_support_no_guarantee_at_another_rate_either(copy):
    stored = json.loads((copy / "report.json").read_text())
    assert rescore(copy, false_reject_rate=0.5)[0].details["calibration"]["threshold"]["method"] == "conformal"
    stored["details"]["calibration"]["threshold"]["n"] = 1  # all scores are of one image and of copies of it
    (copy / "report.json").write_text(json.dumps(stored))
    assert rescore(copy, false_reject_rate=0.5)[0].details["guarantee"].startswith("no guarantee")


def test_scored_again_with_another_limit(report_folder):
    report, _, _ = rescore(report_folder, max_fpr=0.1)
    kept = [load_map(report_folder / "maps", number) for number, row in enumerate(report.rows) if row["mask"] or not row["gt_label"]]
    masks = [np.zeros((256, 256), bool) if one.mask is None else one.mask for one in kept]
    assert report.metrics["pixel_aupro"] == pytest.approx(metrics.aupro([one.anomaly_map for one in kept], masks, 0.1))
    before = json.loads((report_folder / "report.json").read_text())
    assert report.metrics["pixel_aupro"] != before["metrics"]["pixel_aupro"]
    assert report.metrics["pixel_auroc"] == before["metrics"]["pixel_auroc"]
    assert report.details["curves"]["pro"]["x"][-1] == 0.1
    assert report.details["units"]["pixel_aupro"].endswith("0.1")


def test_a_report_that_is_written_elsewhere_links_back(copy, tmp_path):
    elsewhere = tmp_path / "deep/other one"
    write_report(*rescore(copy, elsewhere, max_fpr=0.2)[:2], elsewhere)
    links = [attrs["href"] for attrs in Page((elsewhere / "index.html").read_text()).all("a")]
    assert len(links) == 34 and all((elsewhere / link).is_file() for link in links)
    with pytest.raises(DataError, match="its maps were not kept"):
        rescore(elsewhere)
    shutil.rmtree(copy / "pictures")
    write_report(*rescore(copy)[:2], copy)
    page = Page((copy / "index.html").read_text())
    assert page.all("a") == [] and len(page.all("img")) == 34 and "There are no full-size pictures" in "".join(page.texts)


def test_what_cannot_be_scored_again(copy, tmp_path):
    for setting in ({"max_fpr": 0.0}, {"max_fpr": 1.1}, {"false_reject_rate": 0.6}):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} must"):
            rescore(copy, **setting)
    with pytest.raises(DataError, match=r"holds no report \(report.json\); give the folder that 'gladad evaluate' wrote"):
        rescore(tmp_path)
    stored = json.loads((copy / "report.json").read_text())

    def refused(value: Any, message: str) -> None:
        (copy / "report.json").write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(DataError, match=message):
            rescore(copy)

    refused("{", "cannot be read as JSON")
    refused(json.dumps(stored).replace('"p_value": 0', '"p_value": NaN, "was": 0', 1), "NaN is not a finite number")
    refused([], "not a report of this program")
    refused({**stored, "schema": "other"}, "not a report of this program")
    refused({**stored, "schema_version": 99}, "has version 99, this program reads 1 and 2")
    refused({**stored, "rows": [{"image": "a"}]}, "key missing or wrong")
    refused({key: value for key, value in stored.items() if key != "details"}, "key missing or wrong")
    refused({**stored, "details": {**stored["details"], "maps": False}}, "maps were not kept; run 'gladad evaluate --keep-maps' first")
    (copy / "maps/000000.npz").unlink()
    refused(stored, "000000.npz: missing")


# ------------------------------------------------------------------------------------------------------ on the command line


def test_the_commands(model, tmp_path, capsys):
    category, out = write_category(tmp_path / "widget", train=0, test=3), tmp_path / "out"
    (category / "test/hole/001.png").write_bytes(b"broken")
    assert main(["evaluate", str(model), str(category), "-o", str(out), "--keep-maps"]) == 0
    printed, errors = capsys.readouterr()
    assert errors.startswith("skipped: ") and errors.count("\n") == 1 and str(out / "index.html") in printed
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "maps", "pictures", *FILES[1:]]
    assert sorted(path.name for path in (out / "maps").iterdir()) == [f"{number:06}.npz" for number in (0, 1, 2, 3, 5)]
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["defect_type"] for row in rows] == ["good"] * 3 + ["hole"] * 3 and "broken.png" not in rows[4]["error"]
    before = {name: (out / name).read_bytes() for name in FILES}
    shutil.rmtree(category)
    assert main(["rescore", str(out), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert main(["rescore", str(out), "-o", str(tmp_path / "other"), "--false-reject-rate", "0.4", "--max-fpr", "0.1"]) == 0
    assert "decided again at 40.00%" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == list(FILES)


def test_the_commands_refuse(model, category, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evaluate", str(model), str(category), "-o", str(out), "-q", "--no-pictures"]) == 0
    assert sorted(path.name for path in out.iterdir()) == list(FILES)
    for arguments, message in (
        ([str(out)], f"error: {out}: its maps were not kept; run 'gladad evaluate --keep-maps' first"),
        ([str(tmp_path)], f"error: {tmp_path}: holds no report"),
        ([str(out), "--max-fpr", "7"], "error: max_fpr must lie in (0, 1], not 7.0"),
    ):
        assert main(["rescore", *arguments]) == 1
        printed, errors = capsys.readouterr()
        assert errors.startswith(message) and errors.count("\n") == 1 and printed == ""


def test_a_later_report_without_maps_and_pictures_removes_the_earlier_ones(model, category, tmp_path):
    out = tmp_path / "out"
    command = ["evaluate", str(model), str(category), "-o", str(out), "-q"]
    assert main([*command, "--keep-maps"]) == 0 and (out / "maps").is_dir() and (out / "pictures").is_dir()
    assert main([*command, "--no-pictures"]) == 0
    assert sorted(path.name for path in out.iterdir()) == list(FILES)
    (out / "pictures").mkdir()
    (out / "pictures/mine.txt").write_text("not of the report")
    assert main([*command, "--no-pictures"]) == 0
    assert (out / "pictures/mine.txt").exists()
