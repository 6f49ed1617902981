"""`Glad`: fit on good parts, predict, save, load. A thin shell over a base, its training and the calibration; it holds no algorithm."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gladad.bases import (
    FEATURE_BASES,
    INSPECTION_SETTINGS,
    Base,
    FitSettings,
    adjust_base,
    check_settings,
    load_base,
    train_base,
    train_bases,
)
from gladad.calibration import MIN_HELD_OUT, Calibration, calibrate
from gladad.config import from_json, to_json
from gladad.data import expand_paths, fingerprint, good_images, split_held_out
from gladad.errors import ConfigError, DataError, ModelFormatError, NotFittedError
from gladad.feature_space import size_for_aspect
from gladad.few_shot import FEW, views, with_copies
from gladad.images import as_pixels, list_images, load_image, resize_pixels
from gladad.lite import LiteBase
from gladad.parallel import in_order
from gladad.presets import load_preset
from gladad.regions import find_regions
from gladad.storage import FORMAT, FORMAT_VERSION, MODEL_FILE, atomic_folder, read_json, read_model_file, write_json
from gladad.synthesis import Foreground, choose_foreground
from gladad.types import Prediction, Progress, no_progress

Pixels = NDArray[np.uint8]
CALIBRATION_FILE = "calibration.json"
BASE_FOLDER = "base"
HELD_OUT_SHARE = 0.2
MAX_HELD_OUT = 120
FEW_IMAGES = 24
"""Below this many images none can be spared: the calibration is cross-fitted."""
FOLDS = 2
MAX_TEXTURES = 300


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
            base: ``lite``, one of `gladad.bases.BASELINES`, or the folder or Hub id of a Stable Diffusion in diffusers form.
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
        check_settings(self.base, settings)
        paths = self._chosen(images)
        cross_fitted = self._cross_fits(paths)
        # What is held out takes no part in any choice: the thresholds' guarantee needs that.
        kept, held_out = (paths, []) if cross_fitted else self._split(paths)
        size = self.working_size(kept)
        pixels = _read(kept, size, progress)
        textures = self._load_textures(size)
        foreground, reason = self._foreground(pixels)
        few, share = len(paths) < FEW, FOLDS + 1 if cross_fitted else 1

        def train(images: Sequence[Pixels], told: Progress) -> Base:
            shown = with_copies(images, settings.seed) if few else images
            return train_base(self.base, shown, size, settings, textures, foreground, share, told)

        base = train(pixels, progress)
        if not cross_fitted:
            scores, peaks = _score(base, _read(held_out, size, progress), progress)
        elif len(pixels) == 1:  # nothing but its own copies to be judged by
            scores, peaks = _score(base, views(pixels, settings.seed), progress)
        else:
            scores, peaks = [], []
            for fold in range(FOLDS):
                rest = [p for i, p in enumerate(pixels) if i % FOLDS != fold]
                out = [p for i, p in enumerate(pixels) if i % FOLDS == fold]
                other = train(rest, _prefixed(progress, f"fold {fold + 1} of {FOLDS}: "))
                fold_scores, fold_peaks = _score(other, views(out, settings.seed) if few else out, progress)
                scores += fold_scores
                peaks += fold_peaks
        self.base_ = base
        images_judged = len(paths) if cross_fitted else len(held_out)
        self._calibrate(scores, peaks, cross_fitted=cross_fitted and len(paths) > 1, images=images_judged)
        self._remember(paths, images_judged, foreground, reason)
        return self

    @classmethod
    def fit_together(
        cls,
        images: Mapping[str, Sequence[str | Path]],
        base: str = "lite",
        settings: FitSettings | None = None,
        *,
        progress: Progress = no_progress,
    ) -> dict[str, Glad]:
        """Fit one denoiser for several products, which it is told apart by their name; each product gets a detector that uses it.

        Everything but the denoiser is the product's own, the thresholds included. Each detector is saved and loaded by itself.

        Args:
            images: Category -> paths of its good images; at least 24 for each.
            base: ``lite``.
            settings: What may be chosen about the fit; the default of the steps grows with the square root of the number of products.
            progress: Told of every stage.

        Raises:
            ConfigError: The base cannot be shared.
            DataError: There are too few images, or one cannot be read (it is named).
        """
        detectors = {category: cls(base, settings) for category in sorted(images)}
        first = next(iter(detectors.values()))
        check_settings(base, first.settings)
        chosen = {category: detector._chosen(images[category]) for category, detector in detectors.items()}
        for category, paths in chosen.items():
            if len(paths) < FEW_IMAGES:
                raise DataError(
                    f"{category}: at least {FEW_IMAGES} good images are needed to fit it together with others, not {len(paths)}"
                )
        split = {category: detector._split(chosen[category]) for category, detector in detectors.items()}
        # One grid for all: that of the images together.
        size = first.working_size([path for train, _ in split.values() for path in train[:: max(1, len(train) // 25)]])
        kept = {category: _read(train, size, _prefixed(progress, f"{category}: ")) for category, (train, _) in split.items()}
        places = {category: detector._foreground(kept[category]) for category, detector in detectors.items()}
        foregrounds = {category: foreground for category, (foreground, _) in places.items()}
        textures = first._load_textures(size)
        bases = train_bases(base, kept, size, first.settings, textures, foregrounds, progress)
        for category, detector in detectors.items():
            told = _prefixed(progress, f"{category}: ")
            detector.base_ = bases[category]
            scores, peaks = _score(detector.base_, _read(split[category][1], size, told), told)
            detector._calibrate(scores, peaks, cross_fitted=False, images=len(scores))
            detector._remember(chosen[category], len(scores), *places[category])
        return detectors

    def _remember(self, paths: Sequence[Path], held_out: int, foreground: Foreground, reason: str) -> None:
        self.provenance_ = {
            "data_fingerprint": fingerprint(paths),
            "images": len(paths),
            "held_out": held_out,
            "foreground": {"foreground": foreground, "reason": reason},
            "seed": self.settings.seed,
            "versions": _versions(),
        }

    def adjust(self, images: str | Path | Sequence[str | Path], settings: FitSettings, *, progress: Progress = no_progress) -> Glad:
        """Change how a fitted ``lite`` detector inspects, without another training; the result is that of a fit with these settings.

        Args:
            images: Those it was fitted on.
            settings: They differ from the detector's in those of `gladad.bases.INSPECTION_SETTINGS` only.
            progress: Told of every stage.

        Returns:
            This detector.

        Raises:
            ConfigError: Another setting differs; or more than the false-reject rate does, and the base is not a ``lite`` one or the
                calibration is cross-fitted.
            DataError: The images are not those of the fit.
        """
        self._require_fit()
        old, new = to_json(self.settings), to_json(settings)
        changed = [name for name in new if new[name] != old[name]]
        if fixed := sorted(set(changed) - INSPECTION_SETTINGS):
            raise ConfigError(f"{fixed[0]} cannot be changed without another fit")
        if set(changed) <= {"false_reject_rate"}:
            self.set_false_reject_rate(settings.false_reject_rate)
            self.settings = settings
            return self
        if not isinstance(self.base_, LiteBase):
            raise ConfigError(f"the inspection of a {self.base_.kind} base cannot be adjusted; fit it anew")
        paths = self._chosen(images)
        if self._cross_fits(paths):
            raise ConfigError("a cross-fitted detector cannot be adjusted, because the models of its folds are gone; fit it anew")
        if fingerprint(paths) != self.provenance_["data_fingerprint"]:
            raise DataError(f"{paths[0].parent}: not the images that this detector was fitted on")
        size = self.base_.config.image_size
        train, held_out = (_read(part, size, progress) for part in self._split(paths))
        adjust_base(self.base_, train, settings, progress)
        self.settings = settings
        self._calibrate(*_score(self.base_, held_out, progress), cross_fitted=False, images=len(held_out))
        return self

    def _chosen(self, images: str | Path | Sequence[str | Path]) -> list[Path]:
        """The images to learn from: all that were given, or a random choice."""
        paths = good_images(Path(images)) if isinstance(images, str | Path) else [Path(p) for p in images]
        settings = self.settings
        limit = settings.shots or settings.max_images
        if len(paths) > limit:
            order = np.random.default_rng(settings.seed).permutation(len(paths))[:limit]
            paths = [paths[i] for i in sorted(order.tolist())]
        needed = settings.shots or 2 + MIN_HELD_OUT
        if len(paths) < needed:
            advice = "ask for fewer shots" if settings.shots else "add good images, or learn from fewer with --shots, without any promise"
            raise DataError(f"at least {needed} good images are needed, there are {len(paths)}; {advice}")
        return paths

    def _foreground(self, pixels: Sequence[Pixels]) -> tuple[Foreground, str]:
        """Where synthetic anomalies may appear, and why."""
        if self.settings.foreground != "auto":
            return self.settings.foreground, "set by the user, or the default"
        choice = choose_foreground(pixels)
        return choice.foreground, choice.reason

    def _cross_fits(self, paths: Sequence[Path]) -> bool:
        """Whether all images are both learnt from and judged, by models that did not see them."""
        way = self.settings.calibration
        if way == "held-out" and len(paths) < 2 * MIN_HELD_OUT:
            raise DataError(f"holding out {MIN_HELD_OUT} good images needs {2 * MIN_HELD_OUT}, there are {len(paths)}; use cross-fit")
        return way == "cross-fit" or (way == "auto" and len(paths) < FEW_IMAGES)

    def _split(self, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """Images to train on, and those held out for the calibration."""
        share = min(HELD_OUT_SHARE, MAX_HELD_OUT / len(paths))
        return split_held_out(paths, share, MIN_HELD_OUT, self.settings.seed)

    def _calibrate(self, scores: Sequence[float], peaks: Sequence[float], *, cross_fitted: bool, images: int) -> None:
        self.calibration_ = calibrate(scores, peaks, self.settings.false_reject_rate, cross_fitted=cross_fitted, images=images)
        self._peaks = sorted(peaks)

    def working_size(self, paths: Sequence[Path]) -> tuple[int, int]:
        """``(H, W)`` the model works at: for the feature bases with the median proportions of the images, for others square."""
        if self.base not in FEATURE_BASES:
            preset = None if self.settings.preset is None else load_preset(self.settings.preset)
            side = self.settings.image_size or 512
            return preset.encode_size if preset and self.settings.image_size is None else (side, side)
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

    def set_false_reject_rate(self, rate: float) -> None:
        """Choose another false-reject rate; the thresholds follow from the stored held-out scores."""
        self._require_fit()
        old = self.calibration_
        self.calibration_ = calibrate(old.scores, self._peaks, rate, cross_fitted=old.cross_fitted, images=old.threshold.n)

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
        try:
            detector = cls(model["source"], from_json(FitSettings, model["settings"]))
            detector.base_ = load_base(model["base"], folder / BASE_FOLDER, model["config"])
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
        preset = None if self.settings.preset is None else load_preset(self.settings.preset)
        chosen = {} if preset is None else {"preset": preset.describe()}
        return chosen | {
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


def _read(paths: Sequence[Path], size: tuple[int, int], progress: Progress) -> list[Pixels]:
    """Images ``[H, W, 3]`` at one size."""
    pixels = []
    for path in paths:
        pixels.append(resize_pixels(load_image(path), size))
        progress("reading images", len(pixels), len(paths))
    return pixels


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
