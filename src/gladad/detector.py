"""`Glad`: fit on good parts, predict, save, load. A thin shell over a base, its training and the calibration; it holds no algorithm."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from gladad.algorithm import ReconstructionConfig
from gladad.calibration import MIN_HELD_OUT, Calibration, calibrate, check_rate
from gladad.config import from_json, to_json
from gladad.data import expand_paths, fingerprint, good_images, split_held_out
from gladad.errors import ConfigError, DataError, ModelFormatError, NotFittedError
from gladad.feature_space import size_for_aspect
from gladad.finetune import FinetuneConfig
from gladad.images import as_pixels, list_images, load_image, resize_pixels
from gladad.lite import LiteBase, LiteConfig
from gladad.lite_training import LiteTrainingConfig, fit_lite
from gladad.paper import PaperBase, PaperConfig, fit_paper
from gladad.parallel import in_order
from gladad.pipeline import GladPipeline
from gladad.storage import FORMAT, FORMAT_VERSION, MODEL_FILE, atomic_folder, read_json, read_model_file, write_json
from gladad.synthesis import Foreground
from gladad.types import Inspection, Prediction, Progress, Region, no_progress

Pixels = NDArray[np.uint8]
CALIBRATION_FILE = "calibration.json"
BASE_FOLDER = "base"
HELD_OUT_SHARE = 0.2
MAX_HELD_OUT = 120
FEW_IMAGES = 24
"""Below this many images none can be spared: the calibration is cross-fitted."""
FOLDS = 2
MAX_TEXTURES = 300
MAX_REGIONS = 100


class Base(Protocol):
    """What the detector needs of a base."""

    kind: str

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""
        ...

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one image, in the base's own units."""
        ...

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels:
        """The anomaly-free counterpart, for people."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the weights; returns the JSON-ready config."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What a user may choose about a fit. Everything else is data-driven or a default of the base."""

    seed: int = 0  # of everything random
    steps: int | None = None  # optimiser steps; None = the base's default
    minutes: float | None = None  # wall-clock budget instead of steps (then a second run may differ)
    false_reject_rate: float = 0.01  # share of good parts that may be rejected
    image_size: int | None = None  # side of a square with as many pixels as the model works on; None = 256 (lite), 512 (others)
    max_images: int = 1000  # good images used; a random choice of them if there are more
    textures: str | None = None  # folder of images that synthetic anomalies take content from; None = generated textures
    foreground: Foreground = "all"  # where synthetic anomalies may appear: all | bright | dark part of the image
    product: Literal["auto", "object", "texture"] = "auto"  # lite: what counts as evidence; "auto" decides by the images
    features: str | None = None  # extractor of a diffusers base: folder or Hub id; None = DINO ViT-B/8
    prompt: str = "a photo of sks"  # of a diffusers base
    calibration: Literal["auto", "held-out", "cross-fit"] = "auto"  # auto = cross-fit below 24 images

    def __post_init__(self) -> None:
        check_rate(self.false_reject_rate)
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"minutes must be positive, not {self.minutes}")
        if self.steps is not None and self.minutes is not None:
            raise ConfigError("give steps or minutes, not both")
        if self.image_size is not None and not 64 <= self.image_size <= 2048:
            raise ConfigError(f"image_size must be from 64 to 2048, not {self.image_size}")
        if self.max_images < 2:
            raise ConfigError(f"max_images must be at least 2, not {self.max_images}")


class Glad:
    """An anomaly detector for one product.

    Example:
        >>> detector = Glad.from_base("lite").fit("parts/good")
        >>> detector.inspect("part.png").pred_label
        >>> detector.save_pretrained("models/part")

    Attributes:
        base_: The fitted base.
        calibration_: Thresholds and held-out scores.
        provenance_: Versions, seed and data fingerprint of the fit.
    """

    base_: Base
    calibration_: Calibration
    provenance_: dict[str, Any]

    def __init__(self, base: str = "lite", settings: FitSettings | None = None):
        self.base = base
        self.settings = FitSettings() if settings is None else settings

    @classmethod
    def from_base(cls, base: str = "lite", *, settings: FitSettings | None = None) -> Glad:
        """A detector to be fitted.

        Args:
            base: ``lite``, or the folder or Hub id of a Stable Diffusion in diffusers form.
            settings: What may be chosen about the fit.
        """
        return cls(base, settings)

    # -- fit ----------------------------------------------------------------------------------------------------

    def fit(self, images: str | Path | Sequence[str | Path], *, progress: Progress = no_progress) -> Glad:
        """Learn from good images only, and calibrate on a part of them that training does not see.

        Args:
            images: A folder of good images, a data set category (its ``train/good`` is taken), or paths.
            progress: Told of every stage.

        Returns:
            This detector.

        Raises:
            DataError: There are too few images, or one cannot be read (it is named).
        """
        settings = self.settings
        paths = good_images(Path(images)) if isinstance(images, str | Path) else [Path(p) for p in images]
        if len(paths) > settings.max_images:
            order = np.random.default_rng(settings.seed).permutation(len(paths))[: settings.max_images]
            paths = [paths[i] for i in sorted(order.tolist())]
        if len(paths) < 2 + MIN_HELD_OUT:
            raise DataError(f"at least {2 + MIN_HELD_OUT} good images are needed, there are {len(paths)}; add good images")
        size = self.working_size(paths)
        pixels = []
        for path in paths:
            pixels.append(resize_pixels(load_image(path), size))
            progress("reading images", len(pixels), len(paths))
        textures = self._load_textures(size)

        cross_fit = settings.calibration == "cross-fit" or (settings.calibration == "auto" and len(paths) < FEW_IMAGES)
        scores, peaks = [], []
        if cross_fit:
            self.base_ = self._train(pixels, size, textures, FOLDS + 1, progress)
            for fold in range(FOLDS):
                rest = [p for i, p in enumerate(pixels) if i % FOLDS != fold]
                out = [p for i, p in enumerate(pixels) if i % FOLDS == fold]
                base = self._train(rest, size, textures, FOLDS + 1, _prefixed(progress, f"fold {fold + 1} of {FOLDS}: "))
                fold_scores, fold_peaks = _score(base, out, progress)
                scores += fold_scores
                peaks += fold_peaks
            held_out_count = len(pixels)
        else:
            share = min(HELD_OUT_SHARE, MAX_HELD_OUT / len(pixels))
            train, held_out = split_held_out(pixels, share, MIN_HELD_OUT, settings.seed)
            self.base_ = self._train(train, size, textures, 1, progress)
            scores, peaks = _score(self.base_, held_out, progress)
            held_out_count = len(held_out)
        self.calibration_ = calibrate(scores, peaks, settings.false_reject_rate, cross_fitted=cross_fit)
        self._peaks = sorted(peaks)
        self.provenance_ = {
            "data_fingerprint": fingerprint(paths),
            "images": len(paths),
            "held_out": held_out_count,
            "seed": settings.seed,
            "versions": _versions(),
        }
        return self

    def working_size(self, paths: Sequence[Path]) -> tuple[int, int]:
        """``(H, W)`` the model works at: for ``lite`` with the median proportions of the images, for other bases square."""
        if self.base != "lite":
            side = self.settings.image_size or 512
            return side, side
        shapes = [load_image(path).shape for path in paths[:: max(1, len(paths) // 25)]]
        aspect = float(np.median([width / height for height, width, _ in shapes]))
        return size_for_aspect(aspect, self.settings.image_size or 256)

    def _load_textures(self, size: tuple[int, int]) -> list[Pixels]:
        if self.settings.textures is None:
            return []
        folder = Path(self.settings.textures)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of textures")
        paths = list_images(folder)
        if not paths:
            raise DataError(f"{folder}: holds no images to take textures from")
        order = np.random.default_rng(self.settings.seed).permutation(len(paths))[:MAX_TEXTURES]
        return [resize_pixels(load_image(paths[i]), size) for i in sorted(order.tolist())]

    def _train(self, images: Sequence[Pixels], size: tuple[int, int], textures: Sequence[Pixels], share: int, progress: Progress) -> Base:
        """Train one base with one ``share``-th of the budget."""
        settings = self.settings
        minutes = None if settings.minutes is None else settings.minutes / share
        if self.base == "lite":
            default = LiteTrainingConfig()
            training = replace(default, steps=max(1, (settings.steps or default.steps) // share), minutes=minutes)
            config = LiteConfig(image_size=size, seed=settings.seed, product=settings.product)
            return fit_lite(images, config, training, textures=textures, foreground=settings.foreground, progress=progress)
        if minutes is not None:
            raise ConfigError("minutes is for the lite base; give steps")
        pipeline = GladPipeline.from_base(self.base, settings.features, prompt=settings.prompt)
        budget = FinetuneConfig(steps=max(1, (settings.steps or FinetuneConfig().steps) // share), seed=settings.seed)
        paper = PaperConfig(image_size=size, feature_size=size, reconstruction=ReconstructionConfig(), seed=settings.seed)
        return fit_paper(pipeline, images, paper, budget, textures=textures, foreground=settings.foreground, progress=progress)

    def set_false_reject_rate(self, rate: float) -> None:
        """Choose another false-reject rate; the thresholds follow from the stored held-out scores."""
        self._require_fit()
        old = self.calibration_
        self.calibration_ = calibrate(old.scores, self._peaks, rate, cross_fitted=old.cross_fitted)

    # -- inspection ---------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""
        self._require_fit()
        return self.base_.workers

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Prediction:
        """Inspect one image.

        Args:
            image: A path, PIL image, array or tensor; see `gladad.images.as_pixels`.
            reconstruct: Make the picture of the reconstruction too.

        Returns:
            Score, p-value, decision, step, map, mask and regions. They depend on this image alone.

        Raises:
            DataError: The image cannot be used.
            NotFittedError: There is no model yet.
        """
        self._require_fit()
        pixels = as_pixels(image)
        started = time.perf_counter()
        inspection = self.base_.inspect(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        raw = torch.from_numpy(inspection.map)[None, None]
        maps = F.interpolate(raw, size, mode="bilinear", align_corners=False)[0, 0] / self.calibration_.pixel_threshold
        anomaly_map = maps.numpy()
        mask = anomaly_map > 1.0
        threshold = self.calibration_.threshold.value
        seconds = time.perf_counter() - started
        return Prediction(
            pred_score=inspection.score / threshold,
            p_value=self.calibration_.p_value(inspection.score),
            pred_label=inspection.score > threshold,
            step=inspection.step,
            anomaly_map=anomaly_map,
            pred_mask=mask,
            regions=find_regions(mask, anomaly_map),
            image_size=size,
            reconstruction=self.base_.picture(inspection, pixels, self.calibration_.pixel_threshold) if reconstruct else None,
            image_path=Path(image) if isinstance(image, str | Path) else None,
            seconds=seconds,
        )

    def predict(self, images: Any, *, reconstruct: bool = True, progress: Progress = no_progress) -> list[Prediction]:
        """Inspect several images, in order, as many at a time as the base can use cores for.

        Args:
            images: A path or folder, one image, or a sequence of any of these.
            reconstruct: Make the pictures of the reconstructions too.
            progress: Told of every image.
        """
        items = list(_flatten(images))
        predictions: list[Prediction] = []
        for prediction in in_order(lambda item: self.inspect(item, reconstruct=reconstruct), items, self.workers):
            predictions.append(prediction)
            progress("inspecting", len(predictions), len(items))
        return predictions

    # -- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into one folder, whole or not at all; a gladad model that is there is replaced.

        Raises:
            WriteError: The folder holds something else, or the disk refuses.
        """
        self._require_fit()
        with atomic_folder(Path(folder)) as temporary:
            (temporary / BASE_FOLDER).mkdir()
            config = self.base_.save(temporary / BASE_FOLDER)
            write_json(temporary / CALIBRATION_FILE, self.calibration_.to_json() | {"map_peaks": self._peaks})
            description = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "base": self.base_.kind,
                "source": self.base,
                "config": config,
                "settings": to_json(self.settings),
                "provenance": self.provenance_,
            }
            write_json(temporary / MODEL_FILE, description)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Glad:
        """Load a model: everything needed to inspect, nothing needed to train.

        Raises:
            ModelFormatError: The folder is not a complete gladad model.
        """
        folder = Path(folder)
        model = read_model_file(folder)
        loaders: dict[str, Callable[[Path, dict[str, Any]], Base]] = {LiteBase.kind: LiteBase.load, PaperBase.kind: PaperBase.load}
        try:
            detector = cls(model["source"], from_json(FitSettings, model["settings"]))
            detector.base_ = loaders[model["base"]](folder / BASE_FOLDER, model["config"])
            calibration = read_json(folder / CALIBRATION_FILE)
            detector.calibration_ = Calibration.from_json(calibration)
            detector._peaks = [float(p) for p in calibration["map_peaks"]]
            detector.provenance_ = model["provenance"]
        except (KeyError, TypeError, ConfigError) as error:
            raise ModelFormatError(f"{folder / MODEL_FILE}: key missing or wrong ({error})") from error
        return detector

    def describe(self) -> dict[str, Any]:
        """JSON-ready description: base, settings, calibration and provenance."""
        self._require_fit()
        calibration = self.calibration_.to_json()
        scores = calibration.pop("scores")
        config = getattr(self.base_, "config", None)
        return {
            "base": self.base_.kind,
            "source": self.base,
            "settings": to_json(self.settings),
            "config": {} if config is None else to_json(config),
            "calibration": calibration | {"held_out_median": float(np.median(scores))},
            "provenance": self.provenance_,
        }

    def _require_fit(self) -> None:
        if not hasattr(self, "calibration_"):
            raise NotFittedError("this detector has not been fitted; call fit() or load one with Glad.from_pretrained()")


def find_regions(mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32]) -> tuple[Region, ...]:
    """8-connected areas of a mask ``[H, W]``, largest peak first, at most 100."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if not count:
        return ()
    index = np.arange(1, count + 1)
    peaks = ndimage.maximum(anomaly_map, labels, index)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    boxes = ndimage.find_objects(labels)
    order = np.argsort(-np.asarray(peaks), kind="stable")[:MAX_REGIONS]
    return tuple(
        Region(
            box=(boxes[i][1].start, boxes[i][0].start, boxes[i][1].stop, boxes[i][0].stop),
            area=int(areas[i]),
            peak=float(peaks[i]),
        )
        for i in order
    )


def _score(base: Base, images: Sequence[Pixels], progress: Progress) -> tuple[list[float], list[float]]:
    """Raw scores and map peaks of held-out normal images."""
    scores, peaks = [], []
    for inspection in in_order(base.inspect, images, base.workers):
        scores.append(inspection.score)
        peaks.append(float(inspection.map.max()))
        progress("calibration", len(scores), len(images))
    return scores, peaks


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda stage, done, total: progress(prefix + stage, done, total)


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, str | Path):
        yield from expand_paths([Path(images)])
    elif isinstance(images, list | tuple):
        for image in images:
            yield from _flatten(image)
    else:
        yield images


def _versions() -> dict[str, str]:
    names = ("gladad", "torch", "diffusers", "transformers", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
