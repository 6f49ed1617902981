"""Tables of images, as people, spreadsheets and scripts write them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gladad.core.errors import DataError
from gladad.data.layouts import read_dataset
from gladad.data.manifests import is_visa_table, read_manifest


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(path)
    return path


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_csv(tmp_path):
    outside = put(tmp_path / "elsewhere/x.png")
    for name in ("a.png", "deep/b.PNG", "deep/b_mask.png", "c(1).png"):
        put(tmp_path / "set" / name)
    manifest = write(
        tmp_path / "set/parts.csv",
        "image,label,mask,category,split,defect_type,camera\n"
        "a.png,0,,nut,train,,left\n"
        "\n"
        "deep\\b.PNG,anomalous,deep\\b_mask.png,nut,test,dent,right\n"
        f'"{outside}",OK,,bolt,val,ignored,\n'
        "c(1).png,1,,bolt,testing\n"
        "gone\\d.png,,,bolt,test,,\n"
        "gone\\d.png,ng,,bolt,test,,\n",
    )
    root = tmp_path / "set"
    samples, unlabelled = read_manifest(manifest, root)
    assert [(s.image_path, s.mask_path, s.gt_label, s.category, s.defect_type, s.split) for s in samples] == [
        (root / "a.png", None, 0, "nut", "good", "train"),
        (root / "deep/b.PNG", root / "deep/b_mask.png", 1, "nut", "dent", "test"),
        (outside, None, 0, "bolt", "good", "validation"),
        (root / "c(1).png", None, 1, "bolt", "bad", "test"),
        (root / "gone/d.png", None, 1, "bolt", "bad", "test"),
    ]
    assert ([s.line for s in samples], unlabelled) == ([2, 4, 5, 6, 8], 1)
    dataset = read_dataset(manifest)
    assert (dataset.layout, dataset.categories, dataset.unlabelled) == ("manifest", ("bolt", "nut"), 1)
    assert set(samples) == set(dataset.samples) and len(dataset.samples) == 5
    nut = read_dataset(manifest, category="nut")
    assert [s.line for s in nut.samples] == [2, 4]
    with pytest.raises(DataError, match=r"parts\.csv: no category 'cog'; it has bolt, nut"):
        read_dataset(manifest, category="cog")


def test_json_lines(tmp_path):
    rows = [
        {"image_path": "a.png", "gt_label": 0, "split": "train", "category": 7},
        {"image": "b\u2028.png", "label": True, "mask": None, "split": "test", "defect_type": "dent", "extra": [1]},
        {"image": "c.png", "label": 1.0, "mask": "masks/c.png"},
        {"image": "d.png", "label": None},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    samples, unlabelled = read_manifest(write(tmp_path / "nut.JSONL", text + "\n\n", "utf-8-sig"), tmp_path)
    assert [(s.image_path.name, s.gt_label, s.category, s.defect_type, s.split) for s in samples] == [
        ("a.png", 0, "7", "good", "train"),
        ("b\u2028.png", 1, "nut", "dent", "test"),
        ("c.png", 1, "nut", "bad", "test"),
    ]
    assert samples[2].mask_path == tmp_path / "masks/c.png"
    assert ([s.line for s in samples], unlabelled) == ([1, 2, 3], 1)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_spreadsheets_write(tmp_path, delimiter, encoding, newline):
    lines = [["Image", " Label "], ["ä, ö; ü.png", "good"], ["b.png", "bad"]]
    text = newline.join(delimiter.join(f'"{cell}"' for cell in cells) for cells in lines)
    samples, _ = read_manifest(write(tmp_path / "nut.csv", text, encoding), tmp_path)
    assert [(s.image_path.name, s.gt_label) for s in samples] == [("ä, ö; ü.png", 0), ("b.png", 1)]


def test_without_a_split_all_is_test(tmp_path):
    manifest = write(tmp_path / "nut.csv", "image,label\na.png,0\nb.png,1\n")
    dataset = read_dataset(manifest)
    assert [s.split for s in dataset.samples] == ["test", "test"] == [s.split for s in dataset.test_samples()]
    with pytest.raises(DataError, match=r"nut\.csv: no good images to learn from in this manifest data set; rows without a split"):
        dataset.training_images()


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_accents_match_in_either_form(tmp_path, written):
    there = put(tmp_path / unicodedata.normalize("NFD" if written == "NFC" else "NFC", "grün.png"))
    manifest = write(tmp_path / "nut.csv", f"image,label\n{unicodedata.normalize(written, 'grün.png')},0\n")
    assert read_manifest(manifest, tmp_path)[0][0].image_path == there


def test_a_backslash_can_be_part_of_a_name(tmp_path):
    there = put(tmp_path / "a\\b.png")
    put(tmp_path / "a/b.png")
    assert read_manifest(write(tmp_path / "nut.csv", "image,label\na\\b.png,0\n"), tmp_path)[0][0].image_path == there


WRONG = {
    "empty": ("csv", "", "no column image or label in its first line; needed are image and label"),
    "header only": ("csv", "image,label\n", "no rows; write one for each image"),
    "empty lines": ("jsonl", "\n\n", "no rows; write one for each image"),
    "no labels": ("csv", "image,label\na.png,\n", "no rows with a label"),
    "no column": ("csv", "image,split\na.png,test\n", "no column label in its first line"),
    "no image": ("csv", "image,label\n ,0\n", "line 2: no image; write its path"),
    "label": ("csv", "image,label\na.png,0\na.png,scratch\n", "line 3: label 'scratch' is unknown; write 0 or normal, 1 or anomalous"),
    "split": ("csv", "image,label,split\na.png,0,holdout\n", "line 2: split 'holdout' is unknown; write train, validation or test"),
    "no split": ("csv", "image,label,split\na.png,0,\n", "line 2: split '' is unknown"),
    "comma": ("csv", "image,label\na, b.png,0\n", "line 2: more values than columns; quote values that hold ','"),
    "quote": ("csv", 'image,label\n"a.png"x,0\n', "line 2: not CSV"),
    "two names": ("csv", "image,image_path,label\na.png,b.png,0\n", "line 2: two different values for image; keep one"),
    "not JSON": ("jsonl", '{"image": "a.png", "label": 0}\n{"image"\n', "line 2: not JSON"),
    "no object": ("jsonl", '["a.png", 0]\n', "line 1: not a JSON object; needed are image and label"),
    "no key": ("jsonl", '\n{"image": "a.png"}\n', "line 2: no key label; needed are image and label"),
    "number": ("jsonl", '{"image": 3, "label": 0}\n', "line 1: image must be a path, not 3"),
    "list": ("jsonl", '{"image": "a", "label": 1, "mask": ["b"]}\n', "line 1: mask must be a path"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line_that_names_the_place(tmp_path, case):
    suffix, text, message = WRONG[case]
    path = write(tmp_path / f"nut.{suffix}", text)
    with pytest.raises(DataError) as caught:
        read_dataset(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(tmp_path, encoding):
    with pytest.raises(DataError, match=r"nut\.csv: is not UTF-8 text; save it as UTF-8"):
        read_dataset(write(tmp_path / "nut.csv", "image,label\nü.png,0\n", encoding))


def test_tables_of_visa_are_told_from_others(tmp_path):
    assert is_visa_table(write(tmp_path / "a.csv", "object,split,label,image,mask\n", "utf-8-sig"))
    assert not is_visa_table(write(tmp_path / "b.csv", "category,split,label,image,mask\n"))
    assert not is_visa_table(write(tmp_path / "c.jsonl", "object,split,label,image,mask\n"))
