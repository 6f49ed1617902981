"""What may be chosen about any fit; each family of models adds its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gladad.core.settings import validated
from gladad.data.tolerance import Tolerance


@validated
class FitSettings:
    """Settings of every model."""

    seed: Annotated[int, Field(ge=0)] = 0  # of everything random
    false_reject_rate: Annotated[float, Field(gt=0, le=0.5)] = 0.01  # share of good parts that may be rejected
    # side of a square with as many pixels as the model works on; None = by the images
    image_size: Annotated[int, Field(ge=64, le=2048)] | None = None
    tiles: Annotated[int, Field(ge=1, le=8)] = 1  # cut large images into so many tiles per side, each of that size
    align: bool = False  # turn and crop every image so that its part, which stands before an even ground, lies as all others do
    max_images: Annotated[int, Field(ge=2)] = 1000  # good images used; a random choice of them if there are more
    shots: Annotated[int, Field(ge=1)] | None = None  # learn from so few (1, 2, 4, 8), which a random choice leaves; None = from all
    calibration: Literal["auto", "held-out", "cross-fit"] = "auto"  # auto = cross-fit below 24 images
    tolerate: tuple[Tolerance, ...] = ()  # harmless changes that the thresholds allow for, and that lite learns as normal


@validated
class DenoisingSettings(FitSettings):
    """Settings of every model with a denoiser, which learns to repair synthetic anomalies."""

    textures: str | None = None  # folder of images that synthetic anomalies take content from; None = generated textures
    foreground: Literal["all", "bright", "dark", "auto"] = "all"  # part of the image where synthetic anomalies may appear
