"""The way to the published numbers, walked on a tiny base."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_category
from tiny_base import build_base

import gladad

SCRIPT = Path(gladad.__file__).parents[2] / "scripts" / "reproduce.py"
QUICK = (
    *("image_size=64", "max_images=12", "calibration=held-out", "training.steps=1", "training.batch_size=2", "training.pool=1"),
    *("training.precision=float32", "reconstruction.num_steps=3", "calibrate_step=false"),
)


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    """The script, in this process."""
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_from_a_data_set_to_the_table(tmp_path, main, capfd):
    base = build_base(tmp_path / "base")
    write_category(tmp_path / "mvtec_ad" / "bottle", train=12, test=1)
    arguments = ["--data", str(tmp_path), "-o", str(tmp_path / "out"), "--base", str(base), "--category", "bottle"]
    for change in QUICK:
        arguments += ["--set", change]

    assert main([*arguments, "--check"]) == 0
    assert "1 categories, 1 trainings, 1 steps of 2 images of 64 pixels" in capfd.readouterr().out
    assert not (tmp_path / "out" / "cells").exists()

    assert main(arguments) == 0
    done = capfd.readouterr().out
    assert "1 of 1 categories" in done and "99.3" in done
    assert main(arguments) == 0
    again = capfd.readouterr().out
    assert "1 of 1 cells were finished before" in again
    assert again.splitlines()[-5:] == done.splitlines()[-5:]


def test_what_cannot_end_well_is_refused_before_anything_is_trained(tmp_path, main, capfd):
    write_category(tmp_path / "mvtec_ad" / "bottle", train=2, test=1)
    base, start = build_base(tmp_path / "base"), ["--data", str(tmp_path), "-o", str(tmp_path / "out")]
    large = ["--category", "bottle", "--set", "training.batch_size=100000000", "--set", "image_size=64"]
    refused = {
        "left out cable, capsule, carpet": [],
        "--configuration must be one of lite": ["--configuration", "x"],
        "--set takes NAME=VALUE": ["--set", "x"],
        "training needs": [*large, "--base", str(base)],
        "lite has nothing to be checked beforehand": ["--category", "bottle", "--configuration", "lite"],
        "nowhere": [*large, "--base", str(tmp_path / "nowhere")],
    }
    for message, flags in refused.items():
        assert main([*start, *flags]) == 1
        assert message in capfd.readouterr().err
