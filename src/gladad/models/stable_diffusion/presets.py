"""The published constants of the method per data set and category, as data: for reproducing the paper, not for anyone's own parts.

The authors chose them by looking at test images; every preset says so in ``tuned_on``. The default for other data is calibration on normal
images. The numbers lie in ``presets_data/DATA_SET.toml``: a table of ``[defaults]``, and under ``[category.NAME]`` what differs.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gladad.algorithm import ReconstructionConfig, ScoringConfig
from gladad.core.errors import ConfigError
from gladad.core.settings import from_json, validated
from gladad.data.foreground import Foreground

FOLDER = Path(__file__).with_name("presets_data")
MULTI_CLASS = "multi_class"  # in place of a category's name: the preset for one model of all categories of a data set
Side = Annotated[int, Field(ge=1)]  # in pixels


@validated
class Preset:
    """Everything that the authors set for one category, or for all categories of a data set at once."""

    name: str  # DATA_SET/CATEGORY
    tuned_on: Literal["test", "normal"]  # the images that the constants were chosen on
    source: str  # where they were published
    image_size: tuple[Side, Side]  # (H, W) pixels that images are read at
    encode_size: tuple[Side, Side]  # (H, W) pixels that they are then enlarged to for the autoencoder
    feature_size: tuple[Side, Side]  # (H, W) at which input and reconstruction are compared
    prompt: str  # of training and inspection; "{category}" stands for the category's name
    guidance_scale: float  # classifier-free guidance at inspection
    reconstruction: ReconstructionConfig
    scoring: ScoringConfig
    scoring_foreground: Foreground  # where the map counts
    synthesis_foreground: Foreground  # where synthetic anomalies may appear
    train_steps: Annotated[int, Field(ge=0)]  # optimiser steps of the checkpoint that the results are of
    extractor_epoch: Annotated[int, Field(ge=0)] | None = None  # whose fine-tuned extractor scores, from 0; None = pre-trained one
    tuned_autoencoder: bool = False  # whether the authors fine-tuned the autoencoder too
    step_threshold_calibrated: bool = False  # False: delta is the published number, and no calibration replaces it

    @property
    def category(self) -> str:
        """Without the data set."""
        return self.name.split("/", 1)[1]

    def describe(self, *, tuned_features: bool = False, tuned_autoencoder: bool = False) -> dict[str, Any]:
        """JSON-ready for a model that was made with it: name, source, and what of it is not applied, unless these parts are tuned."""
        missing = []
        if self.extractor_epoch is not None and not tuned_features:
            missing.append(f"extractor fine-tuned for {self.extractor_epoch + 1} epochs")
        if self.tuned_autoencoder and not tuned_autoencoder:
            missing.append("fine-tuned autoencoder")
        if self.image_size != self.encode_size:
            missing.append(f"images read at {self.image_size[1]}x{self.image_size[0]} before they are enlarged")
        return {"name": self.name, "tuned_on": self.tuned_on, "source": self.source, "not_applied": missing}


def preset_names() -> list[str]:
    """All presets, ``DATA_SET/CATEGORY``, by data set; the last of each is its ``multi_class``."""
    return [name for path in sorted(FOLDER.glob("*.toml")) for name in read_presets(path)]


def load_preset(name: str) -> Preset:
    """A preset by its name, e.g. ``mvtec_ad/bottle``.

    Raises:
        ConfigError: There is none of this name; the message lists near ones.
    """
    path = FOLDER / f"{name.split('/')[0]}.toml"
    presets = read_presets(path) if path in FOLDER.glob("*.toml") else {}
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}; {_near(name)}")
    return presets[name]


def category_preset(preset: Preset, category: str) -> Preset:
    """A multi-class preset for inspecting one of its categories, whose name enters the prompt.

    The model and its step search are those of all categories, but symmetry and foregrounds are the category's own.

    Raises:
        ConfigError: The preset is not a multi-class one, or its data set has no such category.
    """
    if preset.category != MULTI_CLASS:
        raise ConfigError(f"preset {preset.name!r} is of one category already; use one that ends in /{MULTI_CLASS}")
    own = load_preset(f"{preset.name.split('/')[0]}/{category}")
    return dataclasses.replace(
        preset,
        prompt=preset.prompt.format(category=category),
        scoring=dataclasses.replace(preset.scoring, symmetric=own.scoring.symmetric),
        scoring_foreground=own.scoring_foreground,
        synthesis_foreground=own.synthesis_foreground,
    )


def read_presets(path: Path) -> dict[str, Preset]:
    """All presets of one file, by name, in its order. What a category does not set is the file's default.

    Raises:
        ConfigError: The file is not TOML, or a key is unknown, missing or of the wrong type; the message names file and key.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path.name}: cannot be read as TOML ({error})") from error
    if unknown := sorted(set(tables) - {"defaults", "category"}):
        raise ConfigError(f"{path.name}: unknown table {unknown[0]!r}; known are defaults and category")
    presets = {}
    for category in _table(path, tables, "category"):
        values = _merge(_table(path, tables, "defaults"), _table(path, tables["category"], category))
        name = f"{path.stem}/{category}"
        try:
            if "name" in values:
                raise ConfigError("name: is the file's and the category's, and cannot be set")
            presets[name] = from_json(Preset, {"name": name, **values})
        except (ConfigError, TypeError) as error:  # a date of TOML is nothing that JSON knows
            raise ConfigError(f"{path.name}, category {category}: {error}") from error
    return presets


def _table(path: Path, tables: dict[str, Any], key: str) -> dict[str, Any]:
    value = tables.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name}: {key} must be a table, not {value!r}")
    return value


def _merge(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {key for key, value in own.items() if isinstance(value, dict) and isinstance(defaults.get(key), dict)}
    return defaults | own | {key: _merge(defaults[key], own[key]) for key in both}


def _near(name: str) -> str:
    names = preset_names()
    near = [n for n in names if n.split("/")[1] == name.split("/")[-1]]  # the category without, or with another data set
    near += [n for n in difflib.get_close_matches(name, names, n=4) if n not in near]
    if near:
        return f"near are {', '.join(near)}"
    return f"names are DATA_SET/CATEGORY, with DATA_SET one of {', '.join(sorted({n.split('/')[0] for n in names}))}"
