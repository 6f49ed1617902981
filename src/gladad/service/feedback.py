"""Verdicts that flow back: parts that people called good make the next version, which is only offered where it is no worse."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from gladad.core.errors import DataError
from gladad.core.images import list_images
from gladad.service import decisions, golden
from gladad.service.products import Version
from gladad.service.station import Station
from gladad.service.tables import decisions as table
from gladad.service.tables import verdicts

GOOD, BAD = "good", "bad"
Progress = Callable[[str, int, int], None]


def collect(station: Station, version: Version, folder: Path) -> dict[str, Any]:
    """Put the images of judged decisions of a product below a folder, in ``good`` and ``bad``; each image once, by its last verdict.

    Returns:
        What `improve` wants to know: the folders, the golden parts with their decisions, and the limits.

    Raises:
        DataError: No image of a part that was called good is kept.
    """
    with station.record.read() as connection:
        judged = _judged(connection, version.product)
        parts = golden.of(connection, version.product, version.number)
    for verdict in (GOOD, BAD):
        shutil.rmtree(folder / verdict, ignore_errors=True)
        (folder / verdict).mkdir(parents=True)
    for sha256, (kind, verdict) in judged.items():
        path = station.pictures.image_path(sha256, kind)
        if path.is_file():
            target = folder / verdict / path.name
            try:
                os.link(path, target)
            except OSError:  # another file system
                shutil.copyfile(path, target)
    if not any((folder / GOOD).iterdir()):
        raise DataError(f"no part of {version.product!r} was called good, or none of their images is kept")
    paths = {str(golden.path_of(station, row)): row["decision"] for row in parts}
    return {"judged": str(folder), "golden": paths, "limits": [version.warn_limit, version.reject_limit]}


def _judged(connection: Connection, product: str) -> dict[str, tuple[str, str]]:
    """SHA-256 of each judged image -> its type and its last verdict."""
    last = select(func.max(verdicts.c.sequence)).group_by(verdicts.c.decision_id)
    query = (
        select(table.c.image_sha256, table.c.image_type, verdicts.c.verdict)
        .join(verdicts, verdicts.c.decision_id == table.c.id)
        .where(table.c.product == product, verdicts.c.sequence.in_(last))
        .order_by(verdicts.c.sequence)
    )
    return {row.image_sha256: (row.image_type, row.verdict) for row in connection.execute(query)}


def improve(folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Make a model that knows the parts that were called good, and compare it with the one before.

    ``mode`` "calibrate" adds them to the images that the thresholds are made from. "continue" trains on from the present weights, with
    latents of the old images beside the new ones, so that nothing is forgotten; a fifth of the new ones join those held out. "fit" learns
    anew from everything. It is offered (``offered``) where it decides the golden parts alike and rejects no more of the held-out and
    confirmed good parts, those that neither was trained on, than the one before.

    Returns:
        Both versions side by side: false rejects, and rejected bad parts.
    """
    from gladad.data.samples import file_digest
    from gladad.detector.glad import Glad

    before = Glad.from_pretrained(request["model"])
    judged, images = Path(request["judged"]), list_images(Path(request["images"]))
    good, bad = list_images(judged / GOOD), list_images(judged / BAD)
    if request["mode"] == "fit":
        after = Glad.from_base(before.name, settings=before.settings).fit([*images, *good], progress=progress)
    else:
        after = Glad.from_pretrained(request["model"])
        learn = after.extend if request["mode"] == "continue" else after.calibrate
        learn([*images, *good], progress=progress)
    trained = _trained(before) | _trained(after)
    held_out = [path for path in dict.fromkeys([*images, *good]) if file_digest(path) not in trained]
    limits = request["limits"]
    sides = {name: _measured(each, held_out, bad, limits) for name, each in (("before", before), ("after", after))}
    changed = [Path(path).name for path, decision in request["golden"].items() if _decision(after, Path(path), limits) != decision]
    offered = not changed and sides["after"]["false_rejects"] <= sides["before"]["false_rejects"]
    after.save_pretrained(folder / "model")
    return {
        **sides,
        "golden_changed": changed,
        "confirmed_good": len(good),
        "offered": offered,
        "promise": after.calibration_.threshold.statement,
    }


def _trained(detector: Any) -> frozenset[str]:
    seen = detector._fitted.seen
    return frozenset() if seen is None else seen.trained


def _measured(detector: Any, good: Sequence[Path], bad: Sequence[Path], limits: Sequence[float | None]) -> dict[str, Any]:
    rejected = [sum(_decision(detector, path, limits) == decisions.REJECT for path in paths) for paths in (good, bad)]
    ids = {"model_id": detector.model_id, "calibration_id": detector.calibration_id}
    return ids | {"good": len(good), "false_rejects": rejected[0], "bad": len(bad), "found": rejected[1]}


def _decision(detector: Any, path: Path, limits: Sequence[float | None]) -> str:
    score = detector.inspect(path, reconstruct=False).pred_score
    return decisions.decide(score, limits[0], float(limits[1] or 1.0))
