"""Who may import whom: arrows go down only, and the door is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import gladad

SOURCE = Path(gladad.__file__).parent

# From the bottom up: a package may import from those before it, and from itself.
PACKAGES = (
    *("core", "algorithm", "data", "features", "decision", "metrics", "training"),
    *("models", "detector", "report", "evaluation", "benchmark", "cluster", "interop", "service", "cli"),
)
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".") for path in SOURCE.glob("*/**/*.py"))

# Packages that only these rooms may know.
ONLY_IN = {
    "accelerate": {"core", "training"},
    "diffusers": {"models", "features", "interop"},
    "peft": {"models"},
    "transformers": {"models", "features", "interop"},
    "huggingface_hub": {"models", "features"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "sklearn": {"metrics"},
    "skimage": {"data", "decision", "service"},
    "torch": {"core", "algorithm", "features", "training", "models", "benchmark", "interop"},
    "typer": {"cli"},
    "rich": {"cli"},
    "anomalib": {"models"},
    "fastapi": {"service"},
    "sqlalchemy": {"service"},
    "alembic": {"service"},
    "onnxruntime": {"models"},
    "openvino": {"models"},
    "aiomqtt": {"service"},
    "pymodbus": {"service"},
    "ray": {"cluster"},
}


@cache
def imported(module: str) -> set[str]:
    """Dotted names of everything that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names  # not to be changed, as it is kept


def rooms(module: str) -> set[str]:
    """Packages of this project that a module imports from."""
    return {name.split(".")[1] for name in imported(module) if name.startswith("gladad.")} - {"__version__"}


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(SOURCE.parent)}).stdout


def test_every_package_has_its_place():
    assert {module.split(".")[0] for module in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_down(module):
    own = PACKAGES.index(module.split(".")[0])
    assert not rooms(module) - set(PACKAGES[: own + 1])


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("models.")])
def test_models_do_not_know_each_other(module):
    families = {path.name for path in (SOURCE / "models").iterdir() if path.is_dir()}
    others = families - set(module.split("."))
    assert not {name for name in imported(module) if name.startswith("gladad.models.") and name.split(".")[2] in others}


@pytest.mark.parametrize("package", ONLY_IN)
def test_packages_stay_where_they_belong(package):
    users = {module.split(".")[0] for module in MODULES if any(name.split(".")[0] == package for name in imported(module))}
    assert users <= ONLY_IN[package]


APART = ("algorithm", "data", "features", "decision", "metrics", "training")


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] in APART])
def test_the_lower_rooms_do_not_know_each_other(module):
    assert rooms(module) <= {"core", module.split(".")[0]}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_too_long_to_be_read(module):
    """A module at most 400 lines, a function with its decorators and documentation at most 60."""
    text = (SOURCE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in functions:
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert (node.end_lineno or 0) - start < 60, node.name


@pytest.mark.parametrize("script", sorted((SOURCE.parents[1] / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_find_what_they_import(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gladad"):
            module = import_module(str(node.module))
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_the_door_is_light():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'scipy', 'PIL', 'matplotlib', 'pydantic'} & set(sys.modules)"
    assert run(f"import sys, gladad; print(sorted({heavy}))").strip() == "[]"
    assert run(f"import sys, gladad.cli.main; print(sorted({heavy}))").strip() == "[]"


HEAVY = {"transformers", "peft", "accelerate", "diffusers", "skimage", "sklearn", "matplotlib"}


def test_a_lite_model_is_loaded_and_asked_without_what_it_does_not_need(model, category):
    """Seconds of start-up: these are for Stable Diffusion, for training it, and for reports."""
    code = f"""
import sys
from gladad import Glad
print(sorted({HEAVY} & set(sys.modules)))
Glad.from_pretrained({str(model)!r}).inspect({str(category / "test" / "hole" / "000.png")!r})
print(sorted({HEAVY} & set(sys.modules)))"""
    assert run(code).split() == ["[]", "[]"]


def test_predict_starts_without_them(model, category, tmp_path):
    arguments = ["predict", str(model), str(category / "test" / "good" / "000.png"), "-o", str(tmp_path / "out")]
    code = f"import sys; from gladad.cli.main import main; s = main({arguments!r}); print(sorted({HEAVY} & set(sys.modules)), s)"
    assert run(code).splitlines()[-1] == "[] 0"


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
