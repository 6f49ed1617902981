"""What of a map counts: masks and smallest areas take part in the calibration, and in everything that decides."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import draw_part
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from gladad.cli.main import main
from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.core.records import Inspection
from gladad.decision.scope import Scope
from gladad.detector.fitted import Fitted
from gladad.detector.glad import Glad


class Known:
    """A model that always says the same, and knows no places."""

    def __init__(self, level: np.ndarray):
        self.level = level.astype(np.float32)

    def inspect(self, pixels: np.ndarray) -> Inspection:
        return Inspection(map=self.level, score=7.0, step=400, latent=None)


def applied(scope: Scope, level: np.ndarray) -> Inspection:
    return Fitted(Known(level), None, [], {}, scope=scope).inspect(np.zeros((8, 8, 3), np.uint8))


def reference_score(level: np.ndarray, area: int) -> float:
    """The highest level whose superlevel set has an area that is large enough, by trying them all."""
    best = 0.0
    for value in np.unique(level):
        labels, _ = ndimage.label(level >= value, structure=np.ones((3, 3)))
        if np.bincount(labels.ravel())[1:].max(initial=0) >= area:
            best = max(best, float(value))
    return best


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_the_peak_is_the_highest_level_of_a_large_enough_area(seed, area):
    level = np.random.default_rng(seed).integers(0, 9, (9, 11)).astype(np.float32)
    scoped = applied(Scope(min_area=area / 99), level)
    assert scoped.map.max() == reference_score(level, area)
    assert scoped.score == 7.0 * scoped.map.max() / level.max()
    assert (scoped.map <= level).all()


def test_ignored_places_do_not_count():
    level = np.ones((8, 8), np.float32)
    level[0, 0], level[7, 7] = 5, 3
    ignored = np.zeros((4, 4), bool)  # over the image, whatever its size
    ignored[0, 0] = True
    scoped = applied(Scope(ignored), level)
    assert scoped.score == 7.0 * 3 / 5
    assert (scoped.map[:2, :2] == 0).all() and (scoped.map[2:] == level[2:]).all()


def test_wrong_scopes_are_refused():
    with pytest.raises(ConfigError, match="min_area"):
        Scope(min_area=1.0)
    with pytest.raises(DataError, match="whole image"):
        Scope(np.ones((4, 4), bool))
    assert not Scope() and not Scope(np.zeros((4, 4), bool)) and Scope(min_area=0.1)


@pytest.fixture
def mask(tmp_path):
    """Ignores the left half."""
    ignored = np.zeros((72, 72), np.uint8)
    ignored[:, :36] = 255
    Image.fromarray(ignored).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def dark(left: int) -> np.ndarray:
    pixels = np.array(draw_part(2000)[0])
    pixels[26:46, left : left + 14] = 15
    return pixels


def test_a_mask_takes_part_in_the_calibration(model, category, mask, tmp_path):
    detector = Glad.from_pretrained(model)
    before = detector.describe()
    good = category / "train/good"
    detector.calibrate(good, scope=Scope.read(mask))
    assert detector.model_id != before["model_id"] and detector.calibration_id != before["calibration_id"]
    assert not detector.inspect(dark(4)).pred_mask[:, :36].any()
    assert detector.inspect(dark(50)).pred_score > detector.inspect(dark(4)).pred_score
    threshold = detector.calibration_.threshold.value
    scores = [pytest.approx(detector.inspect(path).pred_score * threshold) for path in sorted(good.iterdir())]
    assert all(score in scores for score in detector.calibration_.scores)  # they are of what counts
    detector.save_pretrained(tmp_path / "scoped")
    again = Glad.from_pretrained(tmp_path / "scoped")
    one, two = detector.inspect(dark(50)), again.inspect(dark(50))
    assert one.pred_score == two.pred_score and (one.anomaly_map == two.anomaly_map).all()
    assert again.model_id == detector.model_id and again.describe()["scope"] == {"min_area": 0.0, "mask": True}
    again.set_false_reject_rate(0.3)  # and what else makes thresholds anew keeps it
    assert not again.inspect(dark(4)).pred_mask[:, :36].any()
    again.calibrate(good, scope=Scope())
    assert again.model_id == before["model_id"]
    assert again.describe()["scope"] is None


def test_on_the_command_line(model, category, mask, tmp_path, capsys):
    good, out = str(category / "train/good"), str(tmp_path / "scoped")
    assert main(["calibrate", str(model), good, "-o", out, "--ignore", str(mask), "--min-area", "0.01", "-q"]) == 0
    assert main(["info", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scope"] == {"min_area": 0.01, "mask": True}
    description = json.loads((tmp_path / "scoped/model.json").read_text())
    assert description["format_version"] == 4  # an older program must not decide by everything
    assert main(["calibrate", out, good, "--count-all", "-q"]) == 0
    assert json.loads((tmp_path / "scoped/model.json").read_text())["format_version"] == 3
    assert main(["calibrate", str(model), good, "-o", out, "--min-area", "2", "-q"]) == 1
    assert "share of the image" in capsys.readouterr().err


def test_a_mask_that_is_gone_is_told(model, category, mask, tmp_path):
    detector = Glad.from_pretrained(model).calibrate(category / "train/good", scope=Scope.read(mask))
    detector.save_pretrained(tmp_path / "scoped")
    (tmp_path / "scoped/ignored.png").unlink()
    with pytest.raises(ModelFormatError, match=r"ignored\.png"):
        Glad.from_pretrained(tmp_path / "scoped")
