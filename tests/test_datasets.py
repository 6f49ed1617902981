"""Every layout on a generated tree, with the traps of the real ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gladad.core.errors import DataError
from gladad.core.images import load_mask
from gladad.data.layouts import LAYOUTS, Dataset, labelled_samples, one_category, read_dataset, training_images
from gladad.data.samples import good_images


def put(root: Path, *names: str, value: int = 0) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(root / name)


def table(dataset: Dataset) -> dict[str, tuple[str, str, int, str, str | None]]:
    """Image -> (category, split, label, kind, mask), paths from the root."""

    def inside(path: Path) -> str:
        return path.relative_to(dataset.root if dataset.root.is_dir() else dataset.root.parent).as_posix()

    return {
        inside(s.image_path): (s.category, s.split, s.gt_label, s.defect_type, s.mask_path and inside(s.mask_path)) for s in dataset.samples
    }


def mvtec(root: Path) -> Path:
    put(root, "train/good/000.png", "train/good/000(1).png", "train/good/001.PNG", "test/good/000.png")
    put(root, "test/scratch/000.png", "test/scratch/001.JPG", "test/scratch/002.png", "test/dent/000.png")
    put(root, "ground_truth/scratch/000_mask.png", "ground_truth/scratch/001_mask.PNG", "ground_truth/dent/000.png", value=255)
    (root / "license.txt").write_text("text")
    (root / "test/scratch/Thumbs.db").write_text("text")
    (root / "test/scratch/._000.png").write_text("AppleDouble")
    (root / "train/good/.DS_Store").write_text("text")
    return root


def test_mvtec_ad(tmp_path):
    dataset = read_dataset(mvtec(tmp_path / "bottle"))
    assert (dataset.layout, dataset.categories, dataset.unlabelled, dataset.orphans) == ("mvtec_ad", ("bottle",), 0, {})
    assert table(dataset) == {
        "test/dent/000.png": ("bottle", "test", 1, "dent", "ground_truth/dent/000.png"),
        "test/good/000.png": ("bottle", "test", 0, "good", None),
        "test/scratch/000.png": ("bottle", "test", 1, "scratch", "ground_truth/scratch/000_mask.png"),
        "test/scratch/001.JPG": ("bottle", "test", 1, "scratch", "ground_truth/scratch/001_mask.PNG"),
        "test/scratch/002.png": ("bottle", "test", 1, "scratch", None),
        "train/good/000(1).png": ("bottle", "train", 0, "good", None),
        "train/good/000.png": ("bottle", "train", 0, "good", None),
        "train/good/001.PNG": ("bottle", "train", 0, "good", None),
    }
    assert training_images(dataset.root) == dataset.training_images() == good_images(dataset.root)
    assert {s.image_path: s for s in labelled_samples(dataset.root)} == {s.image_path: s for s in dataset.test_samples()}


def test_several_categories_are_one_data_set(tmp_path):
    mvtec(tmp_path / "bottle")
    shutil.copytree(tmp_path / "bottle", tmp_path / "käse")
    (tmp_path / "linked").symlink_to(tmp_path / "bottle")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    put(tmp_path, "textures/banded/a.png", "_excluded_empty_mask/good/a.png", "__MACOSX/bottle/train/good/a.png", "loose.png")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "readme.txt").write_text("text")
    dataset = read_dataset(tmp_path)
    assert dataset.categories == ("bottle", "käse", "linked")
    assert [len(read_dataset(tmp_path, category=name).samples) for name in dataset.categories] == [8, 8, 8]
    assert len(dataset.samples) == 24
    assert dataset.notes == ["left out, because there is no train/, test/ or good/ in it: textures"]
    with pytest.raises(DataError, match="no category 'cable'; it has bottle, käse, linked"):
        read_dataset(tmp_path, category="cable")
    for function in (training_images, labelled_samples, one_category):
        with pytest.raises(DataError, match="holds the categories bottle, käse, linked; choose one with --category"):
            function(tmp_path)
    assert training_images(tmp_path, category="käse") == good_images(tmp_path / "käse")
    assert {s.category for s in labelled_samples(tmp_path, category="linked")} == {"linked"}


def test_categories_one_deeper(tmp_path):
    mvtec(tmp_path / "1cls/candle")
    mvtec(tmp_path / "1cls/fryum")
    assert read_dataset(tmp_path).categories == ("candle", "fryum")
    with pytest.raises(DataError, match="holds the categories candle, fryum"):
        good_images(tmp_path)
    mvtec(tmp_path / "2cls/candle")
    assert read_dataset(tmp_path).categories == ("1cls/candle", "1cls/fryum", "2cls/candle")
    assert len(read_dataset(tmp_path, category="2cls/candle").samples) == 8


def test_part_of_a_category(tmp_path, monkeypatch):
    root = mvtec(tmp_path / "bottle")
    train, test = read_dataset(root / "train"), read_dataset(root / "test")
    assert (train.part, test.part, train.layout, test.layout) == ("train", "test", "mvtec_ad", "mvtec_ad")
    assert {(s.category, s.split) for s in train.samples} == {("bottle", "train")} and len(train.samples) == 3
    assert {(s.category, s.split) for s in test.samples} == {("bottle", "test")} and len(test.samples) == 5
    assert sum(s.mask_path is not None for s in test.samples) == 3
    assert read_dataset(root / "train/good").categories == ("bottle",)
    monkeypatch.chdir(root / "train")
    assert {s.category for s in read_dataset(".").samples} == {"bottle"} and len(read_dataset(".").samples) == 3
    with pytest.raises(DataError, match="test images are not for learning"):
        read_dataset(root / "test/good")
    with pytest.raises(DataError, match="test images are not for learning"):
        training_images(root / "test")


def test_anomalous_training_images_are_recorded_and_not_learnt_from(tmp_path):
    root = mvtec(tmp_path / "bottle")
    put(root, "train/scratch/000.png", "validation/good/000.png", "validation/scratch/000.png")
    dataset = read_dataset(root)
    rows = table(dataset)
    assert rows["train/scratch/000.png"] == ("bottle", "train", 1, "scratch", None)  # 000_mask.png is that of the test image
    assert rows["validation/good/000.png"] == ("bottle", "validation", 0, "good", None)
    assert rows["validation/scratch/000.png"] == ("bottle", "validation", 1, "scratch", None)
    assert [p.parent.name for p in dataset.training_images()] == ["good", "good", "good"]


def test_images_without_a_label_are_counted(tmp_path):
    root = mvtec(tmp_path / "bottle")
    put(root, "test/loose.png", "test/another.JPG")
    dataset = read_dataset(root)
    assert (len(dataset.samples), dataset.unlabelled) == (8, 2)


def test_mvtec_loco(tmp_path):
    root = tmp_path / "loco/pushpins"
    put(root, "train/good/000.png", "validation/good/000.png", "test/good/000.png")
    put(root, "test/logical_anomalies/000.png", "test/logical_anomalies/001.png", "test/structural_anomalies/000.png")
    for kind, number, part, value in (("logical", "000", "000", 255), ("logical", "000", "001", 254), ("structural", "000", "000", 249)):
        file = root / f"ground_truth/{kind}_anomalies/{number}/{part}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((10, 12), np.uint8)
        mask[int(part) * 5, :] = value
        Image.fromarray(mask).save(file)
    put(root, "ground_truth/structural_anomalies/007/000.png")
    dataset = read_dataset(tmp_path / "loco")
    assert dataset.layout == "mvtec_loco"
    rows = {name.removeprefix("pushpins/"): row[1:4] for name, row in table(dataset).items()}
    assert rows["validation/good/000.png"] == ("validation", 0, "good")
    assert rows["test/structural_anomalies/000.png"] == ("test", 1, "structural_anomalies")
    masks = {s.image_path.relative_to(root / "test").as_posix(): s.mask_path for s in dataset.of("test")}
    assert masks["logical_anomalies/000.png"] == root / "ground_truth/logical_anomalies/000"
    assert masks["logical_anomalies/001.png"] is None
    assert load_mask(masks["logical_anomalies/000.png"]).any(axis=1).tolist() == [True] + [False] * 4 + [True] + [False] * 4
    assert dataset.orphans == {"pushpins": [root / "ground_truth/structural_anomalies/007/000.png"]}


def test_mvtec_ad_2(tmp_path):
    root = tmp_path / "can"
    put(root, "train/good/000_regular.png", "validation/good/000_regular.png", "test_private/000.png", "test_private_mixed/000.png")
    put(root, "test_public/good/000_regular.png", "test_public/bad/000_regular.png", "test_public/ground_truth/bad/000_regular_mask.png")
    dataset = read_dataset(root)
    assert (dataset.layout, dataset.unlabelled, dataset.orphans) == ("mvtec_ad_2", 2, {})
    assert table(dataset) == {
        "test_public/bad/000_regular.png": ("can", "test", 1, "bad", "test_public/ground_truth/bad/000_regular_mask.png"),
        "test_public/good/000_regular.png": ("can", "test", 0, "good", None),
        "train/good/000_regular.png": ("can", "train", 0, "good", None),
        "validation/good/000_regular.png": ("can", "validation", 0, "good", None),
    }


def test_btad(tmp_path):
    put(tmp_path, "01/train/ok/0000.bmp", "01/test/ok/0000.bmp", "01/test/ko/0001.bmp", "01/ground_truth/ko/0001.png")
    put(tmp_path, "03/train/ok/0000.bmp", "03/test/ok/0000.bmp", "03/test/ko/0001.png", "03/ground_truth/ko/0001.bmp")
    dataset = read_dataset(tmp_path)
    assert dataset.layout == "btad"
    assert table(dataset) == {
        f"{name}/{image}": (name, *row)
        for name, suffix, mask in (("01", "bmp", "png"), ("03", "png", "bmp"))
        for image, row in {
            f"test/ko/0001.{suffix}": ("test", 1, "ko", f"{name}/ground_truth/ko/0001.{mask}"),
            "test/ok/0000.bmp": ("test", 0, "good", None),
            "train/ok/0000.bmp": ("train", 0, "good", None),
        }.items()
    }


@pytest.mark.parametrize("layout", ["auto", "visa_1cls", "mpdd", "pcb_bank"])
def test_layouts_that_look_like_mvtec_ad(tmp_path, layout):
    put(tmp_path, "pcb1/train/good/0.JPG", "pcb1/test/good/1.JPG", "pcb1/test/bad/2.JPG", "pcb1/ground_truth/bad/2.png")
    dataset = read_dataset(tmp_path, layout)
    assert dataset.layout == ("mvtec_ad" if layout == "auto" else layout)
    assert table(dataset)["pcb1/test/bad/2.JPG"] == ("pcb1", "test", 1, "bad", "pcb1/ground_truth/bad/2.png")
    assert table(dataset)["pcb1/train/good/0.JPG"] == ("pcb1", "train", 0, "good", None)


# -- VisA -------------------------------------------------------------------------------------------------------


def visa(root: Path, *categories: str, tables: tuple[str, ...] = ("1cls", "2cls_highshot")) -> Path:
    """VisA's tree: ten normal images, the last for testing, and two anomalous ones, one of which 2cls_highshot has for training."""
    rows = {name: ["object,split,label,image,mask"] for name in tables}
    for category in categories:
        for index in range(10):
            image = f"{category}/Data/Images/Normal/{index:04}.JPG"
            put(root, image)
            for name in tables:
                rows[name].append(f"{category},{'test' if index == 9 else 'train'},normal,{image},")
        for index in range(2):
            image, mask = (
                f"{category}/Data/{folder}/Anomaly/{index:03}.{suffix}" for folder, suffix in (("Images", "JPG"), ("Masks", "png"))
            )
            put(root, image)
            put(root, mask, value=index + 1)
            for name in tables:
                rows[name].append(f"{category},{'train' if '2cls' in name and index == 0 else 'test'},anomaly,{image},{mask}")
    for name in tables:
        (root / "split_csv").mkdir(exist_ok=True)
        (root / f"split_csv/{name}.csv").write_text("\n".join(rows[name]) + "\n")
    (root / "LICENSE-DATASET").write_text("text")
    return root


def test_visa(tmp_path):
    root = visa(tmp_path / "VisA", "candle", "pcb1")
    dataset = read_dataset(root)
    assert (dataset.layout, dataset.categories, dataset.orphans, dataset.notes) == ("visa", ("candle", "pcb1"), {}, [])
    rows = table(dataset)
    assert len(rows) == 24
    assert rows["candle/Data/Images/Normal/0000.JPG"] == ("candle", "train", 0, "good", None)
    assert rows["candle/Data/Images/Normal/0009.JPG"] == ("candle", "test", 0, "good", None)
    assert rows["pcb1/Data/Images/Anomaly/001.JPG"] == ("pcb1", "test", 1, "bad", "pcb1/Data/Masks/Anomaly/001.png")
    assert all(load_mask(s.mask_path).all() for s in dataset.of("test") if s.mask_path)
    assert read_dataset(root / "split_csv").categories == dataset.categories
    assert read_dataset(root, category="pcb1").samples == [s for s in dataset.samples if s.category == "pcb1"]


def test_category_of_visa_finds_the_table_beside_it(tmp_path, monkeypatch):
    root = visa(tmp_path / "VisA", "candle", "pcb1")
    put(root, "candle/Data/Masks/Anomaly/077.png")
    dataset = read_dataset(root / "candle")
    assert dataset.categories == ("candle",) and len(dataset.of("train")) == 9
    assert dataset.orphans == {"candle": [root / "candle/Data/Masks/Anomaly/077.png"]}
    (tmp_path / "kerze").symlink_to(root / "candle")
    assert read_dataset(tmp_path / "kerze").categories == ("candle",)
    monkeypatch.chdir(root / "candle")
    assert [s.image_path.name for s in read_dataset(".").samples] == [s.image_path.name for s in dataset.samples]
    assert len(training_images(".")) == 9 and len(labelled_samples(".")) == 3


def test_tables_of_visa_are_chosen_by_their_path(tmp_path):
    root = visa(tmp_path / "VisA", "candle", "pcb1")
    dataset = read_dataset(root / "split_csv/2cls_highshot.csv")
    assert (dataset.layout, dataset.categories) == ("visa", ("candle", "pcb1"))
    assert sum(s.gt_label for s in dataset.of("train")) == 2
    assert len(dataset.training_images()) == 18 and all("Normal" in p.parts for p in dataset.training_images())
    (root / "split_csv/1cls.csv").unlink()
    assert len(read_dataset(root).of("train")) == 20  # the only one left
    (root / "split_csv/1cls_clear.csv").write_text((root / "split_csv/2cls_highshot.csv").read_text())
    with pytest.raises(DataError, match=r"has no 1cls\.csv but 1cls_clear\.csv, 2cls_highshot\.csv; give one of these"):
        read_dataset(root)


def test_part_of_visa(tmp_path):
    root = visa(tmp_path / "VisA", "candle", "pcb1")
    shutil.rmtree(root / "pcb1")
    dataset = read_dataset(root)
    assert dataset.categories == ("candle",)
    assert dataset.notes == ["left out, because the table names them but they are not there: pcb1"]
    shutil.rmtree(root / "candle")
    with pytest.raises(DataError, match=r"1cls\.csv: none of the categories that it names"):
        read_dataset(root)


@pytest.mark.parametrize("part", [".", "candle"])
def test_visa_without_a_table(tmp_path, part):
    root = visa(tmp_path / "VisA", "candle", tables=()) / part
    dataset = read_dataset(root)
    assert dataset.layout == "visa" and "no split_csv/1cls.csv: every 10th normal image" in dataset.notes[0]
    assert {s.image_path.name for s in dataset.of("test")} == {"0009.JPG", "000.JPG", "001.JPG"}
    assert all(s.mask_path for s in dataset.of("test") if s.gt_label)
    assert {p.name for p in training_images(root)} == {f"{index:04}.JPG" for index in range(9)}
    plain = read_dataset(root, layout="folders")
    assert len(plain.of("train")) == 10 and len(plain.of("test")) == 2
    with pytest.raises(
        DataError, match=r"good images and others; give the folder of the good ones, such as .*Normal|holds the categories candle"
    ):
        good_images(root)


def test_visa_among_others(tmp_path):
    visa(tmp_path / "VisA", "candle")
    mvtec(tmp_path / "mvtec/bottle")
    with pytest.raises(DataError, match=r"holds VisA and more; give .*VisA for the data set of 1cls\.csv"):
        read_dataset(tmp_path)


def test_nothing_of_visa(tmp_path):
    put(tmp_path, "a/b.png")
    with pytest.raises(DataError, match=r"no split_csv/1cls\.csv and no <category>/Data/Images/Normal"):
        read_dataset(tmp_path, "visa")


# -- plain folders ----------------------------------------------------------------------------------------------


def test_good_only(tmp_path):
    put(tmp_path / "nut", "good/a.png", "good/deeper/b.JPEG")
    for root in (tmp_path / "nut", tmp_path / "nut/good"):
        dataset = read_dataset(root)
        assert (dataset.layout, dataset.categories) == ("folders", ("nut",))
        assert [(s.image_path.name, s.split) for s in dataset.samples] == [("a.png", "train"), ("b.JPEG", "train")]
        with pytest.raises(DataError, match="no labelled test images in this folders data set"):
            dataset.test_samples()


def test_images_only(tmp_path):
    put(tmp_path / "nut", "a.png", "monday/b.png", "masks/a.png")
    assert [s.image_path.name for s in read_dataset(tmp_path / "nut").samples] == ["a.png", "b.png"]
    put(tmp_path / "nut", "monday/bad/c.png")
    with pytest.raises(DataError, match="holds good images and others"):
        read_dataset(tmp_path / "nut")


@pytest.mark.parametrize(
    "masks", ["masks/bad/{}.png", "ground_truth/bad/{}_mask.png", "Masks/{}.png", "mask/{}_mask.PNG", "bad/{}_mask.png"]
)
def test_good_and_bad_with_masks_in_many_places(tmp_path, masks):
    root = tmp_path / "nut"
    put(root, "good/a.png", "good/b.png", "bad/a.png", "bad/ü(1).jpg", "bad/none.png", "_put_aside/x.png")
    put(root, masks.format("a"), masks.format("ü(1)"))
    dataset = read_dataset(root)
    assert (dataset.layout, dataset.orphans) == ("folders", {})
    assert table(dataset) == {
        "bad/a.png": ("nut", "test", 1, "bad", masks.format("a")),
        "bad/none.png": ("nut", "test", 1, "bad", None),
        "bad/ü(1).jpg": ("nut", "test", 1, "bad", masks.format("ü(1)")),
        "good/a.png": ("nut", "train", 0, "good", None),
        "good/b.png": ("nut", "train", 0, "good", None),
    }
    assert [s.split for s in dataset.test_samples()] == ["test"] * 5  # in plain folders, all can be judged
    assert {s.image_path for s in labelled_samples(root)} == {s.image_path for s in dataset.test_samples()}
    assert [p.name for p in training_images(root)] == ["a.png", "b.png"]


def test_flat_masks_that_could_belong_to_two_kinds_belong_to_none(tmp_path):
    put(tmp_path, "good/0.png", "dent/0.png", "dent/1.png", "crack/0.png", "masks/0.png", "masks/1.png")
    dataset = read_dataset(tmp_path)
    assert {s.image_path.relative_to(tmp_path).as_posix() for s in dataset.samples if s.mask_path} == {"dent/1.png"}
    assert list(dataset.orphans.values()) == [[tmp_path / "masks/0.png"]]


def test_links_that_lead_back_up_are_no_kind_of_defect(tmp_path):
    root = mvtec(tmp_path / "bottle")
    (root / "test/again").symlink_to(root / "test")
    (root / "test/scratch/again").symlink_to(root / "test/scratch")
    (root / "test/scratch/deeper").mkdir()
    for folder in ("train/good", "test/good", "test/scratch/deeper", "ground_truth/scratch"):
        (root / folder / "up").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    assert len(read_dataset(root).samples) == 8
    assert len(good_images(root)) == len(good_images(root / "train/good")) == 3
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="no such file or folder"):
        read_dataset(tmp_path / "a")


# -- refusals ---------------------------------------------------------------------------------------------------


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    put(tmp_path, "images/a.png", "unlabelled/test/a.png")
    for path, layout, message in [
        ("nowhere", "auto", "nowhere: no such file or folder"),
        ("empty", "auto", "empty: no images to learn from; expected a folder of good images"),
        ("images/a.png", "auto", r"a\.png: is a single file; give a folder, or a manifest \(\.csv or \.jsonl\)"),
        ("notes.txt", "manifest", r"notes\.txt: is not a manifest; give a \.csv or \.jsonl file"),
        ("images", "manifest", "images: is not a manifest"),
        ("images/a.png", "mvtec_ad", "is a single file; the layout mvtec_ad is a folder"),
        ("notes.txt", "visa", "is not one of VisA's tables"),
        ("images", "btad", "no train or test folder, so the layout is not btad; try --layout folders"),
        ("images", "mvtec", "layout must be auto or one of mvtec_ad, .*not 'mvtec'"),
        ("unlabelled", "auto", r"no labelled images of the layout mvtec_ad; see docs/datasets\.md"),
    ]:
        with pytest.raises(DataError, match=message):
            read_dataset(tmp_path / path, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_documented(layout):
    text = (Path(__file__).parent.parent / "docs/datasets.md").read_text(encoding="utf-8")
    assert f"`{layout}`" in text
