"""Anomaly-oriented training, ATP (section 3.3): what goes into the denoiser and what it is to predict."""

from __future__ import annotations

from torch import Tensor


def mix_anomaly(z_normal: Tensor, z_anomalous: Tensor, timestep: Tensor, num_timesteps: int) -> Tensor:
    """The anomaly fades out at small t: ``z_m = (t/T) z_a + (1 - t/T) z_n`` (section 3.3)."""
    share = (timestep.to(z_normal.dtype) / num_timesteps).view(-1, 1, 1, 1)
    return share * z_anomalous + (1 - share) * z_normal


def denoising_target(x_t: Tensor, z_normal: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise whose implied ``x0`` is the *normal* latent: ``predict_x0(x_t, target) == z_normal``.

    Where the input is normal this is the noise that was added; over a synthetic anomaly it leaves the standard Gaussian, by
    ``sqrt(a / (1 - a)) (z_m - z_n)``.
    """
    return (x_t - alpha_bar.sqrt() * z_normal) / (1 - alpha_bar).sqrt()
