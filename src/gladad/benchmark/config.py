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

_SHIPPED = resources.files("gladad.benchmark") / "shipped"


@validated
class DatasetEntry:
    """One data set to run on."""

    name: str  # heading in the tables
    path: str = "."  # where it lies, below the folder given with --data
    layout: str = "auto"  # see `gladad.data.layouts.LAYOUTS`; "auto" looks
    categories: tuple[str, ...] = ()  # those to run, in the order of the tables; none means all
    made: tuple[str, ...] = ()  # products that are made on the spot instead, see `gladad.benchmark.products.MADE`


@validated
class Configuration:
    """One detector to compare.

    Its settings have dotted or nested names (`gladad.models.registry.make_settings`). In a model for one category
    ``{category}`` stands for the category's name.
    """

    name: str  # heading of its column
    base: str = "lite"  # as for gladad fit --base
    multi_class: bool = False  # one model over all categories of a data set instead of one for each
    settings: dict[str, Any] = field(default_factory=dict)

    def values(self, category: str) -> dict[str, Any]:
        """The settings for one category."""
        text = json.dumps(self.settings)
        return dict(json.loads(text if self.multi_class else text.replace("{category}", json.dumps(category)[1:-1])))


@validated
class ShiftEntry:
    """The shifts of ``--shift``."""

    corruptions: tuple[str, ...] = ()  # names from `gladad.data.corruptions`, applied to the test images
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = (1, 3)  # of each
    contamination: tuple[Annotated[float, Field(ge=0, le=0.5)], ...] = ()  # shares of defective images mixed into the training images
    configurations: tuple[str, ...] = ()  # names of those to shift; none means all

    def covers(self, configuration: str) -> bool:
        """Whether a configuration is to be shifted."""
        return not self.configurations or configuration in self.configurations


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
    """Read a TOML file, or that of `shipped_names` which is called so, and check it before anything is run.

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
