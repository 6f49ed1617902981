"""The process that owns the models. It is asked through a pipe, dies with its parent, and may die alone without loss."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gladad.core.errors import DataError, GladError

if TYPE_CHECKING:
    from gladad.core.records import Prediction
    from gladad.detector.glad import Glad

MAP_SIDE = 512  # pixels of the longer side of a stored map
READY = "ready"


@dataclass(frozen=True)
class Load:
    """Have a model ready. The answer is None."""

    folder: str


@dataclass(frozen=True)
class Inspect:
    """Inspect an image with the model of a folder. The answer is an `Outcome`."""

    folder: str
    content: bytes  # of an image file


@dataclass(frozen=True)
class Draw:
    """Inspect an image again for the picture of its reconstruction. The answer is a PNG, or None where the model makes none."""

    folder: str
    content: bytes


@dataclass(frozen=True)
class Nearest:
    """Find the good part that looks most like an image. The answer is a PNG, or None where no good parts are kept."""

    folder: str
    content: bytes
    box: tuple[int, int, int, int] | None  # around which they are compared; None: everywhere


Asked = Load | Inspect | Draw | Nearest


@dataclass(frozen=True)
class Outcome:
    """What an inspection found."""

    score: float
    p_value: float
    step: int
    size: tuple[int, int]  # (H, W)
    regions: list[dict[str, Any]]
    map_png: bytes  # 8 bits grey, 255 is twice the threshold or more; the longer side has at most 512 pixels
    brightness: float
    sharpness: float
    milliseconds: float  # of the inspection


class Models:
    """The models in memory: those that were used last."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, tuple[Glad, threading.Semaphore]] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}

    def get(self, folder: str) -> tuple[Glad, threading.Semaphore]:
        """A model, and what limits how many images it takes at a time. Loading one does not hold up the others."""
        with self._lock:
            own = self._loading.setdefault(folder, threading.Lock())
        with own:
            with self._lock:
                if folder in self._loaded:
                    self._loaded.move_to_end(folder)
                    return self._loaded[folder]
            from gladad.detector.glad import Glad

            detector = Glad.from_pretrained(folder)
            entry = (detector, threading.Semaphore(detector.workers))
            with self._lock:
                self._loaded[folder] = entry
                while len(self._loaded) > self.capacity:
                    self._loaded.popitem(last=False)
            return entry


def answer(models: Models, request: Asked) -> Any:
    """What a request asks for."""
    if isinstance(request, Nearest):
        return _nearest(request)
    detector, slots = models.get(request.folder)
    if isinstance(request, Load):
        _warm_up(detector)
        return None
    with slots:
        if isinstance(request, Draw):
            from gladad.report.pictures import to_png

            picture = detector.inspect(request.content).reconstruction
            return None if picture is None else to_png(picture)
        return _outcome(detector, request)


def _nearest(request: Nearest) -> bytes | None:
    from gladad.core.images import as_pixels
    from gladad.report.pictures import to_png
    from gladad.service.good_parts import nearest

    found = nearest(Path(request.folder), as_pixels(request.content), request.box)
    return None if found is None else to_png(found)


def in_process(capacity: int) -> Callable[[str, bytes], Outcome]:
    """What inspects the bytes of an image with the model of a folder, in this process: for commands."""
    models = Models(capacity)

    return lambda folder, content: answer(models, Inspect(folder, content))


def _warm_up(detector: Glad) -> None:
    """Import, and have made, what the first image would wait for."""
    import scipy.ndimage  # noqa: F401
    import skimage.measure  # noqa: F401

    height, width = detector.model_.image_size
    detector.inspect(np.full((height, width, 3), 128, np.uint8))


def _outcome(detector: Glad, request: Inspect) -> Outcome:
    from gladad.core.images import as_pixels
    from gladad.decision.drift import appearance

    pixels = as_pixels(request.content)
    found = detector.inspect(pixels, reconstruct=False)
    brightness, sharpness = appearance(pixels)
    return Outcome(
        score=found.pred_score,
        p_value=found.p_value,
        step=found.step,
        size=found.image_size,
        regions=_regions(found),
        map_png=_map_png(found),
        brightness=brightness,
        sharpness=sharpness,
        milliseconds=1000 * found.seconds,
    )


def _regions(found: Prediction) -> list[dict[str, Any]]:
    from gladad.decision.regions import outlines

    contours = outlines(found.pred_mask, found.regions)
    return [
        {"box": list(region.box), "area": region.area, "peak": region.peak, "contour": contour}
        for region, contour in zip(found.regions, contours, strict=True)
    ]


def _map_png(found: Prediction) -> bytes:
    from gladad.core.images import resize_map
    from gladad.report.pictures import VMAX, to_png

    height, width = found.image_size
    factor = min(1.0, MAP_SIDE / max(height, width))
    small = (
        resize_map(found.anomaly_map, (max(1, round(factor * height)), max(1, round(factor * width)))) if factor < 1 else found.anomaly_map
    )
    return to_png(np.rint((small / VMAX).clip(0, 1) * 255).astype(np.uint8))


def run(connection: Connection, threads: int, capacity: int) -> None:
    """The process's main function: answer requests, each ``(number, request)`` by ``(number, answer, error)``, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when this process ends
    warnings.simplefilter("ignore")
    models, sending = Models(capacity), threading.Lock()

    def handle(number: int, request: Asked) -> None:
        try:
            reply: tuple[int, Any, Exception | None] = (number, answer(models, request), None)
        except GladError as error:
            reply = (number, None, _portable(error))
        except Exception as error:
            reply = (number, None, RuntimeError(f"{type(error).__name__}: {error}"))
        try:
            with sending:
                connection.send(reply)
        except OSError:  # the parent is gone
            os._exit(0)

    # loading has threads of its own, so that a model that is read from the disk holds nothing up
    inspecting, loading = ThreadPoolExecutor(threads), ThreadPoolExecutor(2)
    import gladad.detector.glad  # noqa: F401

    connection.send(READY)
    while True:
        try:
            number, request = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # at once: nobody waits for what is under way
        (loading if isinstance(request, Load) else inspecting).submit(handle, number, request)


def _portable(error: GladError) -> GladError:
    """An error that survives a pipe: some have arguments of their own."""
    return error if type(error).__init__ is Exception.__init__ else GladError(str(error))


def check_folder(folder: Path) -> None:
    """Refuse a model folder that could harm: whatever is no file of a gladad model, a pickle, or a link that leads out.

    Raises:
        DataError: It names the file.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{path}: is a link that leads out of the model folder; copy the file into it")
        if path.is_dir():
            continue
        if path.suffix not in SUFFIXES or not path.is_file():
            raise DataError(f"{path}: is no file of a gladad model; give the folder as 'gladad fit' or 'gladad export' wrote it")
        with path.open("rb") as file:
            start = file.read(9)
        if path.suffix == ".safetensors" and start[8:] == b"{":
            continue  # its header's length comes first, any bytes at all
        if start[:4] == b"PK\x03\x04" or b"\x80\x02" <= start[:2] <= b"\x80\x05":
            raise DataError(f"{path}: looks like a pickle, which can run any program when it is read; models are safetensors")


SUFFIXES = frozenset({".json", ".safetensors", ".onnx", ".data", ".xml", ".bin", ".txt", ".png"})
