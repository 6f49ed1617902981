"""Folders with traps in them."""

from __future__ import annotations

import hashlib
import os
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gladad.core.errors import DataError
from gladad.core.images import load_mask
from gladad.data.samples import category_samples, expand_paths, file_digest, fingerprint, good_images, split_held_out


def put(path: Path, size: tuple[int, int] = (10, 12), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def names(root: Path, paths: list[Path]) -> list[str]:
    return [p.relative_to(root).as_posix() for p in paths]


@pytest.fixture
def category(tmp_path: Path) -> Path:
    """A category as they come: odd names, missing masks, things that are no images."""
    root = tmp_path / "bottle"
    for name in ("000.png", "000(1).png", "001.PNG", "Flasche_grün.jpg"):
        put(root / "train/good" / name)
    put(root / "train/broken/000.png")
    for name in ("000.png", "001.JPG"):
        put(root / "test/good" / name)
    for name in ("000.png", "000(1).png", "001.PNG", "002.png", "010.png", "ü.png"):
        put(root / "test/broken" / name)
    # Pairing by sorted position would give 010 the mask of 001.
    for name in ("000_mask.png", "000(1)_mask.png", "001_mask.PNG", "010_mask.png"):
        put(root / "ground_truth/broken" / name)
    put(root / "ground_truth/broken" / (unicodedata.normalize("NFD", "ü") + "_mask.png"))
    put(root / "test/Cut/003.bmp")
    put(root / "ground_truth/cut/003.png", size=(20, 30), value=255)
    put(root / "ground_truth/good/000_mask.png")
    put(root / "test/broken/.hidden.png")
    put(root / "test/.cache/000.png")
    for junk in ("readme.txt", "license.txt", "test/broken/Thumbs.db", "test/notes.md", "train/good/list.csv"):
        (root / junk).write_text("not an image")
    return root


def test_good_images_of_a_category_are_those_of_train_good(category):
    expected = ["train/good/000(1).png", "train/good/000.png", "train/good/001.PNG", "train/good/Flasche_grün.jpg"]
    assert names(category, good_images(category)) == expected
    assert names(category, good_images(str(category / "train"))) == expected
    assert names(category, good_images(category / "train/good")) == expected


@pytest.mark.parametrize(("train", "good"), [("Train", "Good"), ("train", "normal"), ("TRAIN", "OK")])
def test_other_spellings_of_train_good(tmp_path, train, good):
    put(tmp_path / train / good / "a.png")
    put(tmp_path / "Test/bad/b.png")
    assert names(tmp_path, good_images(tmp_path)) == [f"{train}/{good}/a.png"]


def test_good_images_directly_in_train(tmp_path):
    put(tmp_path / "train/a.png")
    put(tmp_path / "train/rejected/b.png")
    assert names(tmp_path, good_images(tmp_path)) == ["train/a.png"]


def test_good_images_of_a_folder_at_any_depth(tmp_path):
    for name in ("a.png", "monday/b.png", "monday/line 1/c.webp", "d.TIFF"):
        put(tmp_path / name)
    put(tmp_path / ".trash/x.png")
    assert names(tmp_path, good_images(tmp_path)) == ["a.png", "d.TIFF", "monday/b.png", "monday/line 1/c.webp"]


def test_nothing_below_test_is_learnt_from(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "more/a.png")
    put(tmp_path / "test/bad/b.png")
    put(tmp_path / "more/Test/b.png")
    put(tmp_path / "masks/b.png")
    assert names(tmp_path, good_images(tmp_path)) == ["a.png", "more/a.png"]


def test_good_beside_defects(tmp_path):
    put(tmp_path / "good/a.png")
    put(tmp_path / "good/deeper/b.png")
    put(tmp_path / "scratch/c.png")
    assert names(tmp_path, good_images(tmp_path)) == ["good/a.png", "good/deeper/b.png"]


@pytest.mark.parametrize("bad", ["a/b/Anomaly/x.png", "a/b/scratch/x.png", "x.png", "bad/x.png"])
def test_good_and_bad_further_down_are_not_learnt_together(tmp_path, bad):
    put(tmp_path / "a/b/c/Normal/a.png")
    assert names(tmp_path, good_images(tmp_path)) == ["a/b/c/Normal/a.png"]
    put(tmp_path / bad)
    with pytest.raises(DataError, match=r"holds good images and others; give the folder of the good ones, such as .*Normal$"):
        good_images(tmp_path)


def test_masks_beside_images_are_not_learnt_from(tmp_path):
    for name in ("a.png", "a_mask.png", "b_mask.png"):
        put(tmp_path / "good" / name)
    assert names(tmp_path, good_images(tmp_path)) == ["good/a.png", "good/b_mask.png"]


def test_test_images_are_refused_for_learning(category):
    for folder in ("test", "test/good", "ground_truth", "ground_truth/broken"):
        with pytest.raises(DataError, match="not for learning"):
            good_images(category / folder)


@pytest.mark.parametrize("function", [good_images, category_samples])
def test_several_categories_are_listed(category, function):
    shutil.copytree(category, category.parent / "cable")
    with pytest.raises(DataError, match=r"holds the categories bottle, cable; give one of them, such as .*bottle"):
        function(category.parent)


@pytest.mark.parametrize("function", [good_images, category_samples])
def test_no_folder_single_image_and_empty_folder(tmp_path, function):
    with pytest.raises(DataError, match="no such folder"):
        function(tmp_path / "nowhere")
    with pytest.raises(DataError, match="single file"):
        function(put(tmp_path / "images/a.png"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"empty: no .*expected"):
        function(tmp_path / "empty")


def test_samples_of_a_category(category):
    samples = category_samples(category)
    got = {s.image_path.relative_to(category / "test").as_posix(): s for s in samples}
    masks = {
        name: None if s.mask_path is None else s.mask_path.relative_to(category / "ground_truth").as_posix() for name, s in got.items()
    }
    assert masks == {
        "Cut/003.bmp": "cut/003.png",
        "broken/000(1).png": "broken/000(1)_mask.png",
        "broken/000.png": "broken/000_mask.png",
        "broken/001.PNG": "broken/001_mask.PNG",
        "broken/002.png": None,
        "broken/010.png": "broken/010_mask.png",
        "broken/ü.png": "broken/" + unicodedata.normalize("NFD", "ü") + "_mask.png",
        "good/000.png": "good/000_mask.png",
        "good/001.JPG": None,
    }
    assert list(masks) == sorted(masks)
    assert {s.defect_type: s.gt_label for s in samples} == {"Cut": 1, "broken": 1, "good": 0}
    assert {(s.category, s.split) for s in samples} == {("bottle", "test")}
    assert category_samples(category / "test") == samples


def test_mask_of_another_size_is_fitted(category):
    mask = next(s.mask_path for s in category_samples(category) if s.defect_type == "Cut")
    assert mask is not None
    fitted = load_mask(mask, (10, 12))
    assert fitted.shape == (10, 12)
    assert fitted.all()


def test_samples_of_plain_folders(tmp_path):
    root = tmp_path / "part"
    for name in (
        "OK/a.png",
        "bad/a.png",
        "bad/deeper/a.png",
        "dent/b.png",
        "masks/bad/a.png",
        "masks/bad/deeper/a_mask.png",
        "train/x.png",
    ):
        put(root / name)
    put(root / "loose.png")
    got = [
        (s.image_path.relative_to(root).as_posix(), s.gt_label, s.mask_path and s.mask_path.relative_to(root).as_posix())
        for s in category_samples(root)
    ]
    assert got == [
        ("OK/a.png", 0, None),
        ("bad/a.png", 1, "masks/bad/a.png"),
        ("bad/deeper/a.png", 1, "masks/bad/deeper/a_mask.png"),
        ("dent/b.png", 1, None),
    ]


def test_samples_without_labels(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "monday/b.png")
    with pytest.raises(DataError, match="no labels; expected test/good/"):
        category_samples(tmp_path)
    put(tmp_path / "test/c.png")
    with pytest.raises(DataError, match="no labelled images"):
        category_samples(tmp_path)


def test_links_are_followed(category, tmp_path):
    linked = tmp_path / "linked"
    (linked / "test").mkdir(parents=True)
    (linked / "test/good").symlink_to(category / "test/good")
    (linked / "test/broken").mkdir()
    (linked / "test/broken/a.png").symlink_to(category / "test/broken/000.png")
    (linked / "test/broken/gone.png").symlink_to(category / "nowhere.png")
    (linked / "test/broken/up").symlink_to(linked / "test/broken")  # a loop
    (linked / "ground_truth").mkdir()
    (linked / "ground_truth/broken").symlink_to(category / "ground_truth/broken")
    put(linked / "ground_truth/broken/a_mask.png")
    samples = category_samples(linked)
    assert [s.image_path.relative_to(linked / "test").as_posix() for s in samples] == ["broken/a.png", "good/000.png", "good/001.JPG"]
    assert samples[0].mask_path == linked / "ground_truth/broken/a_mask.png"
    (tmp_path / "alias").symlink_to(linked)
    assert category_samples(tmp_path / "alias")[0].category == "alias"


def test_expand_paths(category, tmp_path):
    folder = tmp_path / "new"
    for name in ("b.png", "a.JPG", "sub/c.png", "ground_truth/b.png", ".hidden/d.png"):
        put(folder / name)
    (folder / "alias.png").symlink_to(folder / "b.png")
    odd = put(tmp_path / "z.png").rename(tmp_path / "camera.dat")
    got = expand_paths([odd, folder, folder / "a.JPG", str(folder / "sub/../b.png")])
    assert names(tmp_path, got) == ["camera.dat", "new/a.JPG", "new/alias.png", "new/sub/c.png"]
    assert expand_paths([]) == []
    with pytest.raises(DataError, match="no such file or folder"):
        expand_paths([folder, tmp_path / "nowhere.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images"):
        expand_paths([tmp_path / "empty"])


def test_fingerprint(category, tmp_path):
    files = good_images(category)
    before = fingerprint(files)
    assert before == fingerprint(files[::-1]) == fingerprint([os.path.relpath(p) for p in files])
    moved = shutil.copytree(category, tmp_path / "elsewhere/bottle")
    assert fingerprint(good_images(moved)) == before
    assert fingerprint(files[:-1]) != before
    (moved / "train/good/000.png").rename(moved / "train/good/009.png")
    assert fingerprint(good_images(moved)) != before
    put(files[0], value=1)
    assert fingerprint(files) != before
    assert len(fingerprint([])) == 64


def files(folder: Path, contents: Iterable[object]) -> list[Path]:
    """Files of these contents, sorted."""
    folder.mkdir()
    paths = [folder / f"{index:03}.png" for index, _ in enumerate(contents)]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(str(content))
    return paths


def test_file_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    big = b"0123456789abcdef" * 200_000
    (tmp_path / "b").write_bytes(big)
    assert file_digest(str(tmp_path / "b")) == hashlib.sha256(big).hexdigest()
    with pytest.raises(DataError, match=r"gone: cannot be read \(No such file"):
        file_digest(tmp_path / "gone")


def test_split_held_out(tmp_path):
    paths = files(tmp_path / "images", range(10))
    kept, held_out = split_held_out(paths, 0.2, 3, seed=0)
    assert len(held_out) == 3
    assert sorted(kept + held_out) == paths
    assert kept == sorted(kept)
    assert held_out == sorted(held_out)
    assert split_held_out(paths, 0.2, 3, seed=0) == (kept, held_out)
    assert len({tuple(split_held_out(paths, 0.2, 3, seed=seed)[1]) for seed in range(20)}) > 5
    assert len(split_held_out(paths, 0.4, 0, seed=0)[1]) == 4
    assert [len(split_held_out(paths[:n], 0.1, 8, seed=0)[1]) for n in (0, 1, 2, 5, 10)] == [0, 0, 1, 2, 5]
    with pytest.raises(ValueError, match="share"):
        split_held_out(paths, 1.5, 0, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_split_of_different_files_is_that_of_their_places(tmp_path, seed):
    """Models know their held-out images by it: it must never change."""
    paths = files(tmp_path / "images", range(60))
    for total, share, minimum in ((60, 0.2, 10), (24, 0.2, 12), (9, 0.5, 0), (7, 0.1, 8)):
        count = min(max(minimum, round(share * total)), total // 2)
        chosen = sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())
        kept, held_out = split_held_out(paths[:total], share, minimum, seed)
        assert held_out == [paths[index] for index in chosen]
        assert kept == [path for path in paths[:total] if path not in held_out]


@pytest.mark.parametrize("seed", range(10))
def test_copies_stay_on_one_side_of_the_split(tmp_path, seed):
    contents = np.random.default_rng(seed).integers(0, 30, 80).tolist()
    paths = files(tmp_path / "images", contents)
    kept, held_out = split_held_out(paths, 0.2, 12, seed)
    assert sorted(kept + held_out) == paths
    sides = [{path.read_text() for path in side} for side in (kept, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[1]) == 12  # different ones
    (tmp_path / "again").mkdir()
    moved = [path.rename(tmp_path / "again" / path.name) for path in paths]
    assert [path.name for path in split_held_out(moved, 0.2, 12, seed)[1]] == [path.name for path in held_out]


def test_too_many_copies_to_split(tmp_path):
    paths = files(tmp_path / "images", [0, 1, 2, 3, 4, *[5] * 30])
    assert len(split_held_out(paths, 0.0, 3, seed=0)[0]) >= 3
    with pytest.raises(DataError, match=r"images: of 35 images only 6 differ, .* at least 8 different ones are needed to hold 4 out"):
        split_held_out(paths, 0.0, 4, seed=0)
