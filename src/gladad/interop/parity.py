"""Holds the code to the published algorithm: ``python -m gladad.interop.parity DIR``.

A golden directory is a small base (``sd``, ``dino``), ``golden.json`` with the cases, and ``golden.safetensors`` with what the published
algorithm computes for them in float32. Every case is recomputed here from its stored latents and noise. The exit code is 0 when every
decision is the same and every tensor agrees within `TOLERANCE`, 1 when one does not, 2 when the directory is not a golden directory.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gladad import algorithm
from gladad.algorithm import ReconstructionConfig, ScoringConfig
from gladad.core.errors import DataError, GladError, ModelFormatError
from gladad.models.stable_diffusion.pipeline import GladPipeline

TOLERANCE = 1e-4
"""Largest accepted absolute difference, in the units of each tensor (images in [-1, 1])."""

CASE_KEYS = {
    "max_step": "denoise_step", "noise_step": "start_timestep", "min_step": "min_step", "num_steps": "inference_steps",
    "adaptive": "adaptive", "step_threshold": "threshold",
}  # fmt: skip
"""Setting of a reconstruction -> its name in a case."""
SCORING_KEYS = {"name", "bidirectional", "pixel_weight", "feature_resolution"}


@dataclass(frozen=True)
class Golden:
    """A golden directory: its description and its tensors."""

    folder: Path
    cases: Sequence[Mapping[str, Any]]
    scoring: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise DataError(f"golden.safetensors has no tensor {name!r}, which golden.json asks for")
        return self.tensors[name]


@dataclass
class Result:
    """What became of one case."""

    name: str
    differences: dict[str, float]  # largest absolute difference of each tensor
    steps: tuple[list[int], list[int]] | None = None  # chosen, expected
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Decisions equal and every difference within the tolerance (a NaN is not)."""
        same = self.steps is None or self.steps[0] == self.steps[1]
        return same and all(difference <= TOLERANCE for difference in self.differences.values())

    def __str__(self) -> str:
        parts = [f"{'ok  ' if self.ok else 'FAIL'} {self.name:24}"]
        parts += [f"max |{name} difference| {difference:.2e}" for name, difference in self.differences.items()]
        if self.steps:
            chosen, expected = self.steps
            parts.append(f"steps {chosen}, expected {'the same' if chosen == expected else expected}")
        return "  ".join(parts + self.notes)


def load_golden(folder: Path) -> Golden:
    """Read a golden directory.

    Raises:
        DataError: It is none.
    """
    try:
        description = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "golden.safetensors")
        golden = Golden(folder, description["cases"], description.get("scoring", []), tensors)
        missing = [key for case in golden.cases for key in {"name", "guidance_scale", "prompt", *CASE_KEYS.values()} - case.keys()]
        missing += [key for case in golden.scoring for key in SCORING_KEYS - case.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(f"{folder} is not a golden directory: {type(error).__name__}: {error}") from error
    if missing:
        raise DataError(f"{folder} is not a golden directory: a case of golden.json lacks {sorted(missing)[0]!r}")
    return golden


def difference(ours: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite when the shapes differ."""
    return float((ours - expected).abs().max()) if ours.shape == expected.shape else float("inf")


def reconstruction_result(golden: Golden, case: Mapping[str, Any], pipeline: GladPipeline) -> Result:
    """Run the denoising chain of one case, from its latents and noise."""
    name = case["name"]
    config = ReconstructionConfig(**{ours: case[theirs] for ours, theirs in CASE_KEYS.items()})
    pipeline.guidance_scale = case["guidance_scale"]
    found = algorithm.reconstruct(pipeline, golden[f"{name}.latents"], golden[f"{name}.noise"], pipeline.schedule, config)
    with torch.no_grad():
        image = pipeline.decode(found.latent) * 2 - 1
    result = Result(name, {"reconstruction": difference(image, golden[f"{name}.reconstruction"])})
    result.steps = (found.step.tolist(), golden[f"{name}.step"].tolist())
    if list(case.get("steps", result.steps[1])) != result.steps[1]:
        result.differences["golden.json step"] = float("inf")
    return result


def scoring_result(golden: Golden, case: Mapping[str, Any], pipeline: GladPipeline) -> Result:
    """Score the stored reconstructions of one case.

    Where the description does not say whose, all are tried, and the one that agrees best is reported: maps differ by far more than that.
    """
    name, size = case["name"], case["feature_resolution"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    config = ScoringConfig(symmetric=case["bidirectional"], pixel_weight=case["pixel_weight"])
    mask = golden.tensors.get(f"{name}.object_mask")
    foreground = None if mask is None else mask[:, None]
    best: Result | None = None
    for source in [case["reconstruction"]] if "reconstruction" in case else [source["name"] for source in golden.cases]:
        pair = (golden["images"] / 2 + 0.5, golden[f"{source}.reconstruction"] / 2 + 0.5)
        maps = pipeline.score_maps(*pair, config, size, foreground)
        score = difference(algorithm.image_score(maps, config), golden[f"{name}.scores"])
        found = Result(name, {"map": difference(maps[:, 0], golden[f"{name}.maps"]), "score": score}, notes=[f"(of {source})"])
        if best is None or max(found.differences.values()) < max(best.differences.values()):
            best = found
        if best.ok:
            break
    if best is None:
        raise DataError(f"{golden.folder} has scoring cases but no reconstruction case")
    if case["pixel_weight"] and case.get("batch_size", 1) != 1:
        best.notes.append("(published with the maximum over a batch; ours is each image's own)")
    return best


def training_result(golden: Golden, pipeline: GladPipeline) -> Result:
    """Recompute the anomaly-oriented training target, and what it implies."""
    normal, timesteps = golden["train.x_normal"], golden["train.timesteps"]
    alpha_bar = pipeline.schedule.alpha_bar(timesteps)
    mixed = algorithm.mix_anomaly(normal, golden["train.x_anomalous"], timesteps, pipeline.schedule.num_timesteps)
    noisy = algorithm.add_noise(mixed, golden["train.noise"], alpha_bar)
    target = algorithm.denoising_target(noisy, normal, alpha_bar)
    differences = {
        "mixed": difference(mixed, golden["train.x_mixed"]),
        "noisy": difference(noisy, golden["train.noisy_input"]),
        "target": difference(target, golden["train.target"]),
        "implied normal": difference(algorithm.predict_x0(noisy, target, alpha_bar), normal),
    }
    return Result("train", differences)


def run(golden: Golden) -> Iterator[Result]:
    """Every case of a golden directory, in its order."""

    @cache
    def pipeline(prompt: str) -> GladPipeline:
        return GladPipeline.from_base(golden.folder, prompt=prompt, local_files_only=True)

    prompt = golden.cases[0]["prompt"] if golden.cases else ""  # scoring and training do not depend on it
    for case in golden.cases:
        yield reconstruction_result(golden, case, pipeline(case["prompt"]))
    for case in golden.scoring:
        yield scoring_result(golden, case, pipeline(prompt))
    if any(name.startswith("train.") for name in golden.tensors):
        yield training_result(golden, pipeline(prompt))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="parity", description="Compare this code with golden vectors of the published algorithm.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="golden directory: golden.json, golden.safetensors, sd/, dino/")
    folder: Path = parser.parse_args(argv).folder
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    results: list[Result] = []
    try:
        golden = load_golden(folder)
        for result in run(golden):
            print(result, flush=True)
            results.append(result)
    except (DataError, ModelFormatError) as error:
        print(f"parity: {error}".splitlines()[0], file=sys.stderr)
        return 2
    except GladError as error:
        print(f"FAIL after {len(results)} cases: {error}")
        return 1
    if any(name.startswith("metric.") for name in golden.tensors):
        print("info metric: not compared (published: 200 thresholds, divided by the largest FPR reached; ours: exact, to FPR 0.3)")
    failed = [result.name for result in results if not result.ok]
    worst = max((d for result in results for d in result.differences.values()), default=float("inf"))
    verdict = f"FAILED: {', '.join(failed)}" if failed else "parity holds"
    print(f"{verdict} ({len(results) - len(failed)} of {len(results)} cases; largest difference {worst:.2e}, tolerance {TOLERANCE:.0e})")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
