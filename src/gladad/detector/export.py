"""Export of a fitted model as static graphs, with thresholds of its own and proof that it decides alike."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, DataError, GladError
from gladad.core.inference import FLOAT32
from gladad.core.records import Progress
from gladad.core.settings import to_json
from gladad.core.storage import check_target
from gladad.core.threads import in_order
from gladad.data.samples import file_digest
from gladad.data.synthesis import LITE, Draw, synthesise
from gladad.detector.files import Saved, save_model
from gladad.detector.fit import Fitter, Images, distinct, listed
from gladad.detector.fitted import Fitted
from gladad.features.extractor import PACKAGED
from gladad.models.exported.engines import ExportPrecision, Format
from gladad.models.exported.model import Exported, ExportedConfig
from gladad.models.settings import FitSettings
from gladad.models.tiled import Tiled, tiled

Pixels = NDArray[np.uint8]
NAME = Exported.kind
FORMATS, PRECISIONS = get_args(Format), get_args(ExportPrecision)
COMPARED = 100
"""Good images at most that both models inspect, and as many with synthetic defects."""


class ExportError(GladError):
    """The exported model would decide otherwise."""


@dataclass(frozen=True)
class Comparison:
    """How an exported model's scores differ from those of the model that it is from.

    Attributes:
        good: Number of good images that both have inspected.
        defects: Of images with synthetic defects.
        largest: Largest relative difference of raw scores.
    """

    good: int
    defects: int
    largest: float


def export(saved: Saved, images: Images, folder: Path, form: Format, precision: ExportPrecision, progress: Progress) -> Comparison:
    """Write a fitted model as graphs, see `gladad.detector.glad.Glad.export`."""
    settings, fitted = saved.settings, saved.fitted
    check(fitted, form, precision)
    check_target(folder)
    held_out = judging_images(fitted, images)
    own = FitSettings(**{field.name: getattr(settings, field.name) for field in fields(FitSettings)})
    model, count = (fitted.model.model, fitted.model.count) if isinstance(fitted.model, Tiled) else (fitted.model, 1)
    pixels = fitted.pixels(held_out, progress)
    with tempfile.TemporaryDirectory(prefix="gladad-") as name:
        work = Path(name)
        write(model, work, form)
        described = model.describe()["config"]
        config = ExportedConfig(
            form=form,
            precision=precision,
            image_size=model.image_size,
            scales=described["settings"]["scales"],
            origin={"name": saved.name, "model_id": saved.model_id},
            settings=described["settings"],
        )
        exported = replace(fitted, model=tiled(Exported.load(work, to_json(config)), count))
        if fitted.seen is not None and fitted.seen.held_out:
            exported = Fitter(NAME, own).recalibrated(exported, held_out, progress)
        found = compare(fitted, exported, held_out, pixels, settings.seed, progress)
        exported = replace(exported, provenance=exported.provenance | {"compared": asdict(found)})
        save_model(Saved(NAME, own, exported, exported.digest()[:16]), folder)
    return found


def check(fitted: Fitted, form: str, precision: str) -> None:
    """Refuse what cannot be exported, before any work.

    Raises:
        ConfigError: Format or precision is unknown, they do not go together, or the model is of a family without graphs.
    """
    if form not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {form!r}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision == "bfloat16" and form == "onnx":
        raise ConfigError("ONNX Runtime does not compute in bfloat16 on processors; use the format openvino, or another precision")
    model = fitted.of_tile
    if model.kind != "lite":
        raise ConfigError(f"models of the kind {model.kind} cannot be exported; lite can")


def judging_images(fitted: Fitted, images: Images) -> list[Path]:
    """Those of the images that the thresholds were made from; all, where none were held out.

    Raises:
        DataError: They are not all there.
    """
    paths = listed(images)
    if fitted.seen is None:
        raise DataError("the model was saved by a version that did not record its images; calibrate it, then export it")
    wanted = fitted.seen.held_out or fitted.seen.trained
    found = distinct([path for path in paths if file_digest(path) in wanted])
    if len(found) < len(wanted):
        missing = f"{len(wanted) - len(found)} of the {len(wanted)} images that the thresholds are from are missing"
        raise DataError(f"{missing}; give those of the fit")
    return found


def write(model: Any, folder: Path, form: Format) -> None:
    """Write graphs and memory of a ``lite`` model."""
    from gladad.models.feature_diffusion.graphs import write_graphs

    write_graphs(model, folder)
    if form == "openvino":
        from gladad.models.exported.conversion import to_openvino

        to_openvino(folder)


def compare(fitted: Fitted, exported: Fitted, paths: Sequence[Path], pixels: Sequence[Pixels], seed: int, progress: Progress) -> Comparison:
    """Let both inspect good images and such with synthetic defects.

    Raises:
        ExportError: A decision differs; the message lists the images.
    """
    step = -(-len(pixels) // COMPARED)
    names, shown = [path.name for path in paths[::step]], list(pixels[::step])
    place = fitted.provenance["foreground"]["foreground"]
    defects = [synthesise(image, Draw((seed, 5, number)), LITE, (), place)[0] for number, image in enumerate(shown)]
    names += [f"{name} with a synthetic defect" for name in names]
    before, after = (_scores(each, [*shown, *defects], progress) for each in (fitted, exported))
    limits = fitted.calibration.threshold.value, exported.calibration.threshold.value
    differing = [
        f"{name} ({old / limits[0]:.4f} -> {new / limits[1]:.4f})"
        for name, old, new in zip(names, before, after, strict=True)
        if (old > limits[0]) != (new > limits[1])
    ]
    if differing:
        some = ", ".join(differing[:10]) + (", ..." if len(differing) > 10 else "")
        raise ExportError(f"{len(differing)} of {len(names)} images would be decided otherwise: {some}; {_advice(exported)}")
    largest = max(abs(new / old - 1) for old, new in zip(before, after, strict=True))
    return Comparison(len(shown), len(defects), largest)


def _advice(exported: Fitted) -> str:
    """What may keep its scores closer to the original's."""
    config = exported.of_tile.describe()["config"]
    if config["precision"] != "float32":
        return "choose precision float32"
    if config["settings"]["features"] not in PACKAGED:
        return f"fit the model with {FLOAT32}=1 in the environment, as its features are else computed in bfloat16"
    return "their scores lie too near the threshold; calibrate the model with more good images"


def _scores(fitted: Fitted, images: Sequence[Pixels], progress: Progress) -> list[float]:
    found: list[float] = []
    for score in in_order(lambda pixels: fitted.inspect(pixels).score, images, fitted.model.workers):
        found.append(score)
        progress("comparing", len(found), len(images))
    return found
