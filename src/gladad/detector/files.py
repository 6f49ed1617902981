"""The folder of a saved model: description, calibration, the images of its fit, and the weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.settings import to_json, with_values
from gladad.core.storage import (
    FORMAT,
    FORMAT_VERSION,
    MODEL_FILE,
    SCOPED_VERSION,
    atomic_folder,
    load_arrays,
    read_json,
    read_model_file,
    save_arrays,
    write_json,
)
from gladad.decision.conformal import Calibration
from gladad.decision.scope import Scope
from gladad.detector.fitted import Fitted, SeenImages
from gladad.models.registry import family_of_kind
from gladad.models.settings import FitSettings
from gladad.models.tiled import tiled

if TYPE_CHECKING:
    from gladad.data.alignment import Alignment

CALIBRATION_FILE, SEEN_FILE, ALIGNMENT_FILE, WEIGHTS_FOLDER = "calibration.json", "images.json", "alignment.safetensors", "base"
MASK_FILE = "ignored.png"


@dataclass(frozen=True)
class Saved:
    """What a folder holds; the ID is empty where version 0.1 gave none."""

    name: str
    settings: FitSettings
    fitted: Fitted
    model_id: str


def save_model(saved: Saved, folder: Path) -> None:
    """Write a model, see `gladad.detector.glad.Glad.save_pretrained`."""
    fitted, seen = saved.fitted, saved.fitted.seen
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS_FOLDER).mkdir()
        config = fitted.model.save(temporary / WEIGHTS_FOLDER)
        write_json(temporary / CALIBRATION_FILE, fitted.calibration.to_json() | {"map_peaks": fitted.peaks})
        images = {} if seen is None else {"trained": sorted(seen.trained), "held_out": sorted(seen.held_out)}
        write_json(temporary / SEEN_FILE, images)
        if fitted.alignment is not None:
            save_arrays(temporary / ALIGNMENT_FILE, fitted.alignment.arrays())
        scope = {} if fitted.scope is None else {"scope": fitted.scope.to_json()}
        if fitted.scope is not None:
            fitted.scope.save_mask(temporary / MASK_FILE)
        description = {
            "format": FORMAT,
            "format_version": SCOPED_VERSION if scope else FORMAT_VERSION,
            "name": saved.name,
            "kind": fitted.model.kind,
            "model_id": saved.model_id,
            "settings": to_json(saved.settings),
            "config": config,
            "provenance": fitted.provenance,
            **scope,
        }
        write_json(temporary / MODEL_FILE, description)


def load_model(folder: Path, speed: str | None = None) -> Saved:
    """Read a model, see `gladad.detector.glad.Glad.from_pretrained`; warns where thresholds are of another speed."""
    saved = read_saved(folder)
    if speed is not None:
        fitted = saved.fitted.at_speed(speed)  # first: a model that has only one says so
        saved = replace(saved, settings=with_values(saved.settings, {"speed": speed}), fitted=fitted, model_id="")
    if saved.fitted.caveat is not None:
        warnings.warn(f"{folder}: {saved.fitted.caveat}", stacklevel=3)
    return saved


def read_saved(folder: Path) -> Saved:
    """Read a model as it was saved."""
    model = read_model_file(folder)
    try:
        name = model["name"]
        family = family_of_kind(model["kind"])
        settings = family.make_settings(name, model["settings"])
        calibration = read_json(folder / CALIBRATION_FILE)
        images = read_json(folder / SEEN_FILE)
        fitted = Fitted(
            model=tiled(family.load(folder / WEIGHTS_FOLDER, model["config"]), settings.tiles),
            calibration=Calibration.from_json(calibration),
            peaks=[float(p) for p in calibration["map_peaks"]],
            provenance=model["provenance"],
            seen=SeenImages(frozenset(images["trained"]), frozenset(images["held_out"])) if images else None,
            alignment=load_alignment(folder) if settings.align else None,
            scope=Scope.from_json(model["scope"], folder / MASK_FILE) if "scope" in model else None,
        )
        return Saved(name, settings, fitted, str(model["model_id"]))
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelFormatError(f"{folder / MODEL_FILE}: key missing or wrong ({error})") from error


def describe(saved: Saved) -> dict[str, Any]:
    """JSON-ready description of a model, see `gladad.detector.glad.Glad.describe`."""
    fitted = saved.fitted
    calibration = fitted.calibration.to_json()
    scores = calibration.pop("scores")
    return {
        "name": saved.name,
        "kind": fitted.model.kind,
        "model_id": saved.model_id,
        "calibration_id": fitted.calibration.identity,
        "settings": to_json(saved.settings),
        "calibration": calibration | {"held_out_median": float(np.median(scores))},
        "provenance": fitted.provenance,
        "scope": None if fitted.scope is None else fitted.scope.to_json(),
        "caveat": fitted.caveat,
        **fitted.model.describe(),
    }


def load_alignment(folder: Path) -> Alignment:
    """How a model with ``align`` locates parts.

    Raises:
        ModelFormatError: Its file is missing or damaged.
    """
    path = folder / ALIGNMENT_FILE
    from gladad.data.alignment import Alignment  # late, with its scipy: most models do without

    try:
        return Alignment.of_arrays(load_arrays(path))
    except (KeyError, ValueError) as error:
        raise ModelFormatError(f"{path}: does not hold an alignment ({error})") from error
