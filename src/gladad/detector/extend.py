"""A fit that goes on: further good images are learnt from where the last training ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gladad.core.errors import ConfigError, DataError
from gladad.core.records import Progress
from gladad.data.samples import file_digest, fingerprint
from gladad.decision.conformal import HELD_OUT_SHARE, MIN_HELD_OUT
from gladad.detector.fit import Fitter, Images, distinct, listed, seen
from gladad.detector.fitted import Fitted, SeenImages
from gladad.models.family import Training
from gladad.models.tiled import Tiled


def extend(fitter: Fitter, fitted: Fitted, images: Images, progress: Progress) -> Fitted:
    """Learn further good images, see `gladad.detector.glad.Glad.extend`.

    An image that the present thresholds are made from stays held out, and a fifth of the new ones, drawn at random, joins them before
    anything is looked at; where they come one at a time, every fifth one joins, and only thresholds are made. So whatever the training
    does, the networks have never seen the images that the new thresholds are made from, and these are exchangeable with parts to come
    from the same process: the promise is that of a fit.
    """
    go_on = getattr(fitter.family, "extend", None)
    if go_on is None or isinstance(fitted.model, Tiled):
        what = "model of tiles" if isinstance(fitted.model, Tiled) else f"{fitted.model.kind} model"
        raise ConfigError(f"a {what} cannot learn on from its weights; fit it anew with all images")
    known = fitted.seen or SeenImages()
    if not known.held_out or fitted.calibration.cross_fitted:
        raise ConfigError("no images were held out from this fit, so a part of them cannot be kept apart; fit it anew with all images")
    paths = distinct(listed(images))
    old, held_out, new = _sorted(paths, known)
    if not new:
        told = f"all {len(paths)} images given are known to the model, {len(held_out)} of them held out for its thresholds, which stay so"
        raise DataError(f"{told}; give new ones too, or fit it anew with all of them")
    earlier = fitted.provenance.get("continued", [])
    trained, apart = _set_apart(new, earlier, fitter.settings.seed)
    held_out += apart
    if len(held_out) < MIN_HELD_OUT:
        raise DataError(
            f"at least {MIN_HELD_OUT} held-out images are needed, there are {len(held_out)}; give those of the last calibration too"
        )
    size, place = fitted.model.image_size, fitted.provenance["foreground"]["foreground"]
    training = Training(fitter.name, fitter.settings, size, {"": place}, fitter.textures(size), progress=progress)
    before = None if getattr(fitted.model, "has_past", False) else fitted.pixels(_all(old, known), progress)
    model = go_on(fitted.model, fitted.pixels(trained, progress), before, training) if trained else fitted.model
    missing = len(known.held_out) + len(apart) - len(held_out)
    notes = [f"{missing} images that earlier thresholds were made from are missing"] if missing else []
    provenance = fitted.provenance | {
        "data_fingerprint": f"{fitted.provenance['data_fingerprint']} {fingerprint(new)}",
        "images": fitted.provenance["images"] + len(new),
        "continued": [*earlier, {"learnt": len(trained), "held_out": len(apart)}],
        "left_out": 0,
        "notes": notes,
    }
    learnt = SeenImages(known.trained | seen(trained, []).trained, known.held_out)
    return fitter.recalibrated(replace(fitted, model=model, provenance=provenance, seen=learnt), held_out, progress)


def _sorted(paths: list[Path], known: SeenImages) -> tuple[list[Path], list[Path], list[Path]]:
    """Those that were trained on, those held out, and those that are new."""
    old, held_out, new = list[Path](), list[Path](), list[Path]()
    for path in paths:
        digest = file_digest(path)
        (old if digest in known.trained else held_out if digest in known.held_out else new).append(path)
    return old, held_out, new


def _set_apart(new: list[Path], earlier: Sequence[dict[str, int]], seed: int) -> tuple[list[Path], list[Path]]:
    """New images to train on, and those held out: a fifth of all that have come since the fit, over all continuations together."""
    known, held_out = (sum(each[name] for each in earlier) for name in ("learnt", "held_out"))
    count = min(max(0, int(HELD_OUT_SHARE * (known + held_out + len(new))) - held_out), len(new))
    chosen = set(np.random.default_rng((seed, known + held_out)).permutation(len(new))[:count].tolist())
    parts: tuple[list[Path], list[Path]] = ([], [])
    for place, path in enumerate(new):
        parts[place in chosen].append(path)
    return parts


def _all(old: list[Path], known: SeenImages) -> list[Path]:
    """All images that were trained on.

    Raises:
        DataError: Some are missing.
    """
    if len(old) < len(known.trained):
        missing = f"{len(known.trained) - len(old)} of the {len(known.trained)} images that it was trained on are missing"
        raise DataError(f"the model keeps no latents of its training (training.keep_latents), and {missing}; give them too")
    return old
