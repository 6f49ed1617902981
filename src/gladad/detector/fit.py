"""What a fit is: which images are learnt from and which are held out, the training, and the calibration on what training did not see."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, DataError
from gladad.core.images import list_images, load_image, resize_pixels
from gladad.core.records import Progress
from gladad.core.settings import to_json
from gladad.core.threads import in_order
from gladad.data.few_shot import FEW, moved_copies, with_copies
from gladad.data.foreground import Foreground, choose_foreground
from gladad.data.samples import fingerprint, good_images, split_held_out
from gladad.decision.conformal import MIN_HELD_OUT, Calibration, calibrate
from gladad.features.whitening import size_for_aspect
from gladad.models.feature_diffusion.model import LiteBase
from gladad.models.registry import (
    FEATURE_BASES,
    INSPECTION_SETTINGS,
    Base,
    FitSettings,
    adjust_base,
    check_settings,
    train_base,
    train_bases,
)
from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig, tune_features
from gladad.models.stable_diffusion.model import PaperBase
from gladad.models.stable_diffusion.presets import category_preset, load_preset
from gladad.training.loop import TrainingRun, divided

Pixels = NDArray[np.uint8]
Images = str | Path | Sequence[str | Path]
HELD_OUT_SHARE = 0.2
MAX_HELD_OUT = 120
FEW_IMAGES = 24
"""Below this many images none can be spared: the calibration is cross-fitted."""
FOLDS = 2
PARTS = ("all", *(f"fold-{fold + 1}" for fold in range(FOLDS)))
"""Names of the trainings of a fit, as folders of their checkpoints: that of the model, and those of cross-fitting."""
MAX_TEXTURES = 300


@dataclass(frozen=True)
class Fitted:
    """What a fit makes.

    Attributes:
        base: The trained base.
        calibration: Thresholds and held-out scores.
        peaks: Largest raw map value of each held-out image, rising.
        provenance: Versions, seed and data fingerprint.
    """

    base: Base
    calibration: Calibration
    peaks: list[float]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Fitter:
    """A base's name and the user's choices, and what follows from them for images.

    Attributes:
        name: Of the base, see `gladad.models.registry.train_base`.
        settings: The user's choices.
    """

    name: str
    settings: FitSettings

    def fit(self, images: Images, run: TrainingRun, progress: Progress) -> Fitted:
        """Learn from good images, see `gladad.detector.glad.Glad.fit`."""
        settings = self.settings
        check_settings(self.name, settings)
        paths = self.chosen(images)
        cross_fitted = self.cross_fits(paths)
        # What is held out takes no part in any choice: the thresholds' guarantee needs that.
        kept, held_out = (paths, []) if cross_fitted else self.split(paths)
        size = self.working_size(kept)
        pixels = read_pixels(kept, size, progress)
        textures = self.textures(size)
        foreground, reason = self.foreground(pixels)
        few, share = len(paths) < FEW, FOLDS + 1 if cross_fitted else 1

        def train(images: Sequence[Pixels], part: str, told: Progress) -> Base:
            shown = with_copies(images, settings.seed) if few else images
            return train_base(self.name, shown, size, settings, textures, foreground, share, run.part(part), told)

        base = train(pixels, PARTS[0], progress)
        if not cross_fitted:
            scores, peaks = judge(base, read_pixels(held_out, size, progress), progress)
        elif len(pixels) == 1:  # nothing but its own copies to be judged by
            scores, peaks = judge(base, moved_copies(pixels, settings.seed), progress)
        else:
            scores, peaks = [], []
            for fold in range(FOLDS):
                rest = [p for i, p in enumerate(pixels) if i % FOLDS != fold]
                out = [p for i, p in enumerate(pixels) if i % FOLDS == fold]
                other = train(rest, PARTS[1 + fold], prefixed(progress, f"fold {fold + 1} of {FOLDS}: "))
                fold_scores, fold_peaks = judge(other, moved_copies(out, settings.seed) if few else out, progress)
                del other  # two sets of networks are enough
                scores += fold_scores
                peaks += fold_peaks
        images_judged = len(paths) if cross_fitted else len(held_out)
        return Fitted(
            base,
            self.calibration(scores, peaks, images_judged, cross_fitted=cross_fitted and len(paths) > 1),
            sorted(peaks),
            self.provenance(paths, images_judged, foreground, reason),
        )

    def fit_together(self, images: Mapping[str, Sequence[str | Path]], run: TrainingRun, progress: Progress) -> dict[str, Fitted]:
        """Fit one denoiser for several products, see `gladad.detector.glad.Glad.fit_together`."""
        check_settings(self.name, self.settings, together=True)
        chosen = {category: self.chosen(images[category]) for category in sorted(images)}
        for category, paths in chosen.items():
            if len(paths) < FEW_IMAGES:
                raise DataError(
                    f"{category}: at least {FEW_IMAGES} good images are needed to fit it together with others, not {len(paths)}"
                )
        split = {category: self.split(paths) for category, paths in chosen.items()}
        # One grid for all: that of the images together.
        size = self.working_size([path for train, _ in split.values() for path in train[:: max(1, len(train) // 25)]])
        kept = {category: read_pixels(train, size, prefixed(progress, f"{category}: ")) for category, (train, _) in split.items()}
        places = {category: self.foreground(pixels, category) for category, pixels in kept.items()}
        foregrounds = {category: foreground for category, (foreground, _) in places.items()}
        bases = train_bases(self.name, kept, size, self.settings, self.textures(size), foregrounds, run.part(PARTS[0]), progress)
        fitted = {}
        for category, (_, held_out) in split.items():
            told = prefixed(progress, f"{category}: ")
            scores, peaks = judge(bases[category], read_pixels(held_out, size, told), told)
            calibration = self.calibration(scores, peaks, len(scores))
            provenance = self.provenance(chosen[category], len(scores), *places[category])
            fitted[category] = Fitted(bases[category], calibration, sorted(peaks), provenance)
        return fitted

    def adjust(self, fitted: Fitted, images: Images, settings: FitSettings, progress: Progress) -> Fitted:
        """Change how a fitted ``lite`` base inspects, see `gladad.detector.glad.Glad.adjust`."""
        old, new = to_json(self.settings), to_json(settings)
        changed = [name for name in new if new[name] != old[name]]
        if fixed := sorted(set(changed) - INSPECTION_SETTINGS):
            raise ConfigError(f"{fixed[0]} cannot be changed without another fit")
        base, after = fitted.base, Fitter(self.name, settings)
        if set(changed) <= {"false_reject_rate"}:
            return after.at_rate(fitted)
        if not isinstance(base, LiteBase):
            raise ConfigError(f"the inspection of a {base.kind} base cannot be adjusted; fit it anew")
        train, held_out = self.split_of(fitted, images, "adjusted")
        size = base.config.image_size
        adjust_base(base, read_pixels(train, size, progress), settings, progress)
        return after.recalibrated(fitted, read_pixels(held_out, size, progress), progress)

    def recalibrate(self, fitted: Fitted, images: Images, progress: Progress) -> Fitted:
        """Make the thresholds anew, see `gladad.detector.glad.Glad.calibrate`."""
        paths = good_images(Path(images)) if isinstance(images, str | Path) else [Path(p) for p in images]
        if fingerprint(paths) == fitted.provenance["data_fingerprint"]:
            if self.cross_fits(paths):
                raise DataError("these are the images of the fit, of which none were held out; give good images that it has not seen")
            paths = self.split(paths)[1]
        if len(paths) < MIN_HELD_OUT:
            raise DataError(f"at least {MIN_HELD_OUT} good images are needed to calibrate, there are {len(paths)}")
        size: tuple[int, int] = fitted.base.config.image_size
        return self.recalibrated(fitted, read_pixels(paths, size, progress), progress)

    def tune_features(self, fitted: Fitted, images: Images, config: FeatureTuningConfig, run: TrainingRun, progress: Progress) -> Fitted:
        """Fine-tune the extractor that scores, see `gladad.detector.glad.Glad.tune_features`."""
        base = fitted.base
        if not isinstance(base, PaperBase):
            raise ConfigError(f"the extractor of a {base.kind} base cannot be tuned; this is for Stable Diffusion bases")
        train, held_out = self.split_of(fitted, images, "tuned")
        size, before = base.config.image_size, base.pipeline.tuned_weights()
        try:
            tune_features(base, read_pixels(train, size, progress), config, run=run, progress=progress)
            return self.recalibrated(fitted, read_pixels(held_out, size, progress), progress)
        except BaseException:
            base.pipeline.tune_scoring(before)  # the thresholds are those of this extractor
            raise

    def recalibrated(self, fitted: Fitted, held_out: Sequence[Pixels], progress: Progress) -> Fitted:
        """With thresholds from held-out images at the base's size."""
        scores, peaks = judge(fitted.base, held_out, progress)
        provenance = fitted.provenance | {"held_out": len(held_out)}
        return Fitted(fitted.base, self.calibration(scores, peaks, len(scores)), sorted(peaks), provenance)

    def at_rate(self, fitted: Fitted) -> Fitted:
        """With thresholds for the false-reject rate of the settings, from the scores that are there."""
        old = fitted.calibration
        calibration = self.calibration(old.scores, fitted.peaks, old.threshold.n, cross_fitted=old.cross_fitted)
        return replace(fitted, calibration=calibration)

    # -- images -------------------------------------------------------------------------------------------------

    def chosen(self, images: Images) -> list[Path]:
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

    def cross_fits(self, paths: Sequence[Path]) -> bool:
        """Whether all images are both learnt from and judged, by models that did not see them."""
        way = self.settings.calibration
        if way == "held-out" and len(paths) < 2 * MIN_HELD_OUT:
            raise DataError(f"holding out {MIN_HELD_OUT} good images needs {2 * MIN_HELD_OUT}, there are {len(paths)}; use cross-fit")
        return way == "cross-fit" or (way == "auto" and len(paths) < FEW_IMAGES)

    def split(self, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """Images to train on, and those held out for the calibration."""
        share = min(HELD_OUT_SHARE, MAX_HELD_OUT / len(paths))
        return split_held_out(paths, share, MIN_HELD_OUT, self.settings.seed)

    def split_of(self, fitted: Fitted, images: Images, what: str) -> tuple[list[Path], list[Path]]:
        """`split` of the images of an earlier fit.

        Raises:
            ConfigError: That fit held nothing out.
            DataError: They are other images.
        """
        paths = self.chosen(images)
        if self.cross_fits(paths):
            raise ConfigError(f"a cross-fitted detector cannot be {what}, because the models of its folds are gone; fit it anew")
        if fingerprint(paths) != fitted.provenance["data_fingerprint"]:
            raise DataError(f"{paths[0].parent}: not the images that this detector was fitted on")
        return self.split(paths)

    def foreground(self, pixels: Sequence[Pixels], category: str = "") -> tuple[Foreground, str]:
        """Where synthetic anomalies may appear, and why."""
        if self.settings.preset is not None:
            preset = load_preset(self.settings.preset)
            return (category_preset(preset, category) if category else preset).synthesis_foreground, f"set by the preset {preset.name}"
        if self.settings.foreground != "auto":
            return self.settings.foreground, "set by the user, or the default"
        choice = choose_foreground(pixels)
        return choice.foreground, choice.reason

    def working_size(self, paths: Sequence[Path]) -> tuple[int, int]:
        """``(H, W)`` the model works at: for the feature bases with the median proportions of the images, for others square."""
        if self.name not in FEATURE_BASES:
            preset = None if self.settings.preset is None else load_preset(self.settings.preset)
            side = self.settings.image_size or 512
            return preset.encode_size if preset and self.settings.image_size is None else (side, side)
        shapes = [load_image(path).shape for path in paths[:: max(1, len(paths) // 25)]]
        aspect = float(np.median([width / height for height, width, _ in shapes]))
        return size_for_aspect(aspect, self.settings.image_size or 256)

    def textures(self, size: tuple[int, int]) -> list[Pixels]:
        """Images ``[H, W, 3]`` that synthetic anomalies take content from."""
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

    # -- results ------------------------------------------------------------------------------------------------

    def calibration(self, scores: Sequence[float], peaks: Sequence[float], images: int, *, cross_fitted: bool = False) -> Calibration:
        """Thresholds from the scores and map peaks of so many images."""
        return calibrate(scores, peaks, self.settings.false_reject_rate, cross_fitted=cross_fitted, images=images)

    def provenance(self, paths: Sequence[Path], held_out: int, foreground: Foreground, reason: str) -> dict[str, Any]:
        """What a fit is known again by."""
        return {
            "data_fingerprint": fingerprint(paths),
            "images": len(paths),
            "held_out": held_out,
            "foreground": {"foreground": foreground, "reason": reason},
            "seed": self.settings.seed,
            "versions": _versions(),
        }


def read_pixels(paths: Sequence[Path], size: tuple[int, int], progress: Progress) -> list[Pixels]:
    """Images ``[H, W, 3]`` at one size."""
    pixels = []
    for path in paths:
        pixels.append(resize_pixels(load_image(path), size))
        progress("reading images", len(pixels), len(paths))
    return pixels


def judge(base: Base, images: Sequence[Pixels], progress: Progress) -> tuple[list[float], list[float]]:
    """Raw scores and map peaks of held-out normal images."""

    def look(pixels: Pixels) -> tuple[float, float]:
        inspection = base.inspect(pixels)
        return inspection.score, float(inspection.map.max())

    if isinstance(base, PaperBase):
        found = divided(lambda number: look(images[number]), len(images), lambda *done: progress("calibration", *done))
    else:
        found = []
        for pair in in_order(look, images, base.workers):
            found.append(pair)
            progress("calibration", len(found), len(images))
    return [score for score, _ in found], [peak for _, peak in found]


def prefixed(progress: Progress, prefix: str) -> Progress:
    """The same progress, with a word before each stage."""
    return lambda stage, done, total: progress(prefix + stage, done, total)


def _versions() -> dict[str, str]:
    names = ("gladad", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
