"""What is wrong with files: one fault at a time in a sound data set, and the command that shows it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gladad.cli.main import main
from gladad.data import checks as data_checks
from gladad.data.checks import Inventory, check_dataset, describe_sizes, short_name
from gladad.data.layouts import read_dataset


def put(path: Path, seed: int, size: tuple[int, int] = (12, 10)) -> Path:
    """An image of ``(width, height)`` like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def put_mask(path: Path, size: tuple[int, int] = (12, 10), value: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[2:5, 3:6] = value
    Image.fromarray(mask).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound category."""
    root = tmp_path / "nut"
    for index in range(3):
        put(root / f"train/good/{index}.png", index)
        put(root / f"test/good/{index}.png", 10 + index)
        put(root / f"test/dent/{index}.png", 20 + index)
        put_mask(root / f"ground_truth/dent/{index}_mask.png")
    return root


def found(inventory: Inventory, root: Path) -> dict[str, list[str]]:
    """Text -> files, problems only if they are serious."""
    return {
        ("problem: " if f.serious else "note: ") + f.text: [p.relative_to(root).as_posix() for p in f.paths] for f in inventory.findings
    }


def test_a_sound_data_set(root):
    progress: list[tuple[str, int, int]] = []
    inventory = check_dataset(read_dataset(root), progress=lambda *call: progress.append(call))
    assert inventory.findings == [] and inventory.sound
    assert inventory.counts == {("nut", "train", "good"): 3, ("nut", "test", "good"): 3, ("nut", "test", "dent"): 3}
    assert inventory.masks == {("nut", "train", "good"): 0, ("nut", "test", "good"): 0, ("nut", "test", "dent"): 3}
    assert inventory.sizes == {"nut": {(12, 10): 9}}
    assert progress == [("reading files", done, 9) for done in range(1, 10)]


FAULTS = {
    "truncated": (
        lambda r: (r / "train/good/1.png").write_bytes((r / "train/good/1.png").read_bytes()[:100]),
        {"problem: " + data_checks.UNREADABLE: ["train/good/1.png"]},
    ),
    "no image": (lambda r: (r / "test/dent/x.png").write_text("text"), {
        "problem: " + data_checks.UNREADABLE: ["test/dent/x.png"],
        "problem: " + data_checks.NO_MASK: ["test/dent/x.png"],
    }),
    "broken mask": (
        lambda r: (r / "ground_truth/dent/1_mask.png").write_text("text"),
        {"problem: " + data_checks.BAD_MASK: ["ground_truth/dent/1_mask.png"]},
    ),
    "missing mask": (
        lambda r: (r / "ground_truth/dent/1_mask.png").unlink(),
        {"problem: " + data_checks.NO_MASK: ["test/dent/1.png"]},
    ),
    "no masks": (lambda r: shutil.rmtree(r / "ground_truth"), {"note: no masks, so no pixel metrics: nut": []}),
    "mask of another size": (
        lambda r: put_mask(r / "ground_truth/dent/1_mask.png", (10, 12)),
        {"problem: " + data_checks.OTHER_SIZE: ["ground_truth/dent/1_mask.png"]},
    ),
    "empty mask": (
        lambda r: put_mask(r / "ground_truth/dent/1_mask.png", value=0),
        {"note: " + data_checks.EMPTY_MASK: ["ground_truth/dent/1_mask.png"]},
    ),
    "mask of a normal image": (
        lambda r: (put_mask(r / "ground_truth/good/1_mask.png"), put_mask(r / "ground_truth/good/2_mask.png", value=0)),
        {"problem: " + data_checks.NORMAL_MASK: ["ground_truth/good/1_mask.png"]},
    ),
    "misnamed mask": (lambda r: (r / "ground_truth/dent/1_mask.png").rename(r / "ground_truth/dent/1_maske.png"), {
        "problem: " + data_checks.NO_MASK: ["test/dent/1.png"],
        "problem: " + data_checks.UNPAIRED: ["ground_truth/dent/1_maske.png"],
    }),
    "all masks misnamed": (lambda r: (r / "ground_truth/dent").rename(r / "ground_truth/dents"), {
        "problem: " + data_checks.NO_MASK: ["test/dent/0.png", "test/dent/1.png", "test/dent/2.png"],
        "problem: " + data_checks.UNPAIRED: [f"ground_truth/dents/{i}_mask.png" for i in range(3)],
    }),
    "mask too many": (
        lambda r: put_mask(r / "ground_truth/dent/7_mask.png"),
        {"note: " + data_checks.ORPHANS: ["ground_truth/dent/7_mask.png"]},
    ),
    "mask of two images": (
        lambda r: put(r / "test/dent/1.bmp", 99),
        {"note: " + data_checks.SHARED: ["ground_truth/dent/1_mask.png"]},
    ),
    "leak": (
        lambda r: shutil.copy(r / "train/good/0.png", r / "test/good/0.png"),
        {"problem: " + data_checks.LEAKED: ["test/good/0.png"]},
    ),
    "leak in another format": (
        lambda r: Image.open(r / "train/good/0.png").save(r / "test/good/x.bmp"),
        {"problem: " + data_checks.LEAKED: ["test/good/x.bmp"]},
    ),
    "leak into validation": (
        lambda r: (r / "validation/good").mkdir(parents=True) or os.link(r / "train/good/0.png", r / "validation/good/0.png"),
        {"problem: " + data_checks.LEAKED: ["validation/good/0.png"]},
    ),
    "copy": (
        lambda r: (r / "train/good/x.png").symlink_to(r / "train/good/0.png"),
        {"note: " + data_checks.COPIES: ["train/good/x.png"]},
    ),
    "contradiction": (
        lambda r: shutil.copy(r / "test/good/0.png", r / "test/dent/0.png"),
        {"problem: " + data_checks.CONTRADICTION: ["test/good/0.png"]},
    ),
    "anomalous in training": (
        lambda r: put(r / "train/dent/0.png", 99),
        {"problem: " + data_checks.IN_TRAINING: ["train/dent/0.png"]},
    ),
    "nothing to learn from": (
        lambda r: shutil.rmtree(r / "train/good"),
        {"problem: no good images to learn from: nut": []},
    ),
    "no test": (lambda r: (shutil.rmtree(r / "test"), shutil.rmtree(r / "ground_truth")), {"note: no labelled test images: nut": []}),
    "no good test images": (lambda r: shutil.rmtree(r / "test/good"), {"note: no good test images, so no AUROC: nut": []}),
    "no anomalous test images": (
        lambda r: (shutil.rmtree(r / "test/dent"), shutil.rmtree(r / "ground_truth")),
        {"note: no anomalous test images, so no AUROC: nut": []},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(root, fault):
    spoil, expected = FAULTS[fault]
    spoil(root)
    inventory = check_dataset(read_dataset(root))
    assert found(inventory, root) == expected
    assert inventory.sound == all(text.startswith("note: ") for text in expected)


def test_every_kind_of_finding_is_tested():
    tested = {text.partition(": ")[2] for _, expected in FAULTS.values() for text in expected}
    assert set(data_checks.FINDINGS) - tested == {data_checks.SUPERVISED}  # below


def test_remarks_say_which_and_why(root):
    shutil.copy(root / "train/good/0.png", root / "test/good/0.png")
    put_mask(root / "ground_truth/dent/1_mask.png", (11, 9))
    (root / "test/good/1.png").write_text("text")
    remarks = {f.text: f.remarks for f in check_dataset(read_dataset(root)).findings}
    assert remarks[data_checks.LEAKED] == ("in test; in train as train/good/0.png",)
    assert remarks[data_checks.OTHER_SIZE] == ("11x9, the image 12x10",)
    assert remarks[data_checks.UNREADABLE][0].startswith("not an image")


def test_serious_findings_come_first(root):
    put_mask(root / "ground_truth/dent/1_mask.png", value=0)
    shutil.rmtree(root / "train/good")
    assert [f.serious for f in check_dataset(read_dataset(root)).findings] == [True, False]


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_threads_finds_the_same(root, workers):
    shutil.copy(root / "train/good/0.png", root / "test/good/0.png")
    (root / "test/good/1.png").write_text("text")
    dataset = read_dataset(root)
    assert check_dataset(dataset, workers=workers) == check_dataset(dataset)


def test_every_file_is_read_once(root, monkeypatch):
    read: list[str] = []

    def counted(path: Path, *arguments):
        read.append(path.relative_to(root).as_posix())
        return opened(path, *arguments)

    opened = Path.open
    monkeypatch.setattr(Path, "open", counted)
    check_dataset(read_dataset(root))
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    assert len(files) == 12 and sorted(read) == files


def test_a_part_of_a_category_is_not_blamed_for_the_rest(root):
    assert found(check_dataset(read_dataset(root / "test")), root) == {}
    assert found(check_dataset(read_dataset(root / "train")), root) == {}


def test_plain_folders_have_no_split_to_leak_across(tmp_path):
    put(tmp_path / "good/a.png", 1)
    put(tmp_path / "bad/a.png", 2)
    put_mask(tmp_path / "masks/bad/a.png")
    inventory = check_dataset(read_dataset(tmp_path))
    assert [f.text[:27] for f in inventory.findings] == ["no train and test folders: "] and inventory.sound


def test_manifest(root):
    rows = ["image,label,split", "train/good/0.png,0,train", "train/good/0.png,0,train", "test/dent/0.png,1,train", "gone.png,1,test"]
    (root / "nut.csv").write_text("\n".join(rows))
    dataset = read_dataset(root / "nut.csv")
    inventory = check_dataset(dataset)
    problems = {f.text: (short_name(f.paths[0], dataset), f.remarks[0]) for f in inventory.findings if f.serious}
    assert problems == {
        data_checks.UNREADABLE: ("gone.png", "no such file, line 5"),
        data_checks.IN_TRAINING: ("test/dent/0.png", "line 4"),
    }
    assert [f.paths for f in inventory.findings if f.text == data_checks.COPIES] == [(root / "train/good/0.png",)]


def test_tables_of_visa_may_have_anomalous_training_images(root):
    (root / "2cls.csv").write_text(
        "object,split,label,image,mask\n"
        "train,train,normal,train/good/0.png,\n"
        "train,train,anomaly,test/dent/0.png,ground_truth/dent/0_mask.png\n"
        "train,test,normal,test/good/0.png,\n"
        "train,test,anomaly,test/dent/1.png,ground_truth/dent/1_mask.png\n"
    )
    inventory = check_dataset(read_dataset(root / "2cls.csv"))
    assert found(inventory, root) == {"note: " + data_checks.SUPERVISED: ["test/dent/0.png"]}


def test_describe_sizes(root):
    put(root / "train/good/x.png", 50, (30, 20))
    sizes = check_dataset(read_dataset(root)).sizes["nut"]
    assert describe_sizes(sizes) == "12x10 (9), 30x20 (1)"
    for width in (31, 32):
        put(root / f"train/good/{width}.png", width, (width, 9))
    assert describe_sizes(check_dataset(read_dataset(root)).sizes["nut"]) == "4 sizes, 12 to 32 wide and 9 to 20 high"


# -- the command ------------------------------------------------------------------------------------------------


def test_data_command_of_a_sound_data_set(root, capsys):
    put(root.parent / "textures/a.png", 1)
    assert main(["data", str(root.parent)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert cells == [["nut", "test", "dent", "3", "3"], ["nut", "test", "good", "3", ""], ["nut", "train", "good", "3", ""]]
    assert out.splitlines()[-4:] == [
        "layout mvtec_ad, 9 labelled images",
        "nut: 12x10",
        "note: left out, because there is no train/, test/ or good/ in it: textures",
        "no problems found",
    ]


def test_data_command_of_an_unsound_data_set(root, capsys):
    for index in range(12):
        shutil.copy(root / "train/good/0.png", root / f"test/good/x{index:02}.png")
    put_mask(root / "ground_truth/dent/7_mask.png")
    assert main(["data", str(root), "--quiet"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == 12
    assert lines[0] == f"problem: 12 {data_checks.LEAKED}"
    assert lines[1] == "    test/good/x00.png: in test; in train as train/good/0.png"
    assert lines[-1] == "    and 2 more"
    assert main(["data", str(root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["layout"], report["sound"], report["sizes"]) == ("mvtec_ad", False, {"nut": {"12x10": 21}})
    assert [(f["serious"], len(f["files"])) for f in report["findings"]] == [(True, 12), (False, 1)]
    assert report["counts"][0] == {"category": "nut", "split": "test", "defect_type": "dent", "images": 3, "masks": 3}


def test_data_command_prints_names_of_any_bytes(root, capsys):
    shutil.copy(root / "train/good/0.png", os.fsencode(root) + b"/test/good/\xff.png")
    assert main(["data", str(root)]) == 1
    assert "test/good/\ufffd.png: in test" in capsys.readouterr().out
    assert main(["data", str(root), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["files"][0].endswith("/\ufffd.png")


def test_data_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["data", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
