"""What computes graphs: ONNX Runtime or OpenVINO, on the CPU.

Each call runs on one thread, so that no sum's order depends on the number of cores; several calls may run at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gladad.core.errors import ConfigError, MissingExtraError, ModelFormatError

Format = Literal["onnx", "openvino"]
ExportPrecision = Literal["float32", "bfloat16"]
Graph = Callable[[Sequence[NDArray[Any]]], list[NDArray[Any]]]
"""Inputs to outputs, both in the graph's order."""
SUFFIXES: dict[Format, tuple[str, ...]] = {"onnx": (".onnx",), "openvino": (".xml", ".bin")}
"""Of a graph's files."""


def cores() -> int:
    """That this process may use."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(own, int(limit))) if limit.isdigit() and limit != "0" else own


def open_graph(folder: Path, name: str, form: Format, precision: ExportPrecision) -> Graph:
    """A graph of a folder, ready to be called from any thread.

    Raises:
        MissingExtraError: The package that computes it is not installed.
        ModelFormatError: A file is missing or damaged.
        ConfigError: The processor does not compute in that precision.
    """
    for suffix in SUFFIXES[form]:
        if not (folder / f"{name}{suffix}").is_file():
            reason = "the folder is incomplete, or an earlier version wrote it; export the model again"
            raise ModelFormatError(f"{folder / name}{suffix}: missing; {reason}")
    return _onnx(folder / f"{name}.onnx") if form == "onnx" else _openvino(folder / f"{name}.xml", precision)


def _onnx(path: Path) -> Graph:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("a model exported to ONNX", "onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelFormatError(f"{path}: damaged or not an ONNX file ({_first_line(error)})") from error
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = session.run(None, dict(zip(names, inputs, strict=True)))
        return found

    return run


def _openvino(path: Path, precision: ExportPrecision) -> Graph:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("a model exported to OpenVINO", "openvino") from error
    core = openvino.Core()
    if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ConfigError("this processor does not compute in bfloat16; export with precision float32")
    hints = {
        "NUM_STREAMS": cores(),
        "INFERENCE_NUM_THREADS": cores(),  # one for each stream
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
    }
    try:
        compiled = core.compile_model(path, "CPU", hints)
    except Exception as error:
        raise ModelFormatError(f"{path}: damaged or not an OpenVINO model ({_first_line(error)})") from error
    own = threading.local()

    def run(inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer(list(inputs))
        return [np.array(found[output]) for output in compiled.outputs]  # copies: the next call writes over them

    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
