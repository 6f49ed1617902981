"""The process of one long job: it reads ``job.json`` in the job's folder and tells its progress, and at last its result or its problem.

It dies with its parent: nobody would read what it tells.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gladad.core.errors import GladError
from gladad.core.storage import read_json
from gladad.detector.process import end_with_parent
from gladad.service import good_parts
from gladad.service.feedback import improve
from gladad.service.onlooker import Onlooker, Tell

FILE, LOG, MODEL, REPORT = "job.json", "log.txt", "model", "report"
NICENESS = 10  # inspection comes first
Progress = Callable[[str, int, int], None]


def fit(tell: Tell, folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Train a model; a Stable Diffusion goes on where it was stopped. ``lite`` keeps latents, so that it can learn on from verdicts."""
    from gladad.detector.glad import Glad
    from gladad.training.loop import TrainingRun

    kept = {"training.keep_latents": True} if request["base"] == "lite" else {}
    detector = Glad.from_base(request["base"], settings=kept | request["settings"])
    onlooker, long = Onlooker(folder, tell), request["base"] != "lite"
    run = TrainingRun(folder=folder / "training" if long else None, watch=onlooker)
    detector.fit(request["images"], run=run, progress=progress)
    onlooker.tell_losses()
    return _saved(detector, folder)


def calibrate(folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Make the thresholds of a model anew, with what counts as it was, or as is asked for."""
    from gladad.decision.scope import Scope
    from gladad.detector.glad import Glad

    scope = None
    if request["ignore"] is not None or request["min_area"] is not None:
        scope = Scope.read(request["ignore"], request["min_area"] or 0.0)
    return _saved(Glad.from_pretrained(request["model"]).calibrate(request["images"], scope=scope, progress=progress), folder)


def evaluate(folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measure a model on labelled images."""
    from gladad.data.layouts import labelled_samples
    from gladad.detector.glad import Glad
    from gladad.evaluation.run import evaluate as measure
    from gladad.evaluation.run import write_report
    from gladad.report.files import output_folder
    from gladad.report.gallery import GalleryItem

    samples, items = labelled_samples(Path(request["images"]), "auto", None), list[GalleryItem]()
    with output_folder(folder / REPORT) as output:
        report = measure(Glad.from_pretrained(request["model"]), samples, collect=items.append, progress=progress)
        write_report(report, items, output, title=f"{request['product']}: evaluation")
    return {"metrics": report.metrics, "counts": report.counts}


JOBS = {"calibrate": calibrate, "evaluate": evaluate, "feedback": improve}


def _saved(detector: Any, folder: Path) -> dict[str, Any]:
    detector.save_pretrained(folder / MODEL)
    threshold = detector.calibration_.threshold
    return {"model_id": detector.model_id, "calibration_id": detector.calibration_id, "promise": threshold.statement}


def run(folder: Path, connection: Connection) -> None:
    """The process's main function: do the job, and tell of it in dictionaries; what it prints goes to a file in the folder."""
    os.nice(NICENESS)
    end_with_parent()
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)

    sending, job = threading.Lock(), read_json(folder / FILE)

    def tell(**line: Any) -> None:
        with sending:
            connection.send(line)

    try:
        do = partial(fit, tell) if job["kind"] == "fit" else JOBS[job["kind"]]
        result = do(folder, job, lambda stage, done, total: tell(stage=stage, done=done, total=total))
        if (folder / MODEL).is_dir():
            good_parts.keep(folder / MODEL, job)
    except GladError as error:
        tell(problem=str(error))
    else:
        tell(result=result)
