"""What of a map counts: not the places that are to be ignored, nor areas that are too small. The thresholds are made from what counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gladad.core.errors import ConfigError, DataError, ModelFormatError
from gladad.core.images import load_mask
from gladad.core.storage import content_digest


@dataclass(frozen=True, eq=False)
class Scope:
    """What of a map counts.

    ``lite`` scores nothing where it is ignored; with other models the score falls as the peak of the map does when that part is cut out.
    The map is opened by area (Vincent, "Grayscale area openings and closings", 1993): its new peak is the highest level at which an area
    is still large enough, and the score falls as the peak does. Held-out good images are scored in the same way, so that the promise
    about false rejects holds for what counts.

    Attributes:
        ignored: ``[H, W]`` bool over the image, of any size: True where nothing counts; None is nowhere.
        min_area: Share of the image, in [0, 1): 8-connected areas that are smaller do not count.
    """

    ignored: NDArray[np.bool_] | None = None
    min_area: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < 1:
            raise ConfigError(f"min_area is a share of the image, from 0 to less than 1, not {self.min_area}")
        if self.ignored is not None and self.ignored.all():
            raise DataError("the mask ignores the whole image: black counts, white is ignored")

    @classmethod
    def read(cls, mask: str | Path | None, min_area: float = 0.0) -> Scope:
        """With the mask of an image file, in which white is ignored.

        Raises:
            ConfigError: ``min_area`` is out of range.
            DataError: The mask cannot be read, or ignores everything.
        """
        return cls(None if mask is None else load_mask(mask), min_area)

    def __bool__(self) -> bool:
        return self.min_area > 0 or (self.ignored is not None and bool(self.ignored.any()))

    @property
    def counted(self) -> NDArray[np.bool_] | None:
        """``[H, W]`` over the image; None is everywhere."""
        return None if self.ignored is None else ~self.ignored

    def opened(self, level: NDArray[np.float32]) -> NDArray[np.float32]:
        """A map ``[h, w]`` without areas that are too small."""
        area = math.ceil(self.min_area * level.size)
        if area <= 1:
            return level
        from skimage.morphology import area_opening  # late: most models do without

        found: NDArray[np.float32] = area_opening(level, area, connectivity=2)
        return found

    # -- files --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, without the mask."""
        return {"min_area": self.min_area, "mask": self.ignored is not None}

    def save_mask(self, path: Path) -> None:
        """Write the mask, white where it ignores, if there is one."""
        if self.ignored is not None:
            Image.fromarray(self.ignored).save(path, "PNG")

    @classmethod
    def from_json(cls, value: dict[str, Any], path: Path) -> Scope:
        """Read what `to_json` and `save_mask` gave.

        Raises:
            ModelFormatError: The mask is missing or damaged, or a key is wrong.
        """
        try:
            return cls.read(path if value["mask"] else None, float(value["min_area"]))
        except (KeyError, TypeError, ValueError, DataError, ConfigError) as error:
            raise ModelFormatError(f"{path}: what of a map counts cannot be read ({error})") from error

    def digest(self) -> str:
        """SHA-256 (hexadecimal)."""
        return content_digest(self.to_json(), {} if self.ignored is None else {"ignored": self.ignored})
