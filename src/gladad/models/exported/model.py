"""A ``lite`` model as three graphs and a memory.

``encoder`` makes latents of pixels; the memory finds the nearest normal latent of every cell; ``detector`` makes map, score and rebuilt
latent of both; ``decoder`` draws it for people.
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
from gladad.features.index import VectorIndex
from gladad.models.exported.engines import SUFFIXES, ExportPrecision, Format, cores, open_graph
from gladad.models.pictures import where_anomalous

Pixels = NDArray[np.uint8]
MEMORY_FILE = "memory.safetensors"
GRAPHS = ("encoder", "detector", "decoder")


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
        self._encoder, self._detector, self._decoder = (open_graph(folder, name, config.form, config.precision) for name in GRAPHS)
        arrays = load_arrays(folder / MEMORY_FILE)
        self._rows: list[NDArray[np.float32]] = []  # of the memory of each scale; none where there is no memory
        self._indices = []
        if arrays:
            for scale in range(config.scales):
                rows, centres = (arrays[f"{name}.{scale}"].astype(np.float32) for name in ("rows", "centres"))
                self._rows.append(rows)
                self._indices.append(VectorIndex(rows, centres))

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
        latents = self._encoder([resize_pixels(pixels, self.image_size)[None]])
        maps, score, step, rebuilt = self._detector([*latents, *map(self._nearest, range(len(self._rows)), latents)])
        return Inspection(map=maps[0], score=float(score[0]), step=int(step[0]), latent=rebuilt)

    def _nearest(self, scale: int, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the memory of a scale holds nearest to every cell of ``[1, D, h, w]``."""
        cells = np.ascontiguousarray(latent[0].reshape(latent.shape[1], -1).T)
        found = self._rows[scale][self._indices[scale].nearest(cells)[1]]
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
        return [self.folder / f"{name}{suffix}" for name in GRAPHS for suffix in SUFFIXES[self.config.form]] + [self.folder / MEMORY_FILE]

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
