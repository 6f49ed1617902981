"""What a fit is: which images are learnt from and which are held out, the training, and the calibration on what training did not see."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, DataError
from gladad.core.images import list_images, load_image, resize_pixels
from gladad.core.processes import process_count
from gladad.core.records import Progress, prefixed
from gladad.core.threads import in_order
from gladad.data.few_shot import FEW, moved_copies, with_copies
from gladad.data.foreground import Foreground, choose_foreground
from gladad.data.samples import file_digest, fingerprint, good_images, split_held_out
from gladad.data.tolerance import versions
from gladad.decision.conformal import MIN_HELD_OUT, Calibration, calibrate, images_to_hold_out
from gladad.decision.scope import Scope
from gladad.detector.fitted import Fitted, SeenImages
from gladad.detector.view import read_pixels
from gladad.models.family import Family, Model, Training
from gladad.models.registry import family_of, family_of_kind
from gladad.models.settings import DenoisingSettings, FitSettings
from gladad.models.tiled import Tiled, cut, tiled

if TYPE_CHECKING:
    from gladad.data.alignment import Alignment
    from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig
    from gladad.training.loop import TrainingRun

Pixels = NDArray[np.uint8]
Images = str | Path | Sequence[str | Path]
FEW_IMAGES = 24
"""Below this many images none can be spared: the calibration is cross-fitted."""
FOLDS = 2
PARTS = ("all", *(f"fold-{fold + 1}" for fold in range(FOLDS)))
"""Names of the trainings of a fit, as folders of their checkpoints: that of the model, and those of cross-fitting."""
MAX_TEXTURES = 300
ALIGNED_IMAGES = 100
"""From which is learnt how to locate a part."""
NO_RECORD = (
    "the model was saved by a version that did not record which images it was trained on: "
    "the promise holds only if none of them are among those that it is calibrated on"
)


@dataclass(frozen=True)
class Fitter:
    """The name of a model and the user's choices, and what follows from them for images.

    Attributes:
        name: Of the model or its weights, see `gladad.models.registry.family_of`.
        settings: The user's choices, of the family's class.
    """

    name: str
    settings: FitSettings

    @property
    def family(self) -> Family:
        """What trains it."""
        return family_of(self.name)

    def fit(self, images: Images, run: TrainingRun | None, progress: Progress) -> Fitted:
        """Learn from good images, see `gladad.detector.glad.Glad.fit`."""
        self.family.check(self.name, self.settings, False)
        paths = self.chosen(images)
        cross_fitted = self.cross_fits(paths)
        # What is held out takes no part in any choice: the thresholds' guarantee needs that.
        kept, held_out = (paths, []) if cross_fitted else self.split(paths)
        alignment = self.alignment(kept)
        tile = self.working_size(kept, alignment)
        size = (self.settings.tiles * tile[0], self.settings.tiles * tile[1])
        pixels = read_pixels(kept, size, progress, alignment)
        place, reason = self.foreground(pixels)
        few, folds = len(paths) < FEW, FOLDS if cross_fitted and len(paths) > 1 else 0
        training = Training(self.name, self.settings, tile, {"": place}, self.textures(tile), share=1 + folds, run=run, progress=progress)

        def train(images: Sequence[Pixels], part: str, told: Progress) -> Model:
            shown = with_copies(images, self.settings.seed) if few else images
            tiles = [each for pixels in shown for each in cut(pixels, self.settings.tiles)]
            photographs, copies = None, 0
            if len(images) > 1:  # of one image there are only copies and tiles to tell apart
                share = self.settings.tiles**2
                photographs, copies = [i // share % len(images) for i in range(len(tiles))], len(tiles) - share * len(images)
            own_run = None if run is None else run.part(part, watched=part == PARTS[0])
            own = replace(training, run=own_run, progress=told, photographs=photographs, alone=len(images) == 1, copies=copies)
            return tiled(self.family.train({"": tiles}, own)[""], self.settings.tiles)

        model = train(pixels, PARTS[0], progress)
        if not cross_fitted:
            scores, peaks = held_out_scores(model, read_pixels(held_out, size, progress, alignment), self.settings, progress)
        elif not folds:  # one image: nothing but its own copies to be judged by
            scores, peaks = held_out_scores(model, moved_copies(pixels, self.settings.seed), self.settings, progress)
        else:
            scores, peaks = [], []
            for fold in range(folds):
                rest = [p for i, p in enumerate(pixels) if i % FOLDS != fold]
                out = [p for i, p in enumerate(pixels) if i % FOLDS == fold]
                other = train(rest, PARTS[1 + fold], prefixed(progress, f"fold {fold + 1} of {FOLDS}: "))
                found = held_out_scores(other, moved_copies(out, self.settings.seed) if few else out, self.settings, progress)
                del other  # two sets of networks are enough
                scores, peaks = scores + found[0], peaks + found[1]
        judged = len(paths) if cross_fitted else len(held_out)
        calibration = self.calibration(scores, peaks, judged, cross_fitted=folds > 0)
        provenance = self.provenance(paths, judged, place, reason)
        return Fitted(model, calibration, sorted(peaks), provenance, seen(kept, held_out), alignment)

    def fit_together(self, images: Mapping[str, Sequence[str | Path]], run: TrainingRun | None, progress: Progress) -> dict[str, Fitted]:
        """Fit one denoiser for several products, see `gladad.detector.glad.Glad.fit_together`."""
        self.family.check(self.name, self.settings, True)
        if self.settings.align or self.settings.tiles > 1:
            raise ConfigError("align and tiles are for one product; fit each by itself")
        chosen = {product: self.chosen(images[product]) for product in sorted(images)}
        for product, paths in chosen.items():
            if len(paths) < FEW_IMAGES:
                raise DataError(f"{product}: at least {FEW_IMAGES} good images are needed to fit it together with others, not {len(paths)}")
        split = {product: self.split(paths) for product, paths in chosen.items()}
        # One grid for all: that of the images together.
        size = self.working_size([path for train, _ in split.values() for path in evenly(train, 25)])
        kept = {product: read_pixels(train, size, prefixed(progress, f"{product}: ")) for product, (train, _) in split.items()}
        places = {product: self.foreground(pixels, product) for product, pixels in kept.items()}
        own_run = None if run is None else run.part(PARTS[0])
        foregrounds = {product: place for product, (place, _) in places.items()}
        training = Training(self.name, self.settings, size, foregrounds, self.textures(size), run=own_run, progress=progress)
        models = self.family.train(kept, training)
        fitted = {}
        for product, (train, held_out) in split.items():
            told = prefixed(progress, f"{product}: ")
            scores, peaks = held_out_scores(models[product], read_pixels(held_out, size, told), self.settings, told)
            calibration = self.calibration(scores, peaks, len(scores))
            provenance = self.provenance(chosen[product], len(scores), *places[product])
            fitted[product] = Fitted(models[product], calibration, sorted(peaks), provenance, seen(train, held_out))
        return fitted

    def adjust(self, fitted: Fitted, images: Images, settings: FitSettings, progress: Progress) -> Fitted:
        """Change how a fitted model inspects, see `gladad.detector.glad.Glad.adjust`."""
        family, after = self.family, Fitter(self.name, settings)
        family.check(self.name, settings, False)
        before, wanted = family.training_values(self.settings), family.training_values(settings)
        if fixed := sorted(key for key in wanted if wanted[key] != before[key]):
            raise ConfigError(f"{fixed[0]} cannot be changed without another fit")
        if replace(settings, false_reject_rate=self.settings.false_reject_rate) == self.settings:
            return after.at_rate(fitted)
        train, held_out = self.split_of(fitted, images, "adjusted")
        if isinstance(fitted.model, Tiled):
            raise ConfigError("a model of tiles cannot be adjusted; fit it again")
        model = family.adjust(fitted.model, fitted.pixels(train, progress), settings, progress)
        return after.recalibrated(replace(fitted, model=model), held_out, progress)

    def recalibrate(self, fitted: Fitted, images: Images, progress: Progress, scope: Scope | None = None) -> Fitted:
        """Make the thresholds anew, see `gladad.detector.glad.Glad.calibrate`."""
        if scope is not None:
            if scope and fitted.alignment is not None:
                raise ConfigError("places cannot be ignored where parts are aligned (--align): they lie elsewhere in every image")
            fitted = replace(fitted, scope=scope or None)
        paths = listed(images)
        kept, notes = paths, []
        if fitted.seen is None:
            if fingerprint(paths) == fitted.provenance["data_fingerprint"]:
                if self.cross_fits(paths):
                    raise DataError("these are the images of the fit, of which none were held out; give good images that it has not seen")
                kept = self.split(paths)[1]
            else:
                notes.append(NO_RECORD)
        else:
            kept = [path for path in paths if file_digest(path) not in fitted.seen.trained]
        left_out, kept = len(paths) - len(kept), distinct(kept)
        if len(kept) < MIN_HELD_OUT:
            why = f"; {left_out} of the {len(paths)} given were trained on, and none of those can be used" if left_out else ""
            raise DataError(f"at least {MIN_HELD_OUT} good images that the model has not seen are needed, there are {len(kept)}{why}")
        told = replace(fitted, provenance=fitted.provenance | {"left_out": left_out, "notes": notes})
        return self.recalibrated(told, kept, progress)

    def tune_features(
        self, fitted: Fitted, images: Images, config: FeatureTuningConfig | None, run: TrainingRun | None, progress: Progress
    ) -> Fitted:
        """Fine-tune the extractor that scores, see `gladad.detector.glad.Glad.tune_features`."""
        from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig, tune_features
        from gladad.models.stable_diffusion.model import StableDiffusion
        from gladad.training.loop import TrainingRun

        model = fitted.model
        if not isinstance(model, StableDiffusion):
            what = "model of tiles" if isinstance(model, Tiled) else f"{model.kind} model"
            raise ConfigError(f"the extractor of a {what} cannot be tuned; this is for Stable Diffusion models")
        train, held_out = self.split_of(fitted, images, "tuned")
        before = model.pipeline.tuned_weights()
        try:
            own = config or FeatureTuningConfig()
            tune_features(model, fitted.pixels(train, progress), own, run=run or TrainingRun(), progress=progress)
            return self.recalibrated(fitted, held_out, progress)
        except BaseException:
            model.pipeline.tune_scoring(before)  # the thresholds are those of this extractor
            raise

    def recalibrated(self, fitted: Fitted, held_out: Sequence[Path], progress: Progress) -> Fitted:
        """With thresholds from images that the model was not trained on."""
        scores, peaks = held_out_scores(fitted, fitted.pixels(held_out, progress), self.settings, progress)
        known = None if fitted.seen is None else replace(fitted.seen, held_out=seen([], held_out).held_out)
        provenance = fitted.provenance | {"held_out": len(held_out)} | self.speed
        new = self.calibration(scores, peaks, len(scores))
        return replace(fitted, calibration=new, peaks=sorted(peaks), provenance=provenance, seen=known)

    def at_rate(self, fitted: Fitted) -> Fitted:
        """With thresholds for the false-reject rate of the settings, from the scores that are there."""
        old = fitted.calibration
        count, tolerated = old.threshold.n, old.threshold.tolerated
        new = self.calibration(old.scores, fitted.peaks, count, cross_fitted=old.cross_fitted, tolerated=tolerated)
        return replace(fitted, calibration=new)

    # -- images -------------------------------------------------------------------------------------------------

    def chosen(self, images: Images) -> list[Path]:
        """The images to learn from: all that were given, or a random choice; one of each content."""
        paths = distinct(listed(images))
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
        wanted = images_to_hold_out(len(paths), self.settings.false_reject_rate)
        return split_held_out(paths, wanted / len(paths), MIN_HELD_OUT, self.settings.seed)

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

    def foreground(self, pixels: Sequence[Pixels], product: str = "") -> tuple[Foreground, str]:
        """Where synthetic anomalies may appear, and why."""
        place, reason = self.family.foreground(self.settings, product)
        if place is not None:
            return place, reason
        choice = choose_foreground(pixels)
        return choice.foreground, choice.reason

    def alignment(self, paths: Sequence[Path]) -> Alignment | None:
        """How parts are located, learnt from a choice of the images."""
        if not self.settings.align:
            return None
        from gladad.data.alignment import Alignment  # late, with its scipy: inspection does without

        return Alignment.learn([load_image(path) for path in evenly(paths, ALIGNED_IMAGES)])

    def working_size(self, paths: Sequence[Path], alignment: Alignment | None = None) -> tuple[int, int]:
        """``(H, W)`` the model works at, by the median proportions and number of pixels of images, or of what is kept of them."""
        shapes: list[tuple[float, float]] = [load_image(path).shape[:2] for path in evenly(paths, 25)]
        if alignment is not None:
            shapes = [alignment.size(*shape) for shape in shapes]
        aspect, pixels = (float(np.median(each)) for each in zip(*((w / h, w * h) for h, w in shapes), strict=True))
        of_tile = pixels / self.settings.tiles**2
        return self.family.working_size(self.settings, (math.sqrt(of_tile / aspect), math.sqrt(of_tile * aspect)))

    def textures(self, size: tuple[int, int]) -> list[Pixels]:
        """Images ``[H, W, 3]`` that synthetic anomalies take content from."""
        if not isinstance(self.settings, DenoisingSettings) or self.settings.textures is None:
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

    def calibration(
        self,
        scores: Sequence[float],
        peaks: Sequence[float],
        images: int,
        *,
        cross_fitted: bool = False,
        tolerated: Sequence[str] | None = None,
    ) -> Calibration:
        """Thresholds from the scores and map peaks of so many images; of changes ``tolerated`` in these, if not those of the settings."""
        changes = self.settings.tolerate if tolerated is None else tolerated
        return calibrate(scores, peaks, self.settings.false_reject_rate, cross_fitted=cross_fitted, images=images, tolerated=changes)

    def provenance(self, paths: Sequence[Path], held_out: int, foreground: Foreground, reason: str) -> dict[str, Any]:
        """What a fit is known again by."""
        return {
            "data_fingerprint": fingerprint(paths),
            "images": len(paths),
            "held_out": held_out,
            "foreground": {"foreground": foreground, "reason": reason},
            "seed": self.settings.seed,
            "versions": _versions(),
        } | self.speed

    @property
    def speed(self) -> dict[str, str]:
        """At what speed thresholds are made, where a model has several."""
        return {"speed": self.settings.speed} if hasattr(self.settings, "speed") else {}


def seen(trained: Sequence[Path], held_out: Sequence[Path]) -> SeenImages:
    """The record of a fit's files."""
    return SeenImages(frozenset(map(file_digest, trained)), frozenset(map(file_digest, held_out)))


def listed(images: Images) -> list[Path]:
    """Paths of good images."""
    return good_images(Path(images)) if isinstance(images, str | Path) else [Path(p) for p in images]


def distinct(paths: Sequence[Path]) -> list[Path]:
    """The first file of each content: copies must not be both learnt from and judged, and a promise is made by their number."""
    return list({file_digest(path): path for path in reversed(paths)}.values())[::-1]


def evenly(paths: Sequence[Path], count: int) -> Sequence[Path]:
    """About ``count`` of them."""
    return paths[:: max(1, len(paths) // count)]


def held_out_scores(
    judge: Model | Fitted, images: Sequence[Pixels], settings: FitSettings, progress: Progress
) -> tuple[list[float], list[float]]:
    """Raw scores and map peaks of held-out normal images: the largest, of each as it is and under all changes that are to be tolerated."""
    model = judge.model if isinstance(judge, Fitted) else judge

    def look(number: int) -> tuple[float, float]:
        seen = [judge.inspect(pixels) for pixels in versions(images[number], settings.tolerate, (settings.seed, 2, number))]
        return max(each.score for each in seen), max(float(each.map.max()) for each in seen)

    if family_of_kind(model.kind).LONG and process_count() > 1:
        from gladad.training.loop import divided

        found = divided(look, len(images), lambda *done: progress("calibration", *done))
    else:
        found = []
        for pair in in_order(look, range(len(images)), model.workers):
            found.append(pair)
            progress("calibration", len(found), len(images))
    return [score for score, _ in found], [peak for _, peak in found]


def _versions() -> dict[str, str]:
    names = ("gladad", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
