"""Models and settings as version 0.1 wrote them, translated into today's names; read for one release more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRAINING = ("steps", "minutes", "anomaly_oriented")
_RECONSTRUCTION = ("adaptive", "timesteps")
_MAP = ("position_share", "blur_sigma", "top_k")


def new_names(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names of the flat settings that every model once shared; what is not one of them stays as it is.

    Args:
        name: Of the model, for those that meant another thing on another one.
        values: By their names; None where a value was not set.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in _TRAINING and value is not None:
            found[f"training.{key}"] = value
        elif key in _RECONSTRUCTION and value is not None:
            found[f"reconstruction.{key}"] = value
        elif key == "fusion" and value is not None:
            found["reconstruction.fusion"] = ("calibrated" if name == "lite" else "sigmoid") if value else "none"
        elif key == "denoiser" and value is not None:
            found |= {f"training.{inner}": own for inner, own in value.items()}
        elif key not in {*_TRAINING, *_RECONSTRUCTION, "fusion", "denoiser"}:
            found[key] = value
    return found


def upgraded(model: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``model.json`` of format 1 as one of format 2; keys of settings that a model never had are left out."""
    name, kind, old = model["source"], model["base"], dict(model["config"])
    known = {key: value for key, value in model["settings"].items() if key in _SETTINGS_OF.get(kind, _SETTINGS_OF["memory-bank"])}
    settings = new_names(name, known)
    upgrade = {"lite": _lite, "diffusers": _diffusers}.get(kind, _baseline)
    return {
        "format_version": 2,
        "name": name,
        "kind": kind,
        "settings": settings,
        "config": upgrade(old, settings),
        "provenance": model["provenance"],
    }


def _lite(old: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    shape = {key: old.pop(key) for key in ("image_size", "categories", "category")}
    latent = {key: old.pop(key) for key in ("dimensions", "whitening")}
    scoring = {key: old.pop(key) for key in _MAP}
    reconstruction = {"method": "single-calls"} | old.pop("reconstruction")
    own = {"latent": latent, "scoring": scoring, "reconstruction": reconstruction}
    return shape | {"settings": _nested(settings) | old | own}


def _baseline(old: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    shape = {key: old.pop(key) for key in ("image_size", "method") if key in old}
    return shape | {"settings": settings | old}


def _diffusers(old: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    rank, layers = old.pop("adapter_rank"), old.pop("adapter_layers")
    nested = _nested(settings)
    training = nested.get("training", {}) | {"precision": old.pop("precision")}
    if rank:
        training |= {"rank": rank, "layers": layers, "method": "lora"}
    feature_size, foreground = old.pop("feature_size"), old.pop("foreground")
    own = old | {"training": training, "feature_size": feature_size[0], "scoring_foreground": foreground}
    return {"image_size": own.pop("image_size"), "adapted": bool(rank), "settings": nested | own}


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in dotted.items():
        table, _, key = name.rpartition(".")
        (found.setdefault(table, {}) if table else found)[key] = value
    return found


_ANY = {"seed", "false_reject_rate", "image_size", "max_images", "shots", "calibration"}
_DENOISING = _ANY | {"steps", "textures", "foreground", "adaptive", "fusion"}
_SETTINGS_OF = {
    "memory-bank": _ANY,
    "lite": _DENOISING | {"minutes", "product", "anomaly_oriented", "timesteps"},
    "diffusers": _DENOISING | {"features", "vae", "revision", "offline", "prompt", "preset", "denoiser"},
}
