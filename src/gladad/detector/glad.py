"""`Glad`: fit on good parts, predict, save, load. A thin shell over a fit and its result; it holds no algorithm."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import NotFittedError
from gladad.core.images import as_pixels
from gladad.core.records import Prediction, Progress, no_progress
from gladad.core.threads import CancelToken, cancellable, in_order
from gladad.decision.conformal import Calibration
from gladad.decision.regions import find_regions
from gladad.decision.scope import Scope
from gladad.detector.files import Saved, describe, load_model, save_model
from gladad.detector.fitted import Fitted
from gladad.detector.view import View, each
from gladad.models.family import Model
from gladad.models.registry import make_settings
from gladad.models.settings import FitSettings

if TYPE_CHECKING:
    from gladad.detector.export import Comparison
    from gladad.detector.fit import Fitter, Images
    from gladad.models.exported.engines import ExportPrecision, Format
    from gladad.models.stable_diffusion.extractor_tuning import FeatureTuningConfig
    from gladad.training.loop import TrainingRun

Pixels = NDArray[np.uint8]


class Glad:
    """An anomaly detector for one product.

    Example:
        >>> detector = Glad.from_base("lite").fit("parts/good")
        >>> detector.inspect("part.png").pred_label
        >>> detector.save_pretrained("models/part")

    Attributes:
        model_: The fitted model.
        calibration_: Thresholds and held-out scores.
        provenance_: Versions, seed and data fingerprint of the fit.
    """

    def __init__(self, name: str = "lite", settings: FitSettings | None = None):
        self.name = name
        self.settings = make_settings(name) if settings is None else settings
        self._fitted: Fitted | None = None
        self._ids = ("", "")

    @classmethod
    def from_base(cls, base: str = "lite", *, settings: FitSettings | Mapping[str, Any] | None = None) -> Glad:
        """A detector to be fitted.

        Args:
            base: One of `gladad.models.registry.BUILT_IN`, or ``sd14``, folder or Hub id of a Stable Diffusion in diffusers form.
            settings: What may be chosen about the fit: settings of the model's family, or values by their names, such as
                ``{"training.steps": 900}``.

        Raises:
            ConfigError: A name is unknown to this model, or a value is wrong.
        """
        return cls(base, settings if isinstance(settings, FitSettings) else make_settings(base, settings))

    @property
    def model_(self) -> Model:
        """The fitted model."""
        return self._require_fit().model

    @property
    def calibration_(self) -> Calibration:
        """Thresholds and held-out scores."""
        return self._require_fit().calibration

    @property
    def provenance_(self) -> dict[str, Any]:
        """Versions, seed and data fingerprint of the fit."""
        return self._require_fit().provenance

    @property
    def model_id(self) -> str:
        """What the fitted model is called: the start of the SHA-256 of its config and everything it learned."""
        return self._ids[0]

    @property
    def calibration_id(self) -> str:
        """What its calibration is called: the start of the SHA-256 of the held-out scores and thresholds."""
        return self._ids[1]

    # -- fit ----------------------------------------------------------------------------------------------------

    def fit(
        self, images: Images, *, run: TrainingRun | None = None, progress: Progress = no_progress, cancel: CancelToken | None = None
    ) -> Glad:
        """Learn from good images only, and calibrate on a part of them that training does not see.

        Args:
            images: A folder of good images, a data set category (its ``train/good`` is taken), or paths.
            run: Checkpoints, logs and examples of a Stable Diffusion; with the same folder, a fit that was stopped goes on. Its ``watch``
                looks at every training with a denoiser.
            progress: Told of every stage.
            cancel: Stops the fit between two steps when it is cancelled, from any thread.

        Raises:
            ConfigError: The settings do not fit together or are not for this model, or the training would not fit into memory.
            DataError: There are too few images, or one cannot be read (it is named).
            Interrupted: The training was asked to stop, and has saved where it is if it can go on.
        """
        self._set(self._fitter.fit(images, run, cancellable(progress, cancel)))
        return self

    @classmethod
    def fit_together(
        cls,
        images: Mapping[str, Sequence[str | Path]],
        base: str = "lite",
        settings: FitSettings | Mapping[str, Any] | None = None,
        *,
        run: TrainingRun | None = None,
        progress: Progress = no_progress,
        cancel: CancelToken | None = None,
    ) -> dict[str, Glad]:
        """Fit one denoiser for several products, which it is told apart by their name; each product gets a detector that uses it.

        Everything but the denoiser is the product's own, the thresholds included. Each detector is saved and loaded by itself.

        Args:
            images: Category -> paths of its good images; at least 24 for each.
            base: ``lite``, or ``sd14``, folder or Hub id of a Stable Diffusion in diffusers form, whose prompt then names the category.
            settings: As for `from_base`; for ``lite`` the default of the steps grows with the square root of the number of products.
            run: As for `fit`.
            progress: As for `fit`.
            cancel: As for `fit`.

        Raises:
            ConfigError: The model cannot be shared.
            DataError: There are too few images, or one cannot be read (it is named).
            Interrupted: As for `fit`.
        """
        first = cls.from_base(base, settings=settings)
        found = first._fitter.fit_together(images, run, cancellable(progress, cancel))
        detectors = {category: cls(base, first.settings) for category in found}
        for category, detector in detectors.items():
            detector._set(found[category])
        return detectors

    def extend(self, images: Images, *, progress: Progress = no_progress, cancel: CancelToken | None = None) -> Glad:
        """Learn further good images from where the training ended, replaying what it kept of the old ones; only ``lite`` can.

        No image that its thresholds are made from is ever trained on. If anything goes wrong, the detector is as it was.

        Args:
            images: Good images, old and new, told apart by their content. Of the old ones those held out must be there and, where the
                model keeps no latents yet (``training.keep_latents``), all that it was trained on.
            progress: As for `fit`.
            cancel: As for `fit`.

        Raises:
            ConfigError: The model cannot learn on.
            DataError: No image is new, or old ones are missing.
        """
        from gladad.detector.extend import extend

        self._set(extend(self._fitter, self._require_fit(), images, cancellable(progress, cancel)))
        return self

    def adjust(
        self,
        images: Images,
        settings: FitSettings | Mapping[str, Any],
        *,
        progress: Progress = no_progress,
        cancel: CancelToken | None = None,
    ) -> Glad:
        """Have this detector inspect otherwise, as a fit with these settings would; it is as it was if anything goes wrong.

        Args:
            images: Those it was fitted on.
            settings: They differ from the detector's in the reconstruction, the false-reject rate and, in the paper's form, how images are
                compared; or values by their names.
            progress: As for `fit`.
            cancel: As for `fit`.

        Raises:
            ConfigError: Another setting differs; or more than the false-reject rate does, and the model is a baseline or one of tiles, or
                the calibration is cross-fitted.
            DataError: The images are not those of the fit.
        """
        if not isinstance(settings, FitSettings):
            settings = make_settings(self.name, settings)
        self._set(self._fitter.adjust(self._require_fit(), images, settings, cancellable(progress, cancel)))
        self.settings = settings
        return self

    def calibrate(self, images: Images, *, scope: Scope | None = None, progress: Progress = no_progress) -> Glad:
        """Make the thresholds anew, from good images that the training has not seen; the networks stay.

        Args:
            images: Good images. Those that the model was trained on are known by their content and left out; ``provenance_`` says how many
                as ``left_out``. At least 4 must remain.
            scope: What of the maps counts from now on; None leaves it as it is, ``Scope()`` is everything.
            progress: Told of every image.

        Raises:
            ConfigError: The parts are aligned, so that no place can be ignored.
            DataError: Too few images remain.
        """
        self._set(self._fitter.recalibrate(self._require_fit(), images, progress, scope))
        return self

    def tune_features(
        self, images: Images, config: FeatureTuningConfig | None = None, *, run: TrainingRun | None = None, progress: Progress = no_progress
    ) -> Glad:
        """Fine-tune the extractor that scores, on the images that the denoiser was trained on, and calibrate anew on those held out.

        Args:
            images: Those of the fit.
            config: The budget.
            run: As for `fit`.
            progress: As for `fit`.

        Raises:
            ConfigError: The model is not a Stable Diffusion, or the calibration is cross-fitted.
            DataError: The images are not those of the fit.
            Interrupted: As for `fit`.
        """
        self._set(self._fitter.tune_features(self._require_fit(), images, config, run, progress))
        return self

    def merge(self) -> Glad:
        """Add the adapter of a Stable Diffusion to its weights, so that the model needs its base no more; scores agree up to rounding.

        Raises:
            ConfigError: The detector has no adapter.
            ModelFormatError: The base is not there any more.
        """
        self._set(self._require_fit().merged())
        return self

    def set_false_reject_rate(self, rate: float) -> None:
        """Choose another false-reject rate; the thresholds follow from the stored held-out scores."""
        settings = replace(self.settings, false_reject_rate=rate)
        self._set(replace(self._fitter, settings=settings).at_rate(self._require_fit()))
        self.settings = settings

    @property
    def _fitter(self) -> Fitter:
        from gladad.detector.fit import Fitter  # late: inspection does without

        return Fitter(self.name, self.settings)

    def _set(self, fitted: Fitted, model_id: str = "") -> None:
        before = self._fitted
        if not model_id:
            same = before is not None and before.model is fitted.model and before.scope is fitted.scope and self.model_id
            model_id = self.model_id if same else fitted.digest()[:16]
        self._fitted, self._ids = fitted, (model_id, fitted.calibration.identity)

    # -- inspection ---------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time, each on a thread of its own."""
        return self.model_.workers

    def inspect(self, image: Any, *, reconstruct: bool = True) -> Prediction:
        """Inspect one image.

        Args:
            image: A path, the bytes of an image file, a PIL image, array or tensor; see `gladad.core.images.as_pixels`.
            reconstruct: Make the picture of the reconstruction too.

        Returns:
            Score, p-value, decision, step, map, mask and regions. They depend on this image alone.

        Raises:
            DataError: The image cannot be used.
            NotFiniteError: The score or the map is not finite.
            NotFittedError: There is no model yet.
        """
        fitted = self._require_fit()
        pixels = as_pixels(image)
        started = time.perf_counter()
        size, limit = (pixels.shape[0], pixels.shape[1]), fitted.calibration.pixel_threshold
        view = View(pixels, fitted.alignment)
        inspection = fitted.inspect(view.pixels)
        anomaly_map = view.whole_map(inspection.map) / np.float32(limit)
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
            reconstruction=view.whole_picture(fitted.model.picture(inspection, view.pixels, limit)) if reconstruct else None,
            image_path=Path(image) if isinstance(image, str | Path) else None,
            seconds=seconds,
            model_id=self.model_id,
            model_version=str(fitted.provenance["versions"]["gladad"]),
            calibration_id=self.calibration_id,
        )

    def predict(
        self, images: Any, *, reconstruct: bool = True, progress: Progress = no_progress, cancel: CancelToken | None = None
    ) -> list[Prediction]:
        """Inspect several images, in order, as many at a time as the model can use cores for.

        Args:
            images: A path or folder, one image, a batch (array ``[B, H, W, 3]`` or tensor ``[B, 3, H, W]``), or a sequence of any of these.
            reconstruct: Make the pictures of the reconstructions too.
            progress: Told of every image.
            cancel: Stops between two images when it is cancelled, from any thread.

        Raises:
            Interrupted: It was cancelled.
        """
        items = list(each(images))
        predictions: list[Prediction] = []
        for prediction in in_order(lambda item: self.inspect(item, reconstruct=reconstruct), items, self.workers, cancel):
            predictions.append(prediction)
            progress("inspecting", len(predictions), len(items))
        return predictions

    # -- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into one folder, whole or not at all; a gladad model that is there is replaced.

        Raises:
            WriteError: The folder holds something else, or the disk refuses.
        """
        save_model(self._saved, Path(folder))

    def export(
        self,
        images: Images,
        folder: str | Path,
        *,
        form: Format = "onnx",
        precision: ExportPrecision = "float32",
        progress: Progress = no_progress,
    ) -> Comparison:
        """Write a ``lite`` model as static graphs with thresholds of their own, which `from_pretrained` reads without torch.

        Args:
            images: Those of the fit, or of the last calibration; the thresholds are made anew from those held out.
            folder: A model's; an earlier one is replaced.
            form: "onnx" or "openvino".
            precision: Of the arithmetic.
            progress: Told of every image.

        Raises:
            ConfigError: The model has no graphs, or format and precision do not go together.
            DataError: Held-out images are missing.
            ExportError: A held-out image, or one with a synthetic defect, would be decided otherwise.
        """
        from gladad.detector.export import export

        return export(self._saved, images, Path(folder), form, precision, progress)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, speed: str | None = None) -> Glad:
        """Load a model: everything needed to inspect, nothing needed to train.

        Args:
            folder: Of the model.
            speed: In the paper's form: inspect at another; the thresholds stay, with a warning, until `calibrate` makes others.

        Raises:
            ConfigError, ModelFormatError: The model has no such speed, or is not complete.
        """
        saved = load_model(Path(folder), speed)
        detector = cls(saved.name, saved.settings)
        detector._set(saved.fitted, saved.model_id)
        return detector

    def describe(self) -> dict[str, Any]:
        """JSON-ready description: the model and its origin, settings asked for and as resolved, calibration and provenance."""
        return describe(self._saved)

    @property
    def _saved(self) -> Saved:
        return Saved(self.name, self.settings, self._require_fit(), self.model_id)

    def _require_fit(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError("this detector has not been fitted; call fit() or load one with Glad.from_pretrained()")
        return self._fitted
