"""Parts that are turned and cropped to lie alike, and large images in tiles."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.tensors import save_tensors
from gladad.data.alignment import Alignment
from gladad.detector.glad import Glad
from gladad.models.tiled import cut, joined

SIDE = 160


def draw(angle: float, x: float, y: float, *, dark: bool = False, hole: bool = False, side: int = SIDE) -> np.ndarray:
    """An L-shaped part with a mark, turned clockwise by so many degrees about its corner at ``(x, y)``, shares of the side."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    u, v = cos * (columns - x) + sin * (rows - y), -sin * (columns - x) + cos * (rows - y)
    long = (u > -0.06) & (u < 0.3) & (v > -0.06) & (v < 0.06)
    short = (u > -0.06) & (u < 0.06) & (v > -0.06) & (v < 0.18)
    grey = np.where(long | short, 200.0, 40.0)
    grey[(u > 0.22) & (u < 0.27) & (np.abs(v) < 0.025)] = 140
    if hole:
        grey[(u > 0.08) & (u < 0.16) & (np.abs(v) < 0.04)] = 90
    grey += np.random.default_rng((int(10 * angle), int(1000 * x))).normal(0, 2, grey.shape)
    grey = 255 - grey if dark else grey
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def places(count: int) -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(0)
    return [(float(rng.uniform(0, 360)), *rng.uniform(0.42, 0.58, 2)) for _ in range(count)]


@pytest.fixture(scope="module", params=[False, True], ids=["bright", "dark"])
def learnt(request: pytest.FixtureRequest) -> tuple[Alignment, bool]:
    return Alignment.learn([draw(*place, dark=request.param) for place in places(12)]), request.param


def test_aligned_parts_lie_alike_whatever_their_angle_place_and_resolution(learnt):
    alignment, dark = learnt
    assert alignment.foreground == ("dark" if dark else "bright")
    aligned, turns, offsets = [], [], []
    for (angle, x, y), side in zip(places(24)[12:], (SIDE, 2 * SIDE) * 6, strict=True):
        pixels = draw(angle, x, y, dark=dark, side=side)
        pose = alignment.locate(pixels)
        turns.append(np.exp(1j * (pose.angle - math.radians(angle))))
        offsets.append((complex(pose.x + 0.5, pose.y + 0.5) / side - complex(x, y)) * np.exp(-1j * pose.angle))
        aligned.append(np.asarray(Image.fromarray(alignment.apply(pixels, pose)).convert("L").resize((64, 48)), dtype=float))
    assert np.ptp(np.angle(np.array(turns) / turns[0])) < math.radians(1)
    assert np.abs(np.array(offsets) - np.mean(offsets)).max() < 1 / SIDE
    middle = np.mean(aligned, axis=0)
    part = middle < 128 if dark else middle > 128
    assert 0.3 < part.mean() < 0.9  # the frame is full of the part
    assert not part[[0, -1]].all(axis=1).any()  # and no side of it is cut off


def test_what_is_restored_lies_where_it_was(learnt):
    alignment, dark = learnt
    pixels = draw(200, 0.45, 0.5, dark=dark)
    pose = alignment.locate(pixels)
    shown = alignment.apply(pixels, pose)
    nowhere = np.full(pixels.shape[:2], -1, np.float32)
    found = alignment.restore(shown[..., 0].astype(np.float32), pose, pixels.shape[:2], nowhere)
    inside = found >= 0
    assert found.dtype == np.float32 and 0.05 < inside.mean() < 0.6
    assert np.abs(found - pixels[..., 0])[inside].mean() < 6
    half = np.asarray(Image.fromarray(shown).resize((shown.shape[1] // 2, shown.shape[0] // 2)))
    again = alignment.restore(half, pose, pixels.shape[:2], np.zeros_like(pixels))
    assert again.dtype == np.uint8 and np.abs(again.astype(int) - pixels)[inside].mean() < 12


def test_an_alignment_is_known_by_its_arrays(learnt):
    alignment, dark = learnt
    again = Alignment.of_arrays(alignment.arrays())
    pixels = draw(77, 0.5, 0.5, dark=dark)
    assert again.foreground == alignment.foreground and again.locate(pixels) == alignment.locate(pixels)


def test_what_shows_no_part_is_refused_and_an_empty_image_taken_as_it_is(learnt):
    noise = [np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8) for seed in range(4)]
    with pytest.raises(ConfigError, match="align: the parts cannot be located; the whole image, as no part stands before an even ground"):
        Alignment.learn(noise)
    alignment, _ = learnt
    empty = np.full((90, 120, 3), 40, np.uint8)
    pose = alignment.locate(empty)
    assert (pose.x, pose.y, pose.angle) == (59.5, 44.5, 0)
    assert (alignment.apply(empty, pose) == 40).all()
    specks = np.where(np.indices((SIDE, SIDE)).sum(0) % 7 == 0, 180, 40).astype(np.uint8)
    specks[1::2] = 40
    specks = np.repeat(specks[..., None], 3, axis=2)
    found = alignment.locate(255 - specks if alignment.foreground == "dark" else specks)
    assert all(map(math.isfinite, (found.x, found.y, found.angle)))


def save_all(folder: Path, pictures: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def test_a_detector_that_aligns(tmp_path):
    good = save_all(tmp_path / "good", [draw(*place) for place in places(16)])
    settings = TINY | {"image_size": 96, "training.steps": 8, "align": True, "false_reject_rate": 0.2, "calibration": "held-out"}
    detector = Glad.from_base("lite", settings=settings).fit(good)
    height, width = detector.model_.image_size
    assert height != width  # the frame's proportions, not the images'
    part, broken = draw(300, 0.47, 0.55), draw(300, 0.47, 0.55, hole=True)
    prediction, found = detector.inspect(part), detector.inspect(broken)
    assert found.pred_score > prediction.pred_score
    assert found.anomaly_map.shape == found.reconstruction.shape[:2] == (SIDE, SIDE)
    changed = np.abs(broken.astype(int) - part)[..., 0] > 30
    assert (found.anomaly_map - prediction.anomaly_map)[changed].min() > np.quantile(found.anomaly_map - prediction.anomaly_map, 0.8)
    assert (found.reconstruction[:8] == broken[:8]).all()  # outside of the frame

    detector.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    assert loaded.inspect(broken).pred_score == found.pred_score and loaded.model_id == detector.model_id
    assert loaded.calibrate(good).inspect(broken).model_id == detector.model_id
    save_tensors(tmp_path / "model" / "alignment.safetensors", {"frame": torch.zeros(4)})
    with pytest.raises(ModelFormatError, match="does not hold an alignment"):
        Glad.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "alignment.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"alignment\.safetensors"):
        Glad.from_pretrained(tmp_path / "model")


def test_tiles_are_cut_and_joined():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 18, 3), dtype=np.uint8)
    tiles = cut(pixels, 3)
    assert len(tiles) == 9 and (tiles[1] == pixels[:4, 6:12]).all()
    assert (joined(tiles, 3) == pixels).all()


@pytest.mark.parametrize("images", [16, 5, 1])
def test_a_detector_of_tiles(category, images, tmp_path):
    paths = sorted((category / "train" / "good").iterdir())[:images]
    settings = TINY | {"training.steps": 4, "training.batch_size": 8, "widths": [32, 32], "tiles": 2, "false_reject_rate": 0.2}
    settings |= {"calibration": "held-out"} if images == 16 else {"shots": images}
    detector = Glad.from_base("lite", settings=settings).fit(paths)
    assert detector.model_.image_size == (128, 128)
    defect = sorted((category / "test" / "hole").iterdir())[0]
    found = detector.inspect(defect)
    assert found.anomaly_map.shape == found.reconstruction.shape[:2] == (72, 72)
    detector.save_pretrained(tmp_path / "model")
    loaded = Glad.from_pretrained(tmp_path / "model")
    assert loaded.inspect(defect).pred_score == found.pred_score and loaded.model_id == detector.model_id
    assert loaded.describe()["tiles"] == 2
    if images == 16:
        whole = np.asarray(Image.open(defect).resize((128, 128)))
        scores = [detector.model_.model.inspect(tile).score for tile in cut(whole, 2)]
        assert detector.model_.inspect(whole).score == max(scores)
        with pytest.raises(ConfigError, match="a model of tiles cannot be merged"):
            detector.merge()
        with pytest.raises(ConfigError, match="a model of tiles cannot be adjusted"):
            detector.adjust(paths, settings | {"reconstruction.timesteps": [300]})


def test_several_products_together_are_neither_aligned_nor_tiled(category):
    paths = sorted((category / "train" / "good").iterdir())
    for values in ({"tiles": 2}, {"align": True}):
        with pytest.raises(ConfigError, match="align and tiles are for one product"):
            Glad.fit_together({"a": paths, "b": paths}, settings=TINY | values)
