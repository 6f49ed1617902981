"""Reconstruction along the denoising chain, with ADS and SAFF (sections 3.2 and 3.4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gladad.algorithm.distance import patch_distance, top_k_mean
from gladad.algorithm.networks import Networks, Reconstruction
from gladad.algorithm.schedule import Schedule, add_noise, chain_timesteps, ddim_step, predict_x0
from gladad.core.settings import validated

FusionMode = Literal["sigmoid", "calibrated", "none"]

PENDING = -1


@validated
class ReconstructionConfig:
    """How an image is rebuilt by the denoising chain. The defaults are the paper's for MVTec AD."""

    method: Literal["chain"] = "chain"
    max_step: int = 750  # timestep the chain starts from
    noise_step: int | None = None  # timestep the input is noised at; None = max_step (VisA, PCB-Bank: max_step - 1)
    min_step: int = 350  # below this timestep a pending image stops searching and keeps its input
    num_steps: int = 25  # calls of the denoiser between max_step and 0
    adaptive: bool = True  # search the denoising step per image; False = plain DDIM from max_step
    step_threshold: float = 0.35  # delta: gap above which generated and input content "differ"
    top_k: int = 10  # patches averaged into the gap score
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
    """
    x_t = add_noise(latent, noise, schedule.alpha_bar(config.max_step if config.noise_step is None else config.noise_step))
    start = PENDING if config.adaptive else config.max_step
    step = torch.full((len(latent),), start, dtype=torch.int64, device=latent.device)
    gap_score = torch.full((len(latent),), float("nan"), device=latent.device)
    probes, traces = 0, []

    for t, t_prev in chain_timesteps(config.max_step, config.num_steps):
        alpha_bar = schedule.alpha_bar(t)
        noise_pred = networks.predict_noise(x_t, torch.full_like(step, t))
        x0 = predict_x0(x_t, noise_pred, alpha_bar)  # what the chain generates

        pending = (step == PENDING).nonzero().flatten()
        if len(pending):  # only undecided images are decoded and compared
            probes += len(pending)
            generated = x0[pending]
            noised = add_noise(latent[pending], noise[pending], alpha_bar)
            reference = predict_x0(noised, noise_pred[pending], alpha_bar)  # the input under the same prediction
            gap = patch_distance(networks.latent_features(reference), networks.latent_features(generated))
            score = top_k_mean(gap, config.top_k)
            differs = score > config.step_threshold  # global: enough noise for this image
            stops = differs | (t < config.min_step)
            mask = fusion_mask(gap, config) * differs.view(-1, 1, 1, 1)  # local: where to trust the model
            mask = F.interpolate(mask, latent.shape[-2:], mode="nearest")
            fused = mask * generated + (1 - mask) * reference
            x0[pending] = torch.where(stops.view(-1, 1, 1, 1), fused, generated)
            step[pending] = torch.where(stops, t, PENDING)
            gap_score[pending] = score
            traces.append(torch.full_like(gap_score, float("nan")).index_copy(0, pending, score))

        x_t = ddim_step(x0, noise_pred, schedule.alpha_bar(t_prev))

    trace = torch.stack(traces, dim=1) if traces else latent.new_empty(len(latent), 0)
    return Reconstruction(latent=x_t, step=step, gap_score=gap_score, probes=probes, trace=trace)
