"""Reports: what is measured, what is left out, and what is written."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gladad.core.errors import DataError, NotFiniteError
from gladad.core.records import Inspection, Prediction, Sample
from gladad.core.storage import WriteError, printable
from gladad.data.samples import category_samples
from gladad.decision.conformal import Calibration, calibrate
from gladad.detector.glad import Glad
from gladad.evaluation.run import EVALUATION_SIZE, evaluate, leftovers, write_report
from gladad.metrics import image as metrics
from gladad.metrics.pixel import NAMES
from gladad.report import files as results
from gladad.report.files import output_folder, picture_names, to_csv
from gladad.report.gallery import GalleryItem
from gladad.report.text import headline, summary

IMAGE = {"image_auroc", "image_ap", "image_f1max", "image_pg2", "image_pb2"}
PIXEL = set(NAMES)
RATES = {"recall", "false_reject_rate"}
ALWAYS = {"threshold", "seconds_per_image"}


class Brightness:
    """A detector that takes the brightest pixel for the score and brightness for the map."""

    def __init__(self) -> None:
        self.calibration_: Calibration = calibrate([10.0, 20.0, 30.0, 40.0], [1.0, 1.0, 1.0, 1.0], 0.2)
        self.workers = 2
        self.reconstructed: list[bool] = []

    def inspect(self, image: NDArray[np.uint8], *, reconstruct: bool = True) -> Prediction:
        self.reconstructed.append(reconstruct)
        values = image[..., 0].astype(np.float32) / 100
        score = float(values.max())
        height, width = values.shape
        return Prediction(score, 0.5, score > 1, 300, values, values > 1, (), (height, width), None, None, 0.25)

    def describe(self) -> dict[str, str | None]:
        return {"caveat": None}


def put(path: Path, value: int, spot: tuple[slice, slice] | None = None, size: tuple[int, int] = (32, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value if spot is None else 20, np.uint8)
    if spot is not None:
        pixels[spot] = value
    Image.fromarray(pixels).save(path)
    return path


SPOT = (slice(8, 16), slice(16, 32))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Three normal images, one of them too bright; three anomalous ones, the last too dark; masks that fit."""
    mask = put(tmp_path / "mask.png", 255, SPOT)
    good = [Sample(put(tmp_path / f"good/{value}.png", value), category="lamp") for value in (30, 60, 120)]
    bad = [Sample(put(tmp_path / f"bad/{v}.png", v, SPOT), mask, 1, "lamp", "spot") for v in (200, 150, 90)]
    return good + bad


def test_everything_that_is_measured(samples):
    detector = Brightness()
    report = evaluate(detector, samples)
    assert set(report.metrics) == IMAGE | PIXEL | RATES | ALWAYS
    scores, labels = [0.3, 0.6, 1.2, 2.0, 1.5, 0.9], [0, 0, 0, 1, 1, 1]
    for name, value in metrics.image_metrics(scores, labels).items():
        assert report.metrics[name] == pytest.approx(value)
    assert report.metrics["recall"] == pytest.approx(2 / 3)
    assert report.metrics["false_reject_rate"] == pytest.approx(1 / 3)
    assert report.metrics["seconds_per_image"] == 0.25
    assert report.metrics["threshold"] == 40.0
    assert report.details["intervals_95"]["recall"] == metrics.wilson_interval(2, 3)
    assert report.details["intervals_95"]["false_reject_rate"] == metrics.wilson_interval(1, 3)
    rows = {row["defect_type"]: (row["anomalous"], row["count"], row["rejected"]) for row in report.details["per_type"]}
    assert rows == {"good": (False, 3, 1), "spot": (True, 3, 2)}
    assert report.details["curves"].keys() == {"roc", "pr", "pro"}
    assert report.details["notes"] == []
    assert report.counts == {"normal": 3, "anomalous": 3, "masks": 3, "masks_vanished": 0, "anomalous_without_mask": 0, "skipped": 0}
    assert [row["gt_label"] for row in report.rows] == labels
    assert [row["pred_label"] for row in report.rows] == [0, 0, 1, 1, 1, 0]
    assert report.rows[3]["defect_type"] == "spot" and report.rows[3]["image_path"].endswith("200.png")
    assert not any(detector.reconstructed)
    assert list(dict(summary(report)))[:3] == ["image_auroc", "image_ap", "image_f1max"]


def test_pixels_are_compared_at_one_size(samples):
    """A map that is the mask itself, at any size, is perfect but for its blurred rim."""
    perfect = [replace(sample, image_path=sample.mask_path) if sample.gt_label else sample for sample in samples]
    dark = [sample for sample in perfect if sample.gt_label or "120" not in sample.image_path.name]
    report = evaluate(Brightness(), [s for s in dark if s.gt_label or s.image_path.stem != "60"])
    assert report.metrics["pixel_auroc"] > 0.999
    assert report.metrics["pixel_aupro"] > 0.99
    assert EVALUATION_SIZE == (256, 256)


def test_anomalous_images_without_a_mask_stay_out_of_the_pixels(samples, tmp_path):
    expected = evaluate(Brightness(), samples)
    odd = put(tmp_path / "bad/everywhere.png", 99)
    report = evaluate(Brightness(), [*samples, Sample(odd, None, 1, "lamp", "spot")])
    assert {name: report.metrics[name] for name in PIXEL} == {name: expected.metrics[name] for name in PIXEL}
    assert (report.counts["masks"], report.counts["anomalous_without_mask"]) == (3, 1)
    assert any("1 anomalous images have no readable mask" in note for note in report.details["notes"])


def test_a_damaged_mask_counts_as_none(samples, tmp_path):
    broken = tmp_path / "broken_mask.png"
    broken.write_bytes(b"nothing")
    report = evaluate(Brightness(), [*samples[:-1], replace(samples[-1], mask_path=broken)])
    assert report.counts["anomalous_without_mask"] == 1 and report.counts["anomalous"] == 3


def test_without_masks_there_are_no_pixel_metrics(samples):
    report = evaluate(Brightness(), [replace(sample, mask_path=None) for sample in samples])
    assert set(report.metrics) == IMAGE | RATES | ALWAYS
    assert any("pixel metrics need masks" in note for note in report.details["notes"])


@pytest.mark.parametrize(("kept", "rate"), [(slice(0, 3), "false_reject_rate"), (slice(3, 6), "recall")])
def test_one_class_only(samples, kept, rate):
    report = evaluate(Brightness(), samples[kept])
    assert set(report.metrics) - PIXEL == {rate} | ALWAYS
    assert any("need both classes" in note for note in report.details["notes"])


def test_damaged_images_are_skipped_and_counted(samples, tmp_path):
    broken = tmp_path / "good/broken.png"
    broken.write_bytes(samples[0].image_path.read_bytes()[:60])
    seen: list[tuple[str, int, int]] = []
    report = evaluate(Brightness(), [Sample(broken), *samples], progress=lambda *call: seen.append(call))
    assert report.counts["skipped"] == 1 and report.counts["normal"] == 3
    assert "broken.png" in report.rows[0]["error"] and len(report.rows) == 7
    assert seen == [("inspecting", done, 7) for done in range(1, 8)]
    assert any("1 images could not be read" in note for note in report.details["notes"])


@pytest.mark.parametrize("mask_side", [1000, 4500])
def test_a_mask_that_vanishes_at_the_size_of_the_comparison_is_counted(samples, tmp_path, mask_side):
    """Its image would be taken for a normal one. A mask may also vanish at the size of the image."""
    expected = evaluate(Brightness(), samples)
    speck = put(tmp_path / "speck_mask.png", 255, (slice(0, 1), slice(0, 2)), (mask_side, mask_side))
    with Image.open(speck) as image:
        Image.fromarray(np.asarray(image) * (np.asarray(image) > 20)).save(speck)
    large = put(tmp_path / "bad/speck.png", 99, SPOT, (1000, 1000))
    empty = put(tmp_path / "empty_mask.png", 0)
    report = evaluate(Brightness(), [*samples, Sample(large, empty, 1, "lamp", "speck"), Sample(large, speck, 1, "lamp", "speck")])
    assert {name: report.metrics[name] for name in PIXEL} == {name: expected.metrics[name] for name in PIXEL}
    assert (report.counts["masks"], report.counts["masks_vanished"], report.counts["anomalous_without_mask"]) == (3, 1, 1)
    assert [row.get("mask_vanished") for row in report.rows[-2:]] == [False, True] and "aupimo" not in report.rows[-1]
    assert report.details["notes"] == [
        "1 defects are smaller than a pixel at 256x256 and take no part in the pixel metrics",
        "1 anomalous images have no readable mask and take no part in the pixel metrics",
    ]


class Broken(Brightness):
    """A detector that gives NaN or infinity for one image."""

    def __init__(self, quantity: str, value: float) -> None:
        super().__init__()
        self.broken = {quantity: value}

    def inspect(self, image: NDArray[np.uint8], *, reconstruct: bool = True) -> Prediction:
        prediction = super().inspect(image, reconstruct=reconstruct)
        if image.max() != 150:
            return prediction
        return replace(
            prediction, **({"anomaly_map": prediction.anomaly_map * np.float32(np.nan)} if "map" in self.broken else self.broken)
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("quantity", ["pred_score", "p_value", "map"])
def test_a_prediction_that_is_not_finite_names_the_image(samples, quantity, value):
    with pytest.raises(NotFiniteError, match=rf"bad/150\.png: (anomaly_)?{quantity} is NaN or infinite; the model is damaged"):
        evaluate(Broken(quantity, value), samples)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_inspection_that_is_not_finite_is_refused(value):
    values = np.zeros((4, 5), np.float32)
    assert Inspection(values, 1.0, 300, None).score == 1.0
    with pytest.raises(NotFiniteError, match=r"^score is NaN or infinite"):
        Inspection(values, value, 300, None)
    values[2, 3] = value
    with pytest.raises(NotFiniteError, match=r"^map is NaN or infinite"):
        Inspection(values, 1.0, 300, None)


def test_kinds_of_defects_have_metrics_of_their_own(samples):
    good, bad = samples[:3], samples[3:]
    kinds = [*good, *(replace(sample, defect_type=kind) for sample, kind in zip(bad, ("spot", "spot", "dim"), strict=True))]
    report = evaluate(Brightness(), kinds)
    rows = {row["defect_type"]: row for row in report.details["per_type"]}
    assert rows["spot"]["image_auroc"] == 1.0 and rows["dim"]["image_auroc"] == pytest.approx(2 / 3)
    values = [row["aupimo"] for row in report.rows[3:]]
    assert rows["spot"]["aupimo"] == pytest.approx(np.mean(values[:2])) and rows["dim"]["aupimo"] == values[2]
    assert report.metrics["pixel_aupimo"] == pytest.approx(np.mean(values))
    assert "image_auroc" not in rows["good"]
    assert headline(report) == "2 of 3 bad parts found, 1 of 3 good parts rejected"


def test_the_report_in_markdown(samples, tmp_path):
    odd = [replace(samples[0], defect_type="a|b *c*"), *samples[1:]]
    report = evaluate(Brightness(), odd)
    write_report(report, [], tmp_path, title="Lamps | <old>")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Lamps \\| \\<old>\n\n**2 of 3 bad parts found, 1 of 3 good parts rejected**\n")
    assert f"| image AUROC | {report.metrics['image_auroc']:.1%} |  |" in text
    assert "| bad parts found | 66.7% | 20.8% to 93.9% |" in text
    assert "| a\\|b \\*c\\* | 0.0% falsely rejected |" in text and "| spot | 66.7% found |" in text
    assert "masks nearest neighbour and > 0.5" in text and "no guarantee" not in text
    widths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {4, 8, 3}


def test_leftovers_of_an_earlier_report(samples, tmp_path):
    assert leftovers(tmp_path / "nothing", evaluate(Brightness(), samples)) == []
    full = evaluate(Brightness(), samples, pictures=tmp_path / "pictures", maps=tmp_path / "maps")
    write_report(full, [], tmp_path)
    assert leftovers(tmp_path, full) == []
    assert leftovers(tmp_path, evaluate(Brightness(), samples, maps=tmp_path / "maps")) == [tmp_path / "pictures"]
    assert leftovers(tmp_path, evaluate(Brightness(), samples)) == [tmp_path / "pictures", tmp_path / "maps"]


def test_full_size_pictures(samples, tmp_path):
    items: list[GalleryItem] = []
    report = evaluate(Brightness(), samples, collect=items.append, pictures=tmp_path / "pictures")
    written = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pictures").rglob("*.jpg"))
    assert written == sorted(link for row in report.rows for link in row["pictures"].values())
    assert written == sorted(picture.link for item in items for picture in item.pictures)
    assert report.rows[3]["pictures"] == {
        "input": "pictures/input/bad/200.jpg",
        "map": "pictures/map/bad/200.jpg",
        "ground truth": "pictures/ground_truth/bad/200.jpg",
    }
    with Image.open(tmp_path / "pictures/input/bad/200.jpg") as image, Image.open(samples[3].image_path) as original:
        assert image.size == original.size
        np.testing.assert_allclose(np.asarray(image).astype(float), np.asarray(original), atol=12)


def test_nothing_to_evaluate(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 images"):
        evaluate(Brightness(), [Sample(broken)])
    with pytest.raises(DataError, match="no images"):
        evaluate(Brightness(), [])


def test_the_report_is_written(samples, tmp_path):
    broken = tmp_path / "bad/broken.png"
    broken.write_bytes(b"")
    items: list[GalleryItem] = []
    detector = Brightness()
    report = evaluate(detector, [*samples, Sample(broken, None, 1)], collect=items.append)
    assert all(detector.reconstructed) and len(items) == 6
    out = tmp_path / "deep/report"
    page = write_report(report, items, out, title="Lamps")
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "predictions.csv", "report.json", "report.md"]
    stored = json.loads((out / "report.json").read_text())
    assert stored["metrics"] == report.metrics and stored["counts"] == report.counts
    assert (stored["schema"], stored["schema_version"], stored["title"]) == ("gladad-report", 2, "Lamps")
    assert Calibration.from_json(stored["details"]["calibration"]) == detector.calibration_
    rows = list(csv.DictReader(io.StringIO((out / "predictions.csv").read_text())))
    assert len(rows) == 7 and "broken.png" in rows[-1]["error"] and rows[0]["gt_label"] == "0"
    assert float(rows[3]["pred_score"]) == 2.0 and float(rows[3]["raw_score"]) == 80.0
    for written in (rows, stored["rows"]):  # the old names stay for one release
        assert [row["image"] for row in written] == [row["image_path"] for row in report.rows]
        assert [float(row["score"]) for row in written[:-1]] == [row["pred_score"] for row in report.rows[:-1]]
        assert [row["label"] for row in written[:-1]] == ["normal", "normal", "anomalous", "anomalous", "anomalous", "normal"]
        assert [int(row["pred_label"]) for row in written[:-1]] == [0, 0, 1, 1, 1, 0]
    assert not {"image", "score", "label"} & {key for row in report.rows for key in row}
    assert [row["outcome"] for row in rows[:-1]] == ["passed", "passed", "false reject", "found", "found", "false accept"]
    assert {row["split"] for row in rows} == {"test"} and rows[0]["aupimo"] == "" and float(rows[3]["aupimo"]) == report.rows[3]["aupimo"]
    html = page.read_text()
    assert "<h1>Lamps</h1>" in html and html.count("<li data-outcome") == 6 and "could not be read" in html


def test_of_many_images_the_wrong_ones_are_shown(samples, tmp_path):
    items: list[GalleryItem] = []
    report = evaluate(Brightness(), samples, collect=items.append)
    html = write_report(report, items * 200, tmp_path / "out").read_text()
    assert html.count("<li data-outcome") == 1000 and html.count(" data-wrong>") == 400 and "1000 of 1200 images are shown" in html


def test_a_full_disk_leaves_no_half_report(samples, tmp_path, monkeypatch):
    report = evaluate(Brightness(), samples)
    out = tmp_path / "out"
    write_report(report, [], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gladad.core.storage.os.fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        write_report(replace(report, metrics={}), [], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_real_detector(detector: Glad, category: Path):
    items: list[GalleryItem] = []
    report = evaluate(detector, category_samples(category), collect=items.append)
    assert set(report.metrics) == IMAGE | PIXEL | RATES | ALWAYS
    assert report.metrics["image_auroc"] > 0.9
    assert report.metrics["threshold"] == detector.calibration_.threshold.value
    assert all(len(item.pictures) == (4 if item.gt_label else 3) for item in items)
    again = evaluate(detector, category_samples(category))
    assert {n: v for n, v in again.metrics.items() if n != "seconds_per_image"} == {
        n: v for n, v in report.metrics.items() if n != "seconds_per_image"
    }


# ------------------------------------------------------------------------------------------------- files of results


def test_names_of_pictures_are_unique_and_mirror_the_images(tmp_path):
    def names(*images: str) -> list[str]:
        return [name.as_posix() for name in picture_names([tmp_path / image for image in images])]

    assert names() == []
    assert names("a/1.png") == ["1.png"]
    assert names("a/1.png", "a/2.jpg") == ["1.png", "2.png"]
    assert names("a/1.png", "b/1.png", "b/c/1.jpeg") == ["a/1.png", "b/1.png", "b/c/1.png"]
    assert names("1.jpg", "1.png", "2.png") == ["1.jpg.png", "1.png.png", "2.png"]
    assert names("1.jpg", "1.JPG", "1.jpg.tif") == ["1.jpg.png", "1.JPG-2.png", "1.jpg-3.png"]
    assert names("x/../1.png", "1.JPG") == ["1.png.png", "1.JPG.png"]


def test_names_of_pictures_of_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert picture_names([Path("../x/1.png"), Path("1.png")])[0].parts[-2:] == ("x", "1.png")
    assert not any(".." in name.parts for name in picture_names([Path("../x/1.png"), Path("1.png")]))


def test_tables_and_odd_names():
    rows = [{"image_path": 'a,"b".png', "pred_score": 1.5, "regions": [{}, {}]}, {"image_path": "c", "error": "broken"}]
    table = list(csv.reader(io.StringIO(to_csv(rows))))
    assert table[0] == [*results.COLUMNS, "error"]
    assert table[1][:2] == ['a,"b".png', "1.5"] and table[1][5] == "2"
    assert table[2][-1] == "broken"
    assert "error" not in to_csv(rows[:1])
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\ufffd.png"


def test_results_replace_those_of_an_earlier_run_only(tmp_path):
    out = tmp_path / "out"
    for name in ("1.png", "2.png"):
        with output_folder(out) as folder:
            (folder / "masks").mkdir()
            (folder / "masks" / name).write_text("mask")
            (folder / results.TABLE_FILE).write_text("table")
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == ["masks", "masks/2.png", results.TABLE_FILE]
    (out / results.TABLE_FILE).unlink()
    with pytest.raises(WriteError, match="choose another folder"), output_folder(out) as folder:
        (folder / "masks").mkdir()
    assert sorted(path.name for path in out.iterdir()) == ["masks"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_results_that_fail_leave_nothing(tmp_path, there, problem):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises((KeyboardInterrupt, WriteError)), output_folder(out) as folder:
        (folder / "half").write_text("half")
        raise problem
    assert list(out.iterdir()) == [] if there else not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])
