"""`Glad`: fit on good parts, predict, save, load. A thin shell over a fit and its result; it holds no algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, ModelFormatError, NotFittedError
from gladad.core.images import as_pixels
from gladad.core.records import Prediction, Progress, no_progress
from gladad.core.settings import from_json, to_json
from gladad.core.storage import FORMAT, FORMAT_VERSION, MODEL_FILE, atomic_folder, read_json, read_model_file, write_json
from gladad.core.threads import in_order
from gladad.data.samples import expand_paths
from gladad.decision.conformal import Calibration
from gladad.decision.regions import find_regions
from gladad.detector.fit import Fitted, Fitter, Images
from gladad.models.registry import Base, FitSettings, load_base
from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig
from gladad.models.stable_diffusion.model import PaperBase
from gladad.models.stable_diffusion.presets import load_preset
from gladad.training.loop import TrainingRun

Pixels = NDArray[np.uint8]
CALIBRATION_FILE = "calibration.json"
BASE_FOLDER = "base"


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

    def __init__(self, base: str = "lite", settings: FitSettings | None = None):
        self.base = base
        self.settings = FitSettings() if settings is None else settings
        self._fitted: Fitted | None = None

    @classmethod
    def from_base(cls, base: str = "lite", *, settings: FitSettings | None = None) -> Glad:
        """A detector to be fitted.

        Args:
            base: ``lite``, one of `BASELINES`, or ``sd14``, folder or Hub id of a Stable Diffusion in diffusers form.
            settings: What may be chosen about the fit.
        """
        return cls(base, settings)

    @property
    def base_(self) -> Base:
        """The fitted base."""
        return self._require_fit().base

    @property
    def calibration_(self) -> Calibration:
        """Thresholds and held-out scores."""
        return self._require_fit().calibration

    @property
    def provenance_(self) -> dict[str, Any]:
        """Versions, seed and data fingerprint of the fit."""
        return self._require_fit().provenance

    # -- fit ----------------------------------------------------------------------------------------------------

    def fit(self, images: Images, *, run: TrainingRun | None = None, progress: Progress = no_progress) -> Glad:
        """Learn from good images only, and calibrate on a part of them that training does not see.

        Args:
            images: A folder of good images, a data set category (its ``train/good`` is taken), or paths.
            run: Checkpoints, logs and examples of a diffusers base; with the same folder, a fit that was stopped goes on.
            progress: Told of every stage.

        Returns:
            This detector.

        Raises:
            ConfigError: The settings do not fit together or are not for this base, or the training would not fit into memory.
            DataError: There are too few images, or one cannot be read (it is named).
            Interrupted: The training was asked to stop, and has saved where it is.
        """
        self._fitted = self._fitter.fit(images, run or TrainingRun(), progress)
        return self

    @classmethod
    def fit_together(
        cls,
        images: Mapping[str, Sequence[str | Path]],
        base: str = "lite",
        settings: FitSettings | None = None,
        *,
        run: TrainingRun | None = None,
        progress: Progress = no_progress,
    ) -> dict[str, Glad]:
        """Fit one denoiser for several products, which it is told apart by their name; each product gets a detector that uses it.

        Everything but the denoiser is the product's own, the thresholds included. Each detector is saved and loaded by itself.

        Args:
            images: Category -> paths of its good images; at least 24 for each.
            base: ``lite``, or ``sd14``, folder or Hub id of a Stable Diffusion in diffusers form, whose prompt then names the category.
            settings: What may be chosen about the fit; for ``lite`` the default of the steps grows with the square root of the number
                of products.
            run: As for `fit`.
            progress: Told of every stage.

        Raises:
            ConfigError: The base cannot be shared.
            DataError: There are too few images, or one cannot be read (it is named).
            Interrupted: As for `fit`.
        """
        settings = FitSettings() if settings is None else settings
        found = Fitter(base, settings).fit_together(images, run or TrainingRun(), progress)
        detectors = {category: cls(base, settings) for category in found}
        for category, detector in detectors.items():
            detector._fitted = found[category]
        return detectors

    def adjust(self, images: Images, settings: FitSettings, *, progress: Progress = no_progress) -> Glad:
        """Change how a fitted ``lite`` detector inspects, without another training; the result is that of a fit with these settings.

        Args:
            images: Those it was fitted on.
            settings: They differ from the detector's in those of `gladad.models.registry.INSPECTION_SETTINGS` only.
            progress: Told of every stage.

        Returns:
            This detector.

        Raises:
            ConfigError: Another setting differs; or more than the false-reject rate does, and the base is not a ``lite`` one or the
                calibration is cross-fitted.
            DataError: The images are not those of the fit.
        """
        self._fitted = self._fitter.adjust(self._require_fit(), images, settings, progress)
        self.settings = settings
        return self

    def calibrate(self, images: Images, *, progress: Progress = no_progress) -> Glad:
        """Make the thresholds anew, from good images that the training has not seen; the networks stay.

        Args:
            images: Good images, at least 4. Those of the fit, all of them, stand for the part of them that was held out.
            progress: Told of every image.

        Returns:
            This detector.

        Raises:
            DataError: There are too few images, or they are those of a fit that held nothing out.
        """
        self._fitted = self._fitter.recalibrate(self._require_fit(), images, progress)
        return self

    def tune_features(
        self, images: Images, config: FeatureTuningConfig | None = None, *, run: TrainingRun | None = None, progress: Progress = no_progress
    ) -> Glad:
        """Fine-tune the extractor that scores, on the images that the denoiser was trained on, and calibrate anew on those held out.

        Args:
            images: Those of the fit.
            config: The budget.
            run: As for `fit`.
            progress: Told of every stage.

        Returns:
            This detector.

        Raises:
            ConfigError: The base is not a diffusers one, or the calibration is cross-fitted.
            DataError: The images are not those of the fit.
            Interrupted: As for `fit`.
        """
        fitted = self._require_fit()
        self._fitted = self._fitter.tune_features(fitted, images, config or FeatureTuningConfig(), run or TrainingRun(), progress)
        return self

    def merge(self) -> Glad:
        """Add the adapter of a diffusers base to its weights, so that the model needs its base no more; scores agree up to rounding.

        Returns:
            This detector.

        Raises:
            ConfigError: The detector has no adapter.
            ModelFormatError: The base is not there any more.
        """
        fitted = self._require_fit()
        if not isinstance(fitted.base, PaperBase):
            raise ConfigError(f"a {fitted.base.kind} base has no adapter to merge")
        self._fitted = replace(fitted, base=fitted.base.standalone())
        return self

    def set_false_reject_rate(self, rate: float) -> None:
        """Choose another false-reject rate; the thresholds follow from the stored held-out scores."""
        settings = replace(self.settings, false_reject_rate=rate)
        self._fitted = Fitter(self.base, settings).at_rate(self._require_fit())
        self.settings = settings

    @property
    def _fitter(self) -> Fitter:
        return Fitter(self.base, self.settings)

    # -- inspection ---------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""
        return self.base_.workers

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Prediction:
        """Inspect one image.

        Args:
            image: A path, PIL image, array or tensor; see `gladad.core.images.as_pixels`.
            reconstruct: Make the picture of the reconstruction too.

        Returns:
            Score, p-value, decision, step, map, mask and regions. They depend on this image alone.

        Raises:
            DataError: The image cannot be used.
            NotFittedError: There is no model yet.
        """
        fitted = self._require_fit()
        pixels = as_pixels(image)
        started = time.perf_counter()
        inspection = fitted.base.inspect(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        raw = torch.from_numpy(inspection.map)[None, None]
        maps = F.interpolate(raw, size, mode="bilinear", align_corners=False)[0, 0] / fitted.calibration.pixel_threshold
        anomaly_map = maps.numpy()
        mask = anomaly_map > 1.0
        threshold = fitted.calibration.threshold.value
        seconds = time.perf_counter() - started
        return Prediction(
            pred_score=inspection.score / threshold,
            p_value=fitted.calibration.p_value(inspection.score),
            pred_label=inspection.score > threshold,
            step=inspection.step,
            anomaly_map=anomaly_map,
            pred_mask=mask,
            regions=find_regions(mask, anomaly_map),
            image_size=size,
            reconstruction=fitted.base.picture(inspection, pixels, fitted.calibration.pixel_threshold) if reconstruct else None,
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
        fitted = self._require_fit()
        with atomic_folder(Path(folder)) as temporary:
            (temporary / BASE_FOLDER).mkdir()
            config = fitted.base.save(temporary / BASE_FOLDER)
            write_json(temporary / CALIBRATION_FILE, fitted.calibration.to_json() | {"map_peaks": fitted.peaks})
            description = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "base": fitted.base.kind,
                "source": self.base,
                "config": config,
                "settings": to_json(self.settings),
                "provenance": fitted.provenance,
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
            calibration = read_json(folder / CALIBRATION_FILE)
            detector._fitted = Fitted(
                base=load_base(model["base"], folder / BASE_FOLDER, model["config"]),
                calibration=Calibration.from_json(calibration),
                peaks=[float(p) for p in calibration["map_peaks"]],
                provenance=model["provenance"],
            )
        except (KeyError, TypeError, ConfigError) as error:
            raise ModelFormatError(f"{folder / MODEL_FILE}: key missing or wrong ({error})") from error
        return detector

    def describe(self) -> dict[str, Any]:
        """JSON-ready description: base and its origin, settings, calibration and provenance."""
        fitted = self._require_fit()
        calibration = fitted.calibration.to_json()
        scores = calibration.pop("scores")
        description: dict[str, Any] = {
            "base": fitted.base.kind,
            "source": self.base,
            "settings": to_json(self.settings),
            "config": to_json(fitted.base.config),
            "calibration": calibration | {"held_out_median": float(np.median(scores))},
            "provenance": fitted.provenance,
        }
        if self.settings.preset is not None:
            tuned = isinstance(fitted.base, PaperBase) and bool(fitted.base.pipeline.tuned_weights())
            replaced = self.settings.vae is not None
            description["preset"] = load_preset(self.settings.preset).describe(tuned_features=tuned, tuned_autoencoder=replaced)
        if isinstance(fitted.base, PaperBase) and fitted.base.pipeline.origin is not None:
            description["origin"] = to_json(fitted.base.pipeline.origin)
        return description

    def _require_fit(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("this detector has not been fitted; call fit() or load one with Glad.from_pretrained()")
        return self._fitted


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, str | Path):
        yield from expand_paths([Path(images)])
    elif isinstance(images, list | tuple):
        for image in images:
            yield from _flatten(image)
    else:
        yield images
