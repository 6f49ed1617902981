"""The parity program, over golden vectors of the published algorithm where they are at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gladad.interop.parity import main

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "golden.json").is_file(), reason="golden vectors are not at ../shared/golden beside the repository"
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A writable copy of the golden directory with its first reconstruction, first scoring case and the training target."""
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    description = json.loads((folder / "golden.json").read_text())
    description["cases"], description["scoring"] = description["cases"][:1], description["scoring"][:1]
    (folder / "golden.json").write_text(json.dumps(description))
    return folder


def change(folder: Path, name: str, amount: float) -> None:
    tensors = load_file(folder / "golden.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += amount
    save_file(tensors, folder / "golden.safetensors")


@needs_golden
def test_every_case_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    description = json.loads((GOLDEN / "golden.json").read_text())
    passed = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert passed == [case["name"] for case in description["cases"] + description["scoring"]] + ["train"]


@needs_golden
@pytest.mark.parametrize("what", ["reconstruction", "step", "maps", "scores", "train.target"])
def test_a_changed_tensor_fails(small: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    description = json.loads((small / "golden.json").read_text())
    owner = description["cases" if what in {"reconstruction", "step"} else "scoring"][0]["name"]
    name = what if "." in what else f"{owner}.{what}"
    change(small, name, float("nan") if what == "maps" else 30 if what == "step" else 1e-3)
    assert main([str(small)]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL ")]
    assert any(name.split(".")[0] in line for line in failures)


@needs_golden
def test_another_decision_fails(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = json.loads((small / "golden.json").read_text())
    description["cases"][0]["threshold"] = 0.0  # now every image stops at the first call
    description["scoring"] = []
    (small / "golden.json").write_text(json.dumps(description))
    assert main([str(small)]) == 1
    assert "expected [" in capsys.readouterr().out


@needs_golden
def test_names_are_not_wired_in(small: Path) -> None:
    description = json.loads((small / "golden.json").read_text())
    tensors = load_file(small / "golden.safetensors")
    for kind, new in (("cases", "renamed"), ("scoring", "rescored")):
        old = description[kind][0]["name"]
        description[kind][0]["name"] = new
        tensors = {new + name.removeprefix(old) if name.startswith(f"{old}.") else name: x for name, x in tensors.items()}
    (small / "golden.json").write_text(json.dumps(description))
    save_file(tensors, small / "golden.safetensors")
    assert main([str(small)]) == 0


@needs_golden
def test_a_missing_tensor_or_key_is_not_a_golden_directory(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(small / "golden.safetensors")
    description = json.loads((small / "golden.json").read_text())
    del tensors[f"{description['cases'][0]['name']}.noise"]
    save_file(tensors, small / "golden.safetensors")
    assert main([str(small)]) == 2
    assert ".noise" in capsys.readouterr().err
    del description["cases"][0]["denoise_step"]
    (small / "golden.json").write_text(json.dumps(description))
    assert main([str(small)]) == 2
    assert "denoise_step" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "[]", '{"cases": 3}'])
def test_other_folders_are_refused_in_one_line(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "golden.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("parity: ") and len(captured.err.splitlines()) == 1
    assert not captured.out
