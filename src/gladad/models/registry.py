"""Which module a model is of, by name. A module is imported when one of its models is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from gladad.models.family import Family
from gladad.models.settings import FitSettings

_ROOM = "gladad.models"
_STABLE_DIFFUSION = f"{_ROOM}.stable_diffusion.family"
_MODULES = {
    "lite": f"{_ROOM}.feature_diffusion.family",
    "small": _STABLE_DIFFUSION,
    "memory-bank": f"{_ROOM}.baselines.family",
    "padim": f"{_ROOM}.baselines.family",
    "pca": f"{_ROOM}.baselines.family",
    "anomalib-patchcore": f"{_ROOM}.baselines.family",
    "anomalib-padim": f"{_ROOM}.baselines.family",
}
_KINDS = _MODULES | {"diffusers": _STABLE_DIFFUSION, "exported": f"{_ROOM}.exported.family"}
BUILT_IN = tuple(_MODULES)
"""Models by name. Any other name is ``sd14``, the folder or the Hub id of a Stable Diffusion in diffusers form."""


def family_of(name: str) -> Family:
    """The family that a name stands for.

    Args:
        name: One of `BUILT_IN`, or ``sd14``, folder or Hub id of a Stable Diffusion in diffusers form.
    """
    return cast(Family, import_module(_KINDS.get(name, _STABLE_DIFFUSION)))


def family_of_kind(kind: str) -> Family:
    """The family of a saved model.

    Raises:
        KeyError: There is no such kind.
    """
    return cast(Family, import_module(_KINDS[kind]))


def make_settings(name: str, values: Mapping[str, Any] | None = None) -> FitSettings:
    """Settings for a model of a name, by dotted or nested names: ``make_settings("lite", {"training.steps": 900})``.

    Raises:
        ConfigError: A name is unknown to this family, or a value is wrong.
    """
    return family_of(name).make_settings(name, values or {})
