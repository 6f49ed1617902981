"""A floor under the accuracy of the default model on a real product: solar cells, a few of them, and a short training."""

from __future__ import annotations

import pytest

from gladad.cli.demo import solar_cells
from gladad.detector.glad import Glad
from gladad.evaluation.run import evaluate

pytest.importorskip("elpv_dataset", reason="the solar cells are not installed (pip install elpv-dataset)")


def test_broken_solar_cells_are_told_from_working_ones() -> None:
    """Measured: .926 with the seeds 0 and 1, and .943 by the demo, with five times the cells."""
    train, test = (part[::step] for part, step in zip(solar_cells(), (5, 3), strict=True))
    settings = {"image_size": 128, "training": {"steps": 60, "pool": 200, "decoder_steps": 1}}
    report = evaluate(Glad.from_base("lite", settings=settings).fit(train), test)
    assert report.counts["normal"] == report.counts["anomalous"] == 50
    assert report.metrics["image_auroc"] > 0.85
