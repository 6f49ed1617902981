"""GLAD, the algorithm: global and local adaptive diffusion for unsupervised anomaly detection (arXiv 2406.07487).

Everything the method *is* stands in this file, over a narrow contract (`Networks`) and with nothing but tensors:

1. the noise schedule and its algebra                       (paper, section 3.1)
2. the anomaly-oriented training target, ATP                (section 3.3)
3. reconstruction: adaptive denoising step, ADS, and
   spatially-adaptive feature fusion, SAFF                  (sections 3.2 and 3.4)
4. patch distance, anomaly map, image score                 (section 3.5)

Notation: ``z`` latent of the input, ``eps`` noise, ``alpha_bar`` the cumulative product of ``1 - beta``, ``x0`` an estimate of the
clean latent. ``timestep`` always means 0...T-1; ``step`` only the adaptive choice. All tensors are ``[B, C, H, W]``.
Every result of an image depends on that image alone: there is no statistic over the batch anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FusionMode = Literal["sigmoid", "calibrated", "none"]
Distance = Literal["nearest", "position"]
Aggregation = Literal["sum", "max", "mean"]

PENDING = -1


class Networks(Protocol):
    """What the algorithm needs from the world. Images are RGB in [0, 1]."""

    def encode(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` image -> ``[B, C, h, w]`` latent."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, C, h, w]`` latent -> ``[B, 3, H, W]`` image."""
        ...

    def predict_noise(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """Noise prediction for noisy latents ``[B, C, h, w]`` at timesteps ``[B]``; conditioning and guidance are inside."""
        ...

    def latent_features(self, latent: Tensor) -> Tensor:
        """What the step search compares: ``[B, D, h', w']`` features of what a latent shows."""
        ...


# ------------------------------------------------------------------------------------------------ 1. schedule


@dataclass(frozen=True)
class Schedule:
    """The cumulative noise schedule of a trained denoiser.

    Attributes:
        alphas_cumprod: ``[T]``, decreasing, in (0, 1).
    """

    alphas_cumprod: Tensor

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000) -> Schedule:
        """Betas linear in their square root: the schedule of Stable Diffusion."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas, dim=0))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, timestep: int | Tensor) -> Tensor:
        """``alpha_bar`` at one timestep (scalar) or at ``[B]`` timesteps (``[B, 1, 1, 1]``). Negative means the last, timestep 0."""
        if isinstance(timestep, int):
            return self.alphas_cumprod[max(timestep, 0)]
        return self.alphas_cumprod[timestep.clamp_min(0)].view(-1, 1, 1, 1)


def add_noise(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``sqrt(a) x0 + sqrt(1 - a) eps``: the forward process in closed form."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def predict_x0(x_t: Tensor, noise_pred: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latent that a noise prediction implies."""
    return (x_t - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()


def ddim_step(x0: Tensor, noise_pred: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Deterministic DDIM (eta = 0) to the previous noise level."""
    return add_noise(x0, noise_pred, alpha_bar_prev)


def velocity_to_noise(x_t: Tensor, velocity: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise prediction from a v-prediction, ``v = sqrt(a) eps - sqrt(1 - a) x0`` (Salimans & Ho, arXiv 2202.00512)."""
    return alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * x_t


def chain_timesteps(max_step: int, num_steps: int) -> list[tuple[int, int]]:
    """The published timestep grid as ``(timestep, previous timestep)``, from high to low.

    ``stride = max_step // num_steps``, timesteps ``i * stride + 1``: 750 in 25 steps is 721, 691, ... 1. The previous timestep of the
    last is negative, which `Schedule.alpha_bar` reads as timestep 0.
    """
    stride = max_step // num_steps
    return [(i * stride + 1, i * stride + 1 - stride) for i in reversed(range(num_steps))]


# ------------------------------------------------------------------------------------- 2. anomaly-oriented training


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


# ---------------------------------------------------------------------------------------------- 3. reconstruction


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How an image is rebuilt by the denoising chain. The defaults are the paper's for MVTec AD."""

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


@dataclass(frozen=True)
class Reconstruction:
    """What the chain made of a batch.

    Attributes:
        latent: ``[B, C, h, w]`` anomaly-free latent.
        step: ``[B]`` int64, the denoising step each image was given (``max_step`` when the search is off).
        gap_score: ``[B]``, the difference seen at that step (NaN when the search is off).
        probes: Number of image-level comparisons the search made.
        trace: ``[B, P]``, the gap score of every comparison from the highest timestep down, NaN where none was made.
    """

    latent: Tensor
    step: Tensor
    gap_score: Tensor
    probes: int
    trace: Tensor


def image_noise(shape: Sequence[int], seed: int, count: int = 1) -> Tensor:
    """Standard normal noise of one image, from a generator of its own: ``[count, *shape]`` float32.

    The seed does not depend on the image's place in a batch, in a folder or among processes, so neither does its score.
    """
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def top_k_mean(values: Tensor, k: int) -> Tensor:
    """Mean of the ``k`` largest entries of each image (all of them when there are fewer): ``[B, ...] -> [B]``."""
    flat = values.flatten(1)
    return flat.topk(min(k, flat.shape[1]), dim=1).values.mean(dim=1)


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
    """Rebuild each latent as its anomaly-free counterpart, along the chain (sections 3.2 to 3.4).

    Args:
        networks: The four callables.
        latent: ``[B, C, h, w]``, z.
        noise: Same shape, one independent standard normal draw per image.
        schedule: The denoiser's schedule.
        config: The step search and fusion; each part can be switched off.

    Returns:
        The rebuilt latents, and for every image the step it was given.
    """
    noise_step = config.max_step if config.noise_step is None else config.noise_step
    x_t = add_noise(latent, noise, schedule.alpha_bar(noise_step))
    start = PENDING if config.adaptive else config.max_step
    step = torch.full((len(latent),), start, dtype=torch.int64, device=latent.device)
    gap_score = torch.full((len(latent),), float("nan"), device=latent.device)
    probes = 0
    traces = []

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


@dataclass(frozen=True, kw_only=True)
class OneCallConfig:
    """How an image is rebuilt by independent single calls of the denoiser instead of a chain.

    A denoiser trained towards the *normal* latent rebuilds it in one call; several calls at different timesteps, each with noise of its
    own, cost as much as as many steps of a chain and average their errors away instead of feeding them forward.
    """

    timesteps: tuple[int, ...] = (500, 300)  # probes, from high to low
    adaptive: bool = True  # stop, per image, at the first timestep where the difference is clear; False = average all probes
    step_thresholds: tuple[float, ...] = ()  # delta of each timestep (calibrated); needed when adaptive
    top_k: int = 10  # places averaged into the gap score
    fusion: FusionMode = "none"  # SAFF mask; "none" here keeps the model's content everywhere
    fusion_center: float = 0.0  # "calibrated": gap at which the mask is one half
    fusion_width: float = 1.0  # "calibrated": gap over which it rises, > 0


@torch.no_grad()
def reconstruct_one_call(
    networks: Networks, latent: Tensor, noise: Tensor, schedule: Schedule, config: OneCallConfig, scale: Tensor
) -> Reconstruction:
    """Rebuild each latent from a few single denoiser calls, with a per-image choice of how far down to go.

    The estimate after probe ``k`` is the mean of the first ``k`` rebuilt latents, from the noisiest down. An image whose difference to
    its estimate exceeds that timestep's delta is decided there (ADS: this much noise removed something); the others go on to less noise,
    which rebuilds normal detail more faithfully. All probes share one batch, because on a CPU that costs less than skipping some.

    Args:
        networks: Only ``predict_noise`` and ``latent_features`` are used.
        latent: ``[B, C, h, w]``.
        noise: ``[B, K, C, h, w]``, one draw per probe.
        schedule: The denoiser's schedule.
        config: Timesteps and options.
        scale: ``[1, D, 1, 1]``, usual magnitude of each feature's residual on normal images.

    Returns:
        The rebuilt latents; ``step`` is the timestep each image was decided at.
    """
    count = len(config.timesteps)
    timesteps = torch.tensor(config.timesteps).repeat(len(latent))  # image-major
    alpha_bar = schedule.alpha_bar(timesteps)
    x_t = add_noise(latent.repeat_interleave(count, dim=0), noise.flatten(0, 1), alpha_bar)
    x0 = predict_x0(x_t, networks.predict_noise(x_t, timesteps), alpha_bar).unflatten(0, (-1, count))

    order = torch.arange(1, count + 1).view(1, -1, 1, 1, 1)
    estimates = x0.cumsum(dim=1) / order  # [B, K, C, h, w]
    features = networks.latent_features(latent)[:, None]
    rebuilt = networks.latent_features(estimates.flatten(0, 1)).unflatten(0, (-1, count))
    gap = ((features - rebuilt) / scale[:, None]).square().mean(dim=2)  # [B, K, h, w]
    trace = top_k_mean(gap.flatten(0, 1), config.top_k).view(-1, count)

    choice = torch.full((len(latent),), count - 1)
    if config.adaptive:
        delta = torch.tensor(config.step_thresholds, dtype=trace.dtype)
        differs = trace > delta
        choice = torch.where(differs.any(dim=1), differs.int().argmax(dim=1), choice)
    rows = torch.arange(len(latent))
    chosen, chosen_gap = estimates[rows, choice], gap[rows, choice][:, None]
    if config.fusion != "none":  # local: keep the input where it is normal
        mask = torch.sigmoid((chosen_gap - config.fusion_center) / config.fusion_width)
        chosen = mask * chosen + (1 - mask) * latent
    return Reconstruction(
        latent=chosen,
        step=torch.tensor(config.timesteps)[choice],
        gap_score=trace[rows, choice],
        probes=int(count * len(latent)),
        trace=trace,
    )


# ---------------------------------------------------------------------------------- 4. distance, map and score


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How input and reconstruction become an anomaly map and a score. The defaults are the paper's."""

    symmetric: bool = False  # add the distance of every reconstruction patch to its nearest input patch
    pixel_weight: float = 0.0  # v: share of the pixel difference, relative to the map's own maximum
    blur_sigma: float = 6.0  # Gaussian blur of the map, pixels
    blur_kernel: int = 49  # its support, pixels, odd
    top_k: int = 250  # pixels averaged into the image score


def patch_distance(features: Tensor, others: Tensor) -> Tensor:
    """Distance of every patch to its nearest patch of the other image: ``min_j (1 - cos(F_i, G_j))``.

    Args:
        features: ``[B, D, h, w]``, F.
        others: ``[B, D, h', w']``, G.

    Returns:
        ``[B, 1, h, w]`` in [0, 2].
    """
    f = F.normalize(features.flatten(2), dim=1)
    g = F.normalize(others.flatten(2), dim=1)
    nearest = torch.bmm(f.transpose(1, 2), g).amax(dim=2)
    return (1 - nearest).view(len(features), 1, *features.shape[-2:])


def gaussian_blur(x: Tensor, sigma: float, kernel: int) -> Tensor:
    """Separable Gaussian blur of ``[B, C, H, W]`` with reflected borders. The support shrinks where the image is smaller than it."""
    for dim in (3, 2):
        radius = min(kernel // 2, x.shape[dim] - 1)
        offset = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        weight = torch.exp(-0.5 * (offset / sigma) ** 2)
        weight = (weight / weight.sum()).view((1, 1, 1, -1) if dim == 3 else (1, 1, -1, 1)).expand(x.shape[1], -1, -1, -1)
        pad = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), weight, groups=x.shape[1])
    return x


def soft_foreground(mask: Tensor, config: ScoringConfig) -> Tensor:
    """The published scoring weight of a foreground mask: blurred, binarised at > 0 and blurred again.

    So the part itself and a margin of a kernel's radius around it keep full weight, and the ground fades to 0.

    Args:
        mask: ``[B, 1, H, W]`` in {0, 1} or bool.
        config: Its blur.

    Returns:
        ``[B, 1, H, W]`` float in [0, 1].
    """
    weight = mask if mask.is_floating_point() else mask.float()
    grown = gaussian_blur(weight, config.blur_sigma, config.blur_kernel) > 0
    return gaussian_blur(grown.to(weight.dtype), config.blur_sigma, config.blur_kernel)


def anomaly_map(
    features: Sequence[Tensor],
    reconstruction_features: Sequence[Tensor],
    size: tuple[int, int],
    config: ScoringConfig,
    *,
    pixel_difference: Tensor | None = None,
    foreground: Tensor | None = None,
) -> Tensor:
    """Where input and reconstruction differ (section 3.5).

    Args:
        features: One ``[B, D, h, w]`` per layer, of the input.
        reconstruction_features: The same layers of the reconstruction.
        size: ``(H, W)`` of the map.
        config: Options; each term can be switched off.
        pixel_difference: ``[B, 1, H, W]`` >= 0, used when ``pixel_weight`` is not 0. Scaled by its own and the map's maximum *per image*.
        foreground: ``[B, 1, H', W']`` in [0, 1]: how much each place counts, see `soft_foreground`. Multiplies the blurred map.

    Returns:
        ``[B, 1, H, W]`` >= 0.
    """
    total = features[0].new_zeros(len(features[0]), 1, *size)
    for f, g in zip(features, reconstruction_features, strict=True):
        distances = [patch_distance(f, g), patch_distance(g, f)] if config.symmetric else [patch_distance(f, g)]
        for distance in distances:
            total = total + F.interpolate(distance, size, mode="bilinear", align_corners=True)
    if config.pixel_weight and pixel_difference is not None:
        ratio = total.amax((1, 2, 3), keepdim=True) / pixel_difference.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        total = total + config.pixel_weight * ratio * pixel_difference
    total = gaussian_blur(total, config.blur_sigma, config.blur_kernel)
    if foreground is not None:
        total = total * F.interpolate(foreground.to(total.dtype), size, mode="bilinear")
    return total


def image_score(maps: Tensor, config: ScoringConfig) -> Tensor:
    """Mean of the ``top_k`` largest pixels: ``[B, 1, H, W] -> [B]``; higher is more anomalous."""
    return top_k_mean(maps, config.top_k)
