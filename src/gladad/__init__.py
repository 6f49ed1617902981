"""Unsupervised visual anomaly detection with diffusion models.

The public names are loaded on first use, so that ``import gladad`` and ``gladad --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gladad.algorithm import ReconstructionConfig as ReconstructionConfig
    from gladad.algorithm import ScoringConfig as ScoringConfig
    from gladad.algorithm import anomaly_map as anomaly_map
    from gladad.algorithm import reconstruct as reconstruct
    from gladad.core.errors import GladError as GladError
    from gladad.core.records import Prediction as Prediction
    from gladad.core.records import Region as Region
    from gladad.core.records import Report as Report
    from gladad.core.records import Sample as Sample
    from gladad.core.threads import CancelToken as CancelToken
    from gladad.detector.glad import Glad as Glad
    from gladad.models.registry import make_settings as make_settings
    from gladad.models.settings import FitSettings as FitSettings
    from gladad.models.stable_diffusion.pipeline import GladPipeline as GladPipeline
    from gladad.models.stable_diffusion.training import FinetuneConfig as FinetuneConfig
    from gladad.training.loop import TrainingRun as TrainingRun

__version__ = "0.1.0"

_HOMES = {
    "CancelToken": "core.threads",
    "FinetuneConfig": "models.stable_diffusion.training",
    "FitSettings": "models.settings",
    "Glad": "detector.glad",
    "GladError": "core.errors",
    "GladPipeline": "models.stable_diffusion.pipeline",
    "Prediction": "core.records",
    "ReconstructionConfig": "algorithm",
    "Region": "core.records",
    "Report": "core.records",
    "Sample": "core.records",
    "ScoringConfig": "algorithm",
    "TrainingRun": "training.loop",
    "anomaly_map": "algorithm",
    "make_settings": "models.registry",
    "reconstruct": "algorithm",
}

__all__ = [  # noqa: RUF022, RUF100 (by meaning: the detector first)
    "Glad",
    "make_settings",
    "FitSettings",
    "FinetuneConfig",
    "TrainingRun",
    "CancelToken",
    "Prediction",
    "Region",
    "Report",
    "Sample",
    "GladPipeline",
    "ReconstructionConfig",
    "ScoringConfig",
    "reconstruct",
    "anomaly_map",
    "GladError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"gladad.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
