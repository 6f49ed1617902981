"""What a fit makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.records import Progress
from gladad.core.storage import content_digest
from gladad.decision.conformal import Calibration
from gladad.detector.view import read_pixels
from gladad.models.family import Model

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
    """

    model: Model
    calibration: Calibration
    peaks: list[float]
    provenance: dict[str, Any]
    seen: SeenImages | None = field(default_factory=SeenImages)
    alignment: Alignment | None = None

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of everything that makes a score."""
        own = self.model.digest()
        return own if self.alignment is None else content_digest(own, self.alignment.arrays())

    def pixels(self, paths: Sequence[Path], progress: Progress) -> list[Pixels]:
        """Images as the model sees them."""
        return read_pixels(paths, self.model.image_size, progress, self.alignment)
