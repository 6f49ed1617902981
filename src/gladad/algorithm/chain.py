"""Reconstruction along the denoising chain, with ADS and SAFF (sections 3.2 and 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gladad.algorithm.distance import patch_distance, top_k_mean
from gladad.algorithm.networks import Networks, Reconstruction
from gladad.algorithm.schedule import Schedule, add_noise, chain_timesteps, ddim_step, predict_x0
from gladad.core.settings import validated

FusionMode = Literal["sigmoid", "calibrated", "none"]
Probe = Literal["features", "latent"]

PENDING = -1


@validated
class ReconstructionConfig:
    """How an image is rebuilt by the denoising chain. The defaults are the paper's for MVTec AD."""

    method: Literal["chain"] = "chain"
    max_step: int = 750  # timestep the chain starts from
    noise_step: int | None = None  # timestep the input is noised at; None = max_step (VisA, PCB-Bank: max_step - 1)
    min_step: int = 350  # below this timestep a pending image stops searching and keeps its input
    num_steps: int = 25  # calls of the denoiser between max_step and 0
    call_stride: Annotated[int, Field(ge=1)] = 1  # call the denoiser at every so many timesteps only; steps then are longer
    adaptive: bool = True  # search the denoising step per image; False = plain DDIM from max_step
    step_threshold: float = 0.35  # delta: gap above which generated and input content "differ"
    top_k: int = 10  # patches averaged into the gap score
    search_stride: Annotated[int, Field(ge=1)] = 1  # compare at every so many calls only; where they differ, those between are bisected
    probe: Probe = "features"  # what is compared: features of the decoded latents | the latents themselves, with a delta of their own
    fusion: FusionMode = "sigmoid"  # SAFF mask: published | centred on calibrated normals | none (the input's content)
    fusion_center: float = 0.0  # "calibrated": gap at which the mask is one half
    fusion_width: float = 1.0  # "calibrated": gap over which it rises, > 0


def fusion_mask(gap: Tensor, config: ReconstructionConfig) -> Tensor:
    """SAFF: the share of generated content per place, in [0, 1] (section 3.4).

    The published mask is the sigmoid of a distance >= 0, so it never falls below one half; "calibrated" centres and scales it so
    that gaps usual on normal images keep the input.
    """
    if config.fusion == "sigmoid":
        return torch.sigmoid(gap)
    if config.fusion == "calibrated":
        return torch.sigmoid((gap - config.fusion_center) / config.fusion_width)
    return torch.zeros_like(gap)


@torch.no_grad()
def reconstruct(networks: Networks, latent: Tensor, noise: Tensor, schedule: Schedule, config: ReconstructionConfig) -> Reconstruction:
    """Rebuild each latent ``[B, C, h, w]`` as its anomaly-free counterpart, along the chain (sections 3.2 to 3.4).

    The noise is of the same shape, one independent standard normal draw per image. Each part, step search and fusion, can be switched off.

    With a ``search_stride`` above 1 the search is sparse: content is compared at some steps only. Where it differs at one and did not at
    the one before, bisection finds a step between from which on it does, and the chain is walked again from there. The step is that of the
    whole search if gaps only grow on the way. ``trace`` has the comparisons on the way, without those of bisections; ``probes`` counts all.
    """
    x_t = add_noise(latent, noise, schedule.alpha_bar(config.max_step if config.noise_step is None else config.noise_step))
    start = PENDING if config.adaptive else config.max_step
    step = torch.full((len(latent),), start, dtype=torch.int64, device=latent.device)
    gap_score = torch.full((len(latent),), float("nan"), device=latent.device)
    probe = _Probe(networks, latent, noise, schedule, config)
    walked: list[_Step] = []  # since the last comparison
    traces: list[Tensor] = []

    for place, (t, t_prev) in enumerate(chain_timesteps(config.max_step, config.num_steps, config.call_stride)):
        here = _Step.of(networks, x_t, t, t_prev, schedule)
        pending = (step == PENDING).nonzero().flatten()
        again: dict[int, Tensor] = {}  # image -> where it is after this step, walked again from an earlier one
        if len(pending) and (place % config.search_stride == 0 or t < config.min_step):  # only undecided images are compared
            score, fused = probe(here, pending)
            differs = score > config.step_threshold  # global: enough noise for this image
            stops = differs | (t < config.min_step)
            here.x0[pending] = torch.where(stops.view(-1, 1, 1, 1), fused, here.x0[pending])
            step[pending] = torch.where(stops, t, PENDING)
            gap_score[pending] = score
            traces.append(torch.full_like(gap_score, float("nan")).index_copy(0, pending, score))
            for image in pending[differs].tolist() if walked else ():
                found = probe.bisect(walked, image)
                if found is not None:
                    step[image], gap_score[image], again[image] = probe.walk([*walked, here], *found, image)
            walked = []
        else:
            walked.append(here)

        x_t = here.after(schedule)
        for image, x in again.items():
            x_t[image] = x

    trace = torch.stack(traces, dim=1) if traces else latent.new_empty(len(latent), 0)
    return Reconstruction(latent=x_t, step=step, gap_score=gap_score, probes=probe.count, trace=trace)


@dataclass(frozen=True)
class _Step:
    """One step of the chain, for all images."""

    t: int
    t_prev: int
    noise_pred: Tensor  # [B, C, h, w]
    x0: Tensor  # [B, C, h, w], what the chain generates

    @classmethod
    def of(cls, networks: Networks, x_t: Tensor, t: int, t_prev: int, schedule: Schedule) -> _Step:
        noise_pred = networks.predict_noise(x_t, torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device))
        return cls(t, t_prev, noise_pred, predict_x0(x_t, noise_pred, schedule.alpha_bar(t)))

    def after(self, schedule: Schedule) -> Tensor:
        return ddim_step(self.x0, self.noise_pred, schedule.alpha_bar(self.t_prev))


class _Probe:
    """The comparison of generated content with the input's."""

    def __init__(self, networks: Networks, latent: Tensor, noise: Tensor, schedule: Schedule, config: ReconstructionConfig):
        self.networks, self.latent, self.noise, self.schedule, self.config = networks, latent, noise, schedule, config
        self.count = 0  # images compared

    def __call__(self, here: _Step, images: Tensor) -> tuple[Tensor, Tensor]:
        """Gap score ``[N]`` of some images ``[N]`` at a step, and what is kept of both if they stop there ``[N, C, h, w]``."""
        self.count += len(images)
        alpha_bar, generated = self.schedule.alpha_bar(here.t), here.x0[images]
        noised = add_noise(self.latent[images], self.noise[images], alpha_bar)
        reference = predict_x0(noised, here.noise_pred[images], alpha_bar)  # the input under the same prediction
        gap = self.gap(reference, generated)
        score = top_k_mean(gap, self.config.top_k)
        differs = score > self.config.step_threshold
        mask = fusion_mask(gap, self.config) * differs.view(-1, 1, 1, 1)  # local: where to trust the model
        mask = F.interpolate(mask, self.latent.shape[-2:], mode="nearest")
        return score, mask * generated + (1 - mask) * reference

    def gap(self, reference: Tensor, generated: Tensor) -> Tensor:
        """How far latents differ at each place ``[N, 1, h, w]``: distance of features in [0, 2], or of the latents themselves, >= 0."""
        if self.config.probe == "latent":
            return (generated - reference).square().mean(dim=1, keepdim=True).sqrt()
        ours, theirs = self.networks.latent_features(torch.cat([reference, generated])).chunk(2)
        return patch_distance(ours, theirs)

    def bisect(self, walked: Sequence[_Step], image: int) -> tuple[int, Tensor, Tensor] | None:
        """The number of the first of some steps at which an image differs, if later ones do too, its gap score and what is kept."""
        row, first, last = torch.tensor([image], device=self.latent.device), 0, len(walked)
        found = None
        while first < last:
            middle = (first + last) // 2
            score, fused = self(walked[middle], row)
            if bool(score > self.config.step_threshold):
                last, found = middle, (middle, score[0], fused)
            else:
                first = middle + 1
        return found

    def walk(self, steps: Sequence[_Step], number: int, score: Tensor, fused: Tensor, image: int) -> tuple[int, Tensor, Tensor]:
        """Timestep and gap score of an image that stops at one of some steps, and where the chain leads from there ``[C, h, w]``."""
        here = steps[number]
        x = ddim_step(fused, here.noise_pred[image : image + 1], self.schedule.alpha_bar(here.t_prev))
        for later in steps[number + 1 :]:
            x = _Step.of(self.networks, x, later.t, later.t_prev, self.schedule).after(self.schedule)
        return here.t, score, x[0]
