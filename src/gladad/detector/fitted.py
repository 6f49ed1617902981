"""What a fit makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError
from gladad.core.records import Inspection, Progress
from gladad.core.storage import content_digest
from gladad.decision.conformal import Calibration
from gladad.decision.scope import Scope
from gladad.detector.view import read_pixels
from gladad.models.family import Model, inspect_where, lowered
from gladad.models.tiled import Tiled

if TYPE_CHECKING:
    from gladad.data.alignment import Alignment

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SeenImages:
    """SHA-256 (hexadecimal) of the files of a fit.

    Attributes:
        trained: Those that a denoiser, a memory or any statistic but the thresholds was made from.
        held_out: Those that the thresholds were made from, and nothing else.
    """

    trained: frozenset[str] = frozenset()
    held_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fitted:
    """What a fit makes.

    Attributes:
        model: The trained model.
        calibration: Thresholds and held-out scores.
        peaks: Largest raw map value of each held-out image, rising.
        provenance: Versions, seed and data fingerprint.
        seen: The images of the fit; None where a model was saved without.
        alignment: How parts are located before the model sees them, if they are.
        scope: What of a map counts; None: everything, and the score is the model's own.
    """

    model: Model
    calibration: Calibration
    peaks: list[float]
    provenance: dict[str, Any]
    seen: SeenImages | None = field(default_factory=SeenImages)
    alignment: Alignment | None = None
    scope: Scope | None = None

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of an image as the model sees it, ``[H, W, 3]`` uint8, in the model's own units."""
        if self.scope is None:
            return self.model.inspect(pixels)
        counted = self.scope.counted
        found = self.model.inspect(pixels) if counted is None else inspect_where(self.model, pixels, counted)
        return lowered(found, self.scope.opened(found.map))

    def merged(self) -> Fitted:
        """With the adapter of a Stable Diffusion in its weights, see `gladad.detector.glad.Glad.merge`."""
        if isinstance(self.model, Tiled):
            raise ConfigError("a model of tiles cannot be merged")
        standalone = getattr(self.model, "standalone", None)
        if standalone is None:
            raise ConfigError(f"a {self.model.kind} model has no adapter to merge")
        return replace(self, model=standalone())

    @property
    def of_tile(self) -> Model:
        """What inspects an image, or each tile of it."""
        return self.model.model if isinstance(self.model, Tiled) else self.model

    def at_speed(self, speed: str) -> Fitted:
        """Inspecting at another speed, with the thresholds that are there; see `gladad.detector.glad.Glad.from_pretrained`."""
        model = self.of_tile
        at_speed = getattr(model, "at_speed", None)
        if at_speed is None:
            raise ConfigError(f"speed: a {model.kind} model has only one")
        other = at_speed(speed)
        return replace(self, model=replace(self.model, model=other) if isinstance(self.model, Tiled) else other)

    @property
    def caveat(self) -> str | None:
        """What is to be told of the thresholds, if anything: they were made at another speed than the model inspects at."""
        now, then = getattr(self.of_tile, "speed", None), self.provenance.get("speed", "exact")
        if now in (None, then):
            return None
        return f"inspects at speed {now} by thresholds of speed {then}, which promise nothing; gladad calibrate --speed {now} makes others"

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of everything that makes a score."""
        own = self.model.digest()
        own = own if self.alignment is None else content_digest(own, self.alignment.arrays())
        return own if self.scope is None else content_digest([own, self.scope.digest()])

    def pixels(self, paths: Sequence[Path], progress: Progress) -> list[Pixels]:
        """Images as the model sees them."""
        return read_pixels(paths, self.model.image_size, progress, self.alignment)
