"""Speeds of the denoising chain: what networks are asked for, counted, and models that are kept at a speed."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_base import tiny_base  # noqa: F401 (a fixture)
from torch import Tensor

import gladad
from gladad import Glad
from gladad.algorithm import ReconstructionConfig, Schedule, add_noise, chain_timesteps, image_noise, reconstruct
from gladad.cli.main import main
from gladad.core.errors import ConfigError
from gladad.models.registry import make_settings
from gladad.models.stable_diffusion.pipeline import GladPipeline
from gladad.models.stable_diffusion.settings import SPEEDS, StableDiffusionConfig, StableDiffusionSettings

BENCH = runpy.run_path(str(Path(gladad.__file__).parents[2] / "scripts" / "bench_chain.py"))


def pixels(count: int, size: int = 64) -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------- the chain


def test_longer_steps_are_on_the_published_grid() -> None:
    whole = [t for t, _ in chain_timesteps(750, 25)]
    for every in (2, 4, 7, 30):
        found = chain_timesteps(750, 25, every)
        assert [t for t, _ in found] == whole[::every]
        assert [t_prev for _, t_prev in found] == [*whole[::every][1:], -29]  # the last step ends where the whole chain does


def test_latents_are_compared_without_being_decoded() -> None:
    class Blind:
        def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
            return torch.tanh(latent)

    latent, eps, schedule = image_noise((4, 5, 6), 0), image_noise((4, 5, 6), 1), Schedule.scaled_linear()
    config = ReconstructionConfig(probe="latent", step_threshold=0.0, top_k=3)
    found = reconstruct(Blind(), latent, eps, schedule, config)  # type: ignore[arg-type]
    before, after = (add_noise(latent, eps, schedule.alpha_bar(t)) for t in (750, 721))
    difference = (before - after) / schedule.alpha_bar(721).sqrt()  # the prediction is the same for both
    expected = difference.square().mean(1).sqrt().flatten().topk(3).values.mean()
    assert found.step.tolist() == [721] and float(found.gap_score) == pytest.approx(float(expected), rel=1e-3)


# ---------------------------------------------------------------------------------------------------- work, counted


@pytest.fixture(scope="module")
def hollow() -> GladPipeline:
    return BENCH["random_pipeline"](BENCH["HOLLOW"])


def work(pipeline: GladPipeline, way: Any) -> tuple[dict[str, int], Any]:
    with BENCH["counted"](pipeline) as found:
        outcome = way()
    return found.rows, outcome


def test_the_published_loop_is_ours_with_more_work(tiny_base: Path) -> None:  # noqa: F811
    pipeline = GladPipeline.from_base(tiny_base)
    ways = BENCH["ways"](pipeline, pixels(3), 6, 0.25)
    theirs, published = work(pipeline, ways["published"])
    ours, exact = work(pipeline, ways["exact, guided"])
    assert exact.steps == published.steps and len(set(exact.steps)) > 1
    np.testing.assert_allclose(exact.scores, published.scores, rtol=1e-4)
    grid = [t for t, _ in chain_timesteps(750, 6)]
    compared = [grid.index(step) + 1 for step in exact.steps]  # steps until each image is decided
    assert theirs == {"denoiser": 3 * 2 * 6, "decoder": 3 * (2 * max(compared) + 1), "encoder": 3, "extractor": 3 * (2 * max(compared) + 2)}
    assert ours == theirs | {"decoder": 2 * sum(compared) + 3, "extractor": 2 * sum(compared) + 2 * 3}
    assert sum(compared) < 3 * max(compared)


def test_what_each_speed_asks_for(hollow: GladPipeline) -> None:
    """Of one part without a defect, on the paper's chain: it is compared at 14 of 25 steps."""
    ways = BENCH["ways"](hollow, pixels(1), 25, 0.0)
    rows = {name: tuple(work(hollow, way)[0].values()) for name, way in ways.items()}
    final = np.array([0, 1, 1, 2])  # input and reconstruction: one encoded, one decoded, both featurised
    whole, probes = np.array([25, 0, 0, 0]), np.array([0, 2, 0, 2])
    assert (
        rows
        == {
            "published": tuple(2 * whole + 14 * probes + final),
            "exact, guided": tuple(2 * whole + 14 * probes + final),
            "exact": tuple(whole + 14 * probes + final),
            "balanced": tuple(whole + 3 * probes + final),  # at 721, 511, and below min_step
            "fast": (7, *final[1:]),
        }
    )


# ------------------------------------------------------------------------------------------------- settings and models


@pytest.mark.parametrize(
    ("base", "bad", "key"),
    [
        ("small", {"speed": "quick"}, "speed: input should be 'exact', 'balanced' or 'fast'"),
        ("lite", {"speed": "fast"}, "speed: unknown setting"),
        ("sd14", {"speed": "balanced", "reconstruction.search_stride": 3}, r"reconstruction\.search_stride: speed balanced sets it to 7"),
        ("sd14", {"reconstruction.call_stride": 0}, r"reconstruction\.call_stride: "),
    ],
)
def test_impossible_speeds(base: str, bad: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        make_settings(base, bad)


def test_a_speed_sets_the_chain_and_leaves_the_settings() -> None:
    made = make_settings("sd14", {"preset": "mvtec_ad/bottle", "speed": "fast"})
    assert isinstance(made, StableDiffusionSettings)
    assert made.guidance == 1 and made.guidance_scale == 9 and made.reconstruction.probe == "features"
    config = StableDiffusionConfig(settings=made)
    with pytest.raises(ConfigError, match="no delta for fast; adjust it"):
        config.chain  # noqa: B018
    known = replace(config, latent_deltas={"fast": 0.2})
    assert known.chain == replace(made.reconstruction, **SPEEDS["fast"], step_threshold=0.2)
    exact = replace(known, settings=replace(made, speed="exact"))
    assert exact.chain == made.reconstruction and exact.settings.guidance == 9


def test_a_calibrated_mask_is_centred_on_the_delta_that_is_compared() -> None:
    features = ReconstructionConfig(fusion="calibrated", fusion_center=0.3, fusion_width=0.1, step_threshold=0.3)
    settings = StableDiffusionSettings(speed="fast", reconstruction=features)
    chain = StableDiffusionConfig(settings=settings, latent_deltas={"fast": 0.04}).chain
    assert (chain.step_threshold, chain.fusion_center, chain.fusion_width) == (0.04, 0.04, 0.01)


QUICK = {
    "image_size": 64,
    "training.steps": 0,
    "training.precision": "float32",
    "reconstruction.num_steps": 6,
    "calibration": "held-out",
    "false_reject_rate": 0.2,
}


@pytest.fixture(scope="module")
def saved(tiny_base: Path, category: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A fast model."""
    folder = tmp_path_factory.mktemp("fast") / "model"
    paths = sorted((category / "train" / "good").iterdir())[:10]
    Glad.from_base(str(tiny_base), settings=QUICK | {"speed": "fast"}).fit(paths).save_pretrained(folder)
    return folder


def test_a_model_keeps_its_speed(saved: Path, category: Path) -> None:
    loaded = Glad.from_pretrained(saved)
    config = loaded.model_.config
    assert loaded.settings.speed == loaded.provenance_["speed"] == config.settings.speed == "fast"
    assert loaded.describe()["caveat"] is None and set(config.latent_deltas) == {"fast"}
    assert 0 < config.latent_deltas["fast"] != config.settings.reconstruction.step_threshold != 0.35
    with BENCH["counted"](loaded.model_.pipeline) as found:
        loaded.inspect(sorted((category / "test" / "good").iterdir())[0])
    assert found.rows == {"denoiser": 2, "decoder": 1, "encoder": 1, "extractor": 2}


def test_another_speed_than_that_of_the_thresholds_is_told(saved: Path, category: Path, tmp_path: Path, capsys: Any) -> None:
    told = "inspects at speed balanced by thresholds of speed fast, which promise nothing"
    with pytest.warns(UserWarning, match=told):
        other = Glad.from_pretrained(saved, speed="balanced")
    first = Glad.from_pretrained(saved)
    assert other.model_id != first.model_id and other.calibration_id == first.calibration_id
    image = sorted((category / "test" / "good").iterdir())[0]
    assert main(["predict", str(saved), str(image), "-o", str(tmp_path / "out"), "--speed", "balanced", "--no-pictures"]) == 0
    assert told in capsys.readouterr().err
    report = ["-o", str(tmp_path / "report"), "--no-pictures", "--quiet"]
    assert main(["evaluate", str(saved), str(category), *report, "--speed", "balanced", "--keep-maps"]) == 0
    assert told in (tmp_path / "report" / "report.md").read_text()
    assert main(["rescore", str(tmp_path / "report"), "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert told in (tmp_path / "again" / "report.md").read_text()
    unseen = sorted((category / "train" / "good").iterdir())[10:16]
    other.calibrate(unseen)
    assert other.provenance_["speed"] == "balanced" and other.describe()["caveat"] is None
    other.save_pretrained(tmp_path / "model")
    again = Glad.from_pretrained(tmp_path / "model")  # without a warning
    assert again.inspect(image).pred_score == other.inspect(image).pred_score
    with pytest.raises(ConfigError, match=r"^speed: input should be"):
        Glad.from_pretrained(saved, speed="quick")


def test_a_given_delta_needs_no_search_of_other_speeds(tiny_base: Path, category: Path) -> None:  # noqa: F811
    paths = sorted((category / "train" / "good").iterdir())[:8]
    given = QUICK | {"calibrate_step": False, "reconstruction.step_threshold": 0.2}
    exact = Glad.from_base(str(tiny_base), settings=given).fit(paths)
    assert exact.model_.config.latent_deltas == {}
    exact.adjust(paths, given | {"speed": "fast"})
    config = exact.model_.config
    assert set(config.latent_deltas) == {"fast"} and config.settings.reconstruction.step_threshold == 0.2
    assert exact.provenance_["speed"] == "fast"


def test_models_with_one_speed_say_so(model: Path) -> None:
    with pytest.raises(ConfigError, match="speed: a lite model has only one"):
        Glad.from_pretrained(model, speed="fast")
