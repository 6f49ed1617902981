"""What a benchmark compares: data sets, configurations, seeds and shifts, read from a TOML file of the user's or one that is shipped."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gladad.core.errors import ConfigError
from gladad.core.settings import from_json, validated

PLACEHOLDER = "{category}"
_SHIPPED = resources.files("gladad.benchmark") / "shipped"


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
        settings: Of that model, by dotted or nested names (`gladad.models.registry.make_settings`) or those of version 0.1. In a model
            for one category ``{category}`` stands for the category's name.
    """

    name: str
    base: str = "lite"
    multi_class: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def values(self, category: str) -> dict[str, Any]:
        """The settings for one category."""
        text = json.dumps(self.settings)
        filled: dict[str, Any] = json.loads(text if self.multi_class else text.replace(PLACEHOLDER, json.dumps(category)[1:-1]))
        return filled


@validated
class ShiftEntry:
    """The shifts of ``--shift``.

    Attributes:
        corruptions: Names from `gladad.data.corruptions`, applied to the test images.
        severities: Of each.
        contamination: Shares of defective images mixed into the training images.
        configurations: Names of those to shift; none means all.
    """

    corruptions: tuple[str, ...] = ()
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = (1, 3)
    contamination: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = ()
    configurations: tuple[str, ...] = ()


@validated
class BenchmarkConfig:
    """Everything of one file, under the names it has there; ``source`` is the file's own name, for messages."""

    title: str
    source: str = ""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    dataset: Annotated[tuple[DatasetEntry, ...], Field(min_length=1)]
    configuration: Annotated[tuple[Configuration, ...], Field(min_length=1)]
    shift: ShiftEntry = field(default_factory=ShiftEntry)

    def __post_init__(self) -> None:
        for kind, names in (("dataset", [d.name for d in self.dataset]), ("configuration", [c.name for c in self.configuration])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ConfigError(f"two [[{kind}]] are called {twice[0]!r}; give them different names")
        if strange := sorted(set(self.shift.configurations) - {c.name for c in self.configuration}):
            raise ConfigError(f"shift.configurations names {strange[0]!r}, which is not there")


def shipped_names() -> list[str]:
    """Names of the shipped files, sorted."""
    return sorted(file.name.removesuffix(".toml") for file in _SHIPPED.iterdir() if file.name.endswith(".toml"))


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
        text, name = (_SHIPPED / f"{source}.toml").read_text(encoding="utf-8"), f"{source}.toml"
    else:
        near = difflib.get_close_matches(str(source), shipped_names(), 3) or shipped_names()
        raise ConfigError(f"{source}: no such file, and no benchmark of that name is shipped; there are {', '.join(near)}")
    try:
        values = json.loads(json.dumps(tomllib.loads(text), default=str))  # dates, which TOML has and JSON has not, as text
        return from_json(BenchmarkConfig, {"title": Path(name).stem} | values | {"source": name})
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML ({error})") from error
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
