"""Checkpoints: whole or not used, the newest of them, and only of the same training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gladad.core.errors import ConfigError, DataError
from gladad.core.storage import WriteError
from gladad.training.checkpoints import MANIFEST_FILE, STATE_FILE, TENSORS_FILE, Checkpoint, Checkpoints, discard


def made(step: int) -> Checkpoint:
    return Checkpoint(step, {"weights.a": torch.full((3,), float(step))}, {"losses": [0.1 * n for n in range(step)]})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(tmp_path / "run", {"seed": 1, "rate": 0.5})
    found.start()
    return found


def test_what_is_written_is_read(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    place = checkpoints.save(made(5))
    assert {path.name for path in place.iterdir()} == {TENSORS_FILE, STATE_FILE, MANIFEST_FILE}
    found = checkpoints.newest()
    assert found is not None and found.step == 5 and found.state == made(5).state
    assert torch.equal(found.tensors["weights.a"], made(5).tensors["weights.a"])


def test_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 15, 100):
        checkpoints.save(made(step))
    assert sorted(path.name for path in checkpoints.folder.glob("step-*")) == ["step-0000015", "step-0000100"]
    assert checkpoints.newest().step == 100  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [TENSORS_FILE, STATE_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_a_damaged_checkpoint_gives_way_to_an_earlier_one(checkpoints: Checkpoints, name: str, damage: str) -> None:
    told: list[str] = []
    checkpoints.tell = told.append
    checkpoints.save(made(5))
    file = checkpoints.save(made(10)) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "short":
        file.write_bytes(content[:-3])
    else:  # one bit, of the same size
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    found = checkpoints.newest()
    assert found is not None and found.step == 5
    assert len(told) == 1 and name in told[0] and told[0].endswith("an earlier checkpoint is used")
    checkpoints.save(made(10))  # takes the place of the damaged one
    assert checkpoints.newest().step == 10  # type: ignore[union-attr]


def test_what_a_kill_left_half_written_is_removed_and_never_read(checkpoints: Checkpoints) -> None:
    checkpoints.save(made(5))
    half = checkpoints.folder / ".step-0000010.abc.partial"
    half.mkdir()
    (half / TENSORS_FILE).write_bytes(b"half")
    (checkpoints.folder / ".step-0000001.old").mkdir()
    assert checkpoints.newest().step == 5  # type: ignore[union-attr]
    checkpoints.start()
    assert not list(checkpoints.folder.glob(".*"))


def test_checkpoints_of_another_training_are_refused(checkpoints: Checkpoints) -> None:
    checkpoints.save(made(5))
    with pytest.raises(ConfigError, match=r"another training \(rate, size differ\); remove the folder"):
        Checkpoints(checkpoints.folder, {"seed": 1, "rate": 0.4, "size": 3})
    assert Checkpoints(checkpoints.folder, {"rate": 0.5, "seed": 1}).newest().step == 5  # type: ignore[union-attr]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no checkpoints"):
        Checkpoints(tmp_path, {})
    with pytest.raises(DataError, match="not a folder"):
        Checkpoints(tmp_path / "mine.txt", {})


def test_a_full_disk_costs_no_earlier_checkpoint(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(made(5))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gladad.training.checkpoints.save_tensors", full)
    with pytest.raises(WriteError, match="No space left"):
        checkpoints.save(made(10))
    assert [path.name for path in checkpoints.folder.iterdir() if path.name.startswith((".", "step"))] == ["step-0000005"]


def test_a_finished_training_leaves_its_logs_and_makes_way_for_another(checkpoints: Checkpoints) -> None:
    checkpoints.save(made(5))
    other = Checkpoints(checkpoints.folder / "inner", {})
    other.start()
    other.save(made(3))
    logs = checkpoints.folder / "logs"
    logs.mkdir()
    discard(checkpoints.folder)
    assert {path.name for path in checkpoints.folder.iterdir()} == {"logs", "inner"}
    assert other.newest().step == 3  # type: ignore[union-attr]
    discard(other.folder)
    assert not other.folder.exists()
    (checkpoints.folder / ".training.json.x.partial").write_text("{")
    again = Checkpoints(checkpoints.folder, {"seed": 2})
    again.start()
    assert again.newest() is None
    logs.rmdir()
    discard(checkpoints.folder)
    assert not checkpoints.folder.exists()
    discard(checkpoints.folder)


def test_a_checkpoint_is_not_removed_for_a_damaged_one_of_a_later_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", {}, keep=1)
    checkpoints.start()
    (checkpoints.save(made(1000)) / STATE_FILE).unlink()
    assert checkpoints.newest() is None
    checkpoints.save(made(500))
    assert checkpoints.newest().step == 500  # type: ignore[union-attr]


def test_the_manifest_has_sizes_and_hashes(checkpoints: Checkpoints) -> None:
    place = checkpoints.save(made(5))
    files = json.loads((place / MANIFEST_FILE).read_text())["files"]
    assert files.keys() == {TENSORS_FILE, STATE_FILE}
    assert all(entry["bytes"] == (place / name).stat().st_size and len(entry["sha256"]) == 64 for name, entry in files.items())
