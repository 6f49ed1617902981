"""What a benchmark compares: data sets, configurations, seeds and shifts, read from a TOML file of the user's or one that is shipped."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from gladad.core.errors import ConfigError
from gladad.core.settings import from_json, validated

Entry = TypeVar("Entry")
SHIPPED = "shipped"
"""Folder of the package that the shipped files are in."""
PLACEHOLDER = "{category}"


@validated
class DatasetEntry:
    """One data set to run on.

    Attributes:
        name: Heading in the tables.
        path: Where it lies, below the folder given with ``--data``.
        layout: See `gladad.data.layouts.LAYOUTS`; "auto" looks.
        categories: Those to run, in the order of the tables; none means all.
    """

    name: str
    path: str
    layout: str = "auto"
    categories: tuple[str, ...] = ()


@validated
class Configuration:
    """One detector to compare.

    Attributes:
        name: Heading of its column.
        base: As for ``gladad fit --base``.
        multi_class: One model over all categories of a data set instead of one for each.
        settings: Of `gladad.models.registry.FitSettings`; ``{category}`` in a preset stands for the category's name.
    """

    name: str
    base: str = "lite"
    multi_class: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def settings_of(self, category: str, seed: int) -> dict[str, Any]:
        """The settings for one category and seed."""
        filled = {k: v.replace(PLACEHOLDER, category) if isinstance(v, str) else v for k, v in self.settings.items()}
        return filled | {"seed": seed}


@validated
class ShiftEntry:
    """The shifts of ``--shift``.

    Attributes:
        corruptions: Names from `gladad.data.corruptions`, applied to the test images.
        severities: Of each, from 1 to 5.
        contamination: Shares of defective images mixed into the training images.
        configurations: Names of those to shift; none means all.
    """

    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = (1, 3)
    contamination: tuple[float, ...] = ()
    configurations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if wrong := [severity for severity in self.severities if severity not in range(1, 6)]:
            raise ConfigError(f"severities must be from 1 to 5, not {wrong[0]}")
        if wrong_share := [share for share in self.contamination if not 0 <= share <= 0.5]:
            raise ConfigError(f"contamination must be shares from 0 to 0.5, not {wrong_share[0]}")


@validated
class BenchmarkConfig:
    """Everything of one file; ``source`` is its name for messages."""

    title: str
    source: str = ""
    seeds: tuple[int, ...] = (0,)
    datasets: tuple[DatasetEntry, ...]
    configurations: tuple[Configuration, ...]
    shift: ShiftEntry = field(default_factory=ShiftEntry)


def shipped_names() -> list[str]:
    """Names of the shipped files, sorted."""
    folder = resources.files("gladad.benchmark") / SHIPPED
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read_config(source: str | Path) -> BenchmarkConfig:
    """Read a file, or one that is shipped, and check it before anything is run.

    Args:
        source: Path of a TOML file, or one of `shipped_names`.

    Raises:
        ConfigError: There is no such file, it is not TOML, a key is unknown or missing, a value is wrong, or a name is there twice.
    """
    path = Path(source)
    if path.is_file():
        text, name = path.read_text(encoding="utf-8"), str(path)
    elif str(source) in shipped_names():
        text, name = (resources.files("gladad.benchmark") / SHIPPED / f"{source}.toml").read_text(encoding="utf-8"), f"{source}.toml"
    else:
        near = difflib.get_close_matches(str(source), shipped_names(), 3) or shipped_names()
        raise ConfigError(f"{source}: no such file, and no benchmark of that name is shipped; there are {', '.join(near)}")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML ({error})") from error
    return _parsed(values, name)


def _parsed(values: dict[str, Any], name: str) -> BenchmarkConfig:
    known = {"title", "seeds", "dataset", "configuration", "shift"}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{name}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    for key in ("dataset", "configuration"):
        if not isinstance(values.get(key), list) or not values[key]:
            raise ConfigError(f"{name}: needs at least one [[{key}]]")
    try:
        seeds = values.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise ConfigError(f"seeds must be a list of whole numbers from 0, not {seeds!r}")
        config = BenchmarkConfig(
            title=str(values.get("title", Path(name).stem)),
            source=name,
            seeds=tuple(seeds),
            datasets=tuple(_entry(DatasetEntry, entry) for entry in values["dataset"]),
            configurations=tuple(_entry(Configuration, entry) for entry in values["configuration"]),
            shift=_entry(ShiftEntry, values.get("shift", {})),
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    for kind, names in (("dataset", [d.name for d in config.datasets]), ("configuration", [c.name for c in config.configurations])):
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(f"{name}: two [[{kind}]] are called {twice[0]!r}; give them different names")
    for configuration in config.configurations:
        if configuration.multi_class and any(PLACEHOLDER in str(value) for value in configuration.settings.values()):
            raise ConfigError(f"{name}: {configuration.name!r} is one model for all categories, so {PLACEHOLDER} has no value there")
    if strange := sorted(set(config.shift.configurations) - {c.name for c in config.configurations}):
        raise ConfigError(f"{name}: shift.configurations names {strange[0]!r}, which is not there")
    return config


def _entry(kind: type[Entry], values: Any) -> Entry:
    """One table of the file as its dataclass."""
    if not isinstance(values, dict):
        raise ConfigError(f"{kind.__name__} must be a table, not {values!r}")
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}  # type: ignore[arg-type]
    if missing := sorted(required - set(values)):
        raise ConfigError(f"{kind.__name__}: {missing[0]!r} is missing")
    return from_json(kind, values)
