"""ONNX graphs as those of other formats and precisions."""

from __future__ import annotations

from pathlib import Path

from gladad.core.errors import MissingExtraError


def to_openvino(folder: Path) -> None:
    """Put OpenVINO's files in the place of the ONNX graphs of a folder."""
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("export to OpenVINO", "openvino") from error
    for path in sorted(folder.glob("*.onnx")):
        openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
        path.unlink()
