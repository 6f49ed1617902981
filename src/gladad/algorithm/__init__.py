"""GLAD, the algorithm: global and local adaptive diffusion for unsupervised anomaly detection (arXiv 2406.07487).

Everything the method *is* stands in this package, over a narrow contract (`networks.Networks`) and with nothing but tensors:

1. `schedule`: the noise schedule and its algebra                       (paper, section 3.1)
2. `training_target`: anomaly-oriented training, ATP                    (section 3.3)
3. `chain`: adaptive denoising step, ADS, and spatially-adaptive
   feature fusion, SAFF; `single_calls`: both without a chain           (sections 3.2 and 3.4)
4. `distance`: patch distance, anomaly map, image score                 (section 3.5)
5. `deviation`: another method over the same contract                   (DeCo-Diff, CVPR 2025)

Notation: ``z`` latent of the input, ``eps`` noise, ``alpha_bar`` the cumulative product of ``1 - beta``, ``x0`` an estimate of the
clean latent. ``timestep`` always means 0...T-1; ``step`` only the adaptive choice. All tensors are ``[B, C, H, W]``.
Every result of an image depends on that image alone: there is no statistic over the batch anywhere.
"""

from __future__ import annotations

from gladad.algorithm.chain import FusionMode, ReconstructionConfig, fusion_mask, reconstruct
from gladad.algorithm.deviation import DeviationConfig, corrupt_cells, deviation_target, random_cells, reconstruct_deviation
from gladad.algorithm.distance import ScoringConfig, anomaly_map, gaussian_blur, image_score, patch_distance, soft_foreground, top_k_mean
from gladad.algorithm.networks import Denoiser, Networks, Reconstruction, Retrieve
from gladad.algorithm.schedule import Schedule, add_noise, chain_timesteps, ddim_step, image_noise, predict_x0, velocity_to_noise
from gladad.algorithm.single_calls import OneCallConfig, reconstruct_one_call
from gladad.algorithm.training_target import denoising_target, mix_anomaly

__all__ = [
    "Denoiser", "DeviationConfig", "FusionMode", "Networks", "OneCallConfig", "Reconstruction", "ReconstructionConfig", "Retrieve",
    "Schedule", "ScoringConfig", "add_noise", "anomaly_map", "chain_timesteps", "corrupt_cells", "ddim_step", "denoising_target",
    "deviation_target", "fusion_mask", "gaussian_blur", "image_noise", "image_score", "mix_anomaly", "patch_distance", "predict_x0",
    "random_cells", "reconstruct", "reconstruct_deviation", "reconstruct_one_call", "soft_foreground", "top_k_mean", "velocity_to_noise",
]  # fmt: skip
