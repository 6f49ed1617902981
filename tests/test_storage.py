"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from gladad.core import storage
from gladad.core.errors import ModelFormatError
from gladad.core.storage import (
    FORMAT,
    FORMAT_VERSION,
    MODEL_FILE,
    WriteError,
    atomic_file,
    atomic_folder,
    check_target,
    read_json,
    read_model_file,
    write_json,
    write_text,
)
from gladad.core.tensors import load_tensors, save_tensors


class Crash(Exception):
    pass


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def put_model(folder: Path, text: str = "old") -> Path:
    with atomic_folder(folder) as temporary:
        write_json(temporary / MODEL_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION, "text": text})
        (temporary / "base").mkdir()
        write_text(temporary / "base" / "weights.txt", text)
    return folder


def test_a_model_is_written_and_read(tmp_path):
    folder = put_model(tmp_path / "deep" / "model")
    assert read_model_file(folder)["text"] == "old"
    assert (folder / "base/weights.txt").read_text() == "old"
    assert names(folder.parent) == ["model"]


def test_others_may_read_it(tmp_path):
    folder = put_model(tmp_path / "model")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / MODEL_FILE).stat().st_mode) == 0o644
    assert stat.S_IMODE((folder / "base").stat().st_mode) == 0o755


def test_a_model_is_replaced_as_a_whole(tmp_path):
    folder = put_model(tmp_path / "model")
    (folder / "base" / "left over").write_text("from before")
    put_model(folder, "new")
    assert tree(folder).keys() == {MODEL_FILE, "base/weights.txt"}
    assert (folder / "base/weights.txt").read_text() == "new"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("problem", [Crash, KeyboardInterrupt, full_disk])
def test_failure_leaves_the_old_model_and_nothing_else(tmp_path, problem):
    folder = put_model(tmp_path / "model")
    before = tree(folder)
    expected = WriteError if problem is full_disk else problem
    with pytest.raises(expected), atomic_folder(folder) as temporary:
        (temporary / MODEL_FILE).write_text("half")
        if problem is full_disk:
            full_disk()
        raise problem
    assert tree(folder) == before
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("problem", [Crash, KeyboardInterrupt, full_disk])
def test_failure_of_a_first_model_leaves_nothing(tmp_path, problem):
    expected = WriteError if problem is full_disk else problem
    with pytest.raises(expected), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "half").write_text("half")
        if problem is full_disk:
            full_disk()
        raise problem
    assert names(tmp_path) == []


def test_a_disk_that_fails_at_the_very_end(tmp_path, monkeypatch):
    folder = put_model(tmp_path / "model")
    before = tree(folder)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            full_disk()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WriteError, match=r"No space left.*nothing was changed"):
        put_model(folder, "new")
    assert tree(folder) == before
    assert names(tmp_path) == ["model"]


def test_folders_of_others_are_not_touched(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("dear to someone")
    with pytest.raises(WriteError, match="will not be overwritten"):
        put_model(folder)
    with pytest.raises(WriteError, match="will not be overwritten"):
        check_target(folder)
    assert tree(folder) == {"holiday.jpg": "dear to someone"}
    assert names(tmp_path) == ["photos"]


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "model").mkdir()
    put_model(tmp_path / "model")


def test_targets_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(WriteError, match="is not a folder"):
            check_target(tmp_path / name)
    with pytest.raises(WriteError, match="cannot be written"):
        check_target(tmp_path / "file" / "below" / "model")


def test_checking_a_target_leaves_no_trace(tmp_path):
    check_target(tmp_path / "model")
    assert names(tmp_path) == []


def test_a_relative_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_target(Path("model"))
    put_model(Path("model"))
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("problem", [Crash, full_disk])
def test_failure_leaves_the_old_file(tmp_path, problem):
    path = tmp_path / "report.json"
    write_text(path, "old")
    expected = WriteError if problem is full_disk else problem
    with pytest.raises(expected), atomic_file(path) as temporary:
        temporary.write_text("half")
        if problem is full_disk:
            full_disk()
        raise problem
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_files_are_synced_before_they_appear(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: synced.append(str((tmp_path / "text").exists())))
    write_text(tmp_path / "text", "whole")
    assert synced == ["False", "True"]  # the content before, the name after
    assert (tmp_path / "text").read_text() == "whole"


def test_equal_content_is_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, "ü"]})
    write_json(tmp_path / "b", {"a": [1.5, "ü"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_json(tmp_path / "a") == {"a": [1.5, "ü"], "b": 1}


def test_tensors(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones((), dtype=torch.bfloat16)}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) and loaded[name].dtype == tensors[name].dtype for name in tensors)


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"t\.safetensors"):
        save_tensors(tmp_path / "missing" / "t.safetensors", {"a": torch.ones(2)})


@pytest.mark.parametrize("content", [None, b"", b"no tensors", b"\xff" * 64])
def test_damaged_tensors(tmp_path, content):
    path = tmp_path / "t.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"t\.safetensors"):
        load_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a gladad model"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
        ('{"format": "another"}', "not a gladad model description"),
        ('{"format": "gladad-model", "format_version": 999}', "format version 999"),
    ],
)
def test_folders_that_are_no_models(tmp_path, content, message):
    if content is not None:
        (tmp_path / MODEL_FILE).write_text(content)
    with pytest.raises(ModelFormatError, match=message):
        read_model_file(tmp_path)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(ModelFormatError, match="no such folder"):
        read_model_file(tmp_path / "nowhere")
