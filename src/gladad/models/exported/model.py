"""A ``lite`` model as graphs, a memory and Gaussians.

At each scale ``encoder`` makes latents of pixels; the memory finds the nearest normal latent of every cell; ``denoiser`` rebuilds them; the
Gaussians say how large the residuals are. ``scorer`` makes map and score of that; ``decoder`` draws what is rebuilt for people.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, ModelFormatError
from gladad.core.images import resize_pixels
from gladad.core.records import Inspection
from gladad.core.settings import from_json, to_json, validated
from gladad.core.storage import content_digest, load_arrays
from gladad.core.threads import side_by_side
from gladad.features.gaussians import Gaussians
from gladad.features.index import VectorIndex
from gladad.models.exported.engines import SUFFIXES, ExportPrecision, Format, cores, open_graph
from gladad.models.pictures import where_anomalous

Pixels = NDArray[np.uint8]
MEMORY_FILE = "memory.safetensors"
BY_SCALE, OF_ALL = ("encoder", "denoiser"), ("scorer", "decoder")
"""Graphs of each scale, their numbers behind the names, and those of the model."""


@validated
class ExportedConfig:
    """What an exported model is."""

    form: Format
    precision: ExportPrecision
    image_size: tuple[int, int]  # (H, W) in pixels that every image is resized to
    scales: int
    origin: dict[str, Any]  # name and model_id of the model it was exported from
    settings: dict[str, Any]  # of that model


class Exported:
    """An exported model, from its folder."""

    kind = "exported"

    def __init__(self, folder: Path, config: ExportedConfig):
        self.folder, self.config = folder, config
        graphs = {name: open_graph(folder, name, config.form, config.precision) for name in self._graphs()}
        self._encoders, self._denoisers = ([graphs[f"{name}_{scale}"] for scale in range(config.scales)] for name in BY_SCALE)
        self._scorer, self._decoder = (graphs[name] for name in OF_ALL)
        arrays = load_arrays(folder / MEMORY_FILE)
        self._rows: list[NDArray[np.float32]] = []  # of the memory of each scale; none where there is no memory
        self._indices = []
        self._gaussians = []
        for scale in range(config.scales):
            if f"rows.{scale}" in arrays:
                rows, centres = (arrays[f"{name}.{scale}"].astype(np.float32) for name in ("rows", "centres"))
                self._rows.append(rows)
                self._indices.append(VectorIndex(rows, centres))
            if f"gaussians.{scale}.centres" in arrays:
                self._gaussians.append(Gaussians(*(arrays[f"gaussians.{scale}.{name}"] for name in ("centres", "means", "whiteners"))))

    @property
    def image_size(self) -> tuple[int, int]:
        """``(H, W)`` that it works at."""
        return self.config.image_size

    @property
    def workers(self) -> int:
        """Images that are best inspected at the same time: one per core."""
        return cores()

    def inspect(self, pixels: Pixels) -> Inspection:
        """Map and score of one image ``[H, W, 3]`` uint8 of any size, in the model's own units."""
        batch = resize_pixels(pixels, self.image_size)[None]
        rebuilt, steps, magnitudes = zip(
            *side_by_side(lambda scale: self._rebuilt(scale, batch), range(self.config.scales), self.workers), strict=True
        )
        maps, score = self._scorer(magnitudes)
        return Inspection(map=maps[0], score=float(score[0]), step=int(steps[0][0]), latent=rebuilt[0])

    def _rebuilt(self, scale: int, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]], NDArray[np.float32]]:
        """What a scale makes of ``[1, H, W, 3]``: the latent rebuilt, the step ``[1]`` and the magnitude of the residual."""
        latent = self._encoders[scale]([pixels])[0]
        rebuilt, step = self._denoisers[scale]([latent, self._nearest(scale, latent)] if self._rows else [latent])
        return rebuilt, step, self._magnitude(scale, latent, rebuilt)

    def _magnitude(self, scale: int, latent: NDArray[np.float32], rebuilt: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of the residual in every cell, ``[1, D, h, w] -> [1, 1, h, w]``."""
        residual = latent - rebuilt
        if self._gaussians:
            size = self._gaussians[scale].distances(_cells(rebuilt), _cells(residual))
        else:
            size = np.sqrt(np.square(residual).mean(1))
        return size.reshape(1, 1, *latent.shape[2:])

    def _nearest(self, scale: int, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the memory of a scale holds nearest to every cell of ``[1, D, h, w]``."""
        found = self._rows[scale][self._indices[scale].nearest(_cells(latent))[1]]
        return np.ascontiguousarray(found.T).reshape(latent.shape)

    def picture(self, inspection: Inspection, pixels: Pixels, threshold: float) -> Pixels:
        """The part as the model thinks it should be, see `gladad.models.pictures.where_anomalous`."""
        rebuilt: Pixels = self._decoder([inspection.latent])[0][0]
        return where_anomalous(rebuilt, pixels, inspection.map / threshold)

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Copy its files; returns the JSON-ready config."""
        for path in self._files():
            shutil.copyfile(path, folder / path.name)
        return to_json(self.config)

    def describe(self) -> dict[str, Any]:
        """JSON-ready: the config."""
        return {"config": to_json(self.config)}

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the config and all files."""
        return content_digest({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self._files()} | to_json(self.config))

    def _files(self) -> list[Path]:
        graphs = [self.folder / f"{name}{suffix}" for name in self._graphs() for suffix in SUFFIXES[self.config.form]]
        return [*graphs, self.folder / MEMORY_FILE]

    def _graphs(self) -> list[str]:
        """Names of all graphs."""
        return [f"{name}_{scale}" for name in BY_SCALE for scale in range(self.config.scales)] + list(OF_ALL)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Exported:
        """Read what `save` wrote.

        Raises:
            ModelFormatError: Config or files do not fit together.
        """
        try:
            parsed = from_json(ExportedConfig, config)
        except ConfigError as error:
            raise ModelFormatError(f"{folder}: its description is not one of an exported model ({error})") from error
        try:
            return cls(folder, parsed)
        except (KeyError, AssertionError) as error:
            raise ModelFormatError(f"{folder}: its files and its description do not fit together ({error})") from error


def _cells(latent: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[1, D, h, w] -> [h w, D]``."""
    return np.ascontiguousarray(latent[0].reshape(latent.shape[1], -1).T)
