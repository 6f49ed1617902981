"""The process of one long job: ``python -m gladad.service.job_process FOLDER``.

It reads ``job.json`` there, tells its progress as JSON lines on standard output, and ends with a line that holds the result or the problem.
It dies with its parent: nobody would read what it tells.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gladad.core.errors import GladError
from gladad.core.storage import read_json
from gladad.service import good_parts
from gladad.service.feedback import improve
from gladad.service.onlooker import Onlooker

FILE, MODEL, REPORT = "job.json", "model", "report"
NICENESS = 10  # inspection comes first
Progress = Callable[[str, int, int], None]


def tell(**line: Any) -> None:
    """One line to the parent."""
    print(json.dumps(line), flush=True)


def fit(folder: Path, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
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


JOBS = {"fit": fit, "calibrate": calibrate, "evaluate": evaluate, "feedback": improve}


def _saved(detector: Any, folder: Path) -> dict[str, Any]:
    detector.save_pretrained(folder / MODEL)
    threshold = detector.calibration_.threshold
    return {"model_id": detector.model_id, "calibration_id": detector.calibration_id, "promise": threshold.statement}


def _die_with_parent() -> None:
    sys.stdin.read()  # ends when the parent does
    os._exit(1)


def main(folder: Path) -> int:
    """Do the job; returns the exit status."""
    os.nice(NICENESS)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    job = read_json(folder / FILE)
    try:
        result = JOBS[job["kind"]](folder, job, lambda stage, done, total: tell(stage=stage, done=done, total=total))
        if (folder / MODEL).is_dir():
            good_parts.keep(folder / MODEL, job)
    except GladError as error:
        tell(problem=str(error))
        return 1
    tell(result=result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
