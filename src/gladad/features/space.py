"""The whitened space of features in which the ``lite`` base diffuses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureSpace(nn.Module):
    """The affine map between features of C channels and the latent of D dimensions: standardise, project, whiten.

    D < C is the number of principal components kept; ``whitening`` is an exponent, from 0, PCA, to 1, full whitening.
    """

    mean: Tensor  # [1, C, 1, 1], of the features on normal images
    std: Tensor  # [1, C, 1, 1], likewise
    basis: Tensor  # [D, C], principal directions of the standardised features, rows by falling variance
    scale: Tensor  # [1, D, 1, 1], what the coordinates along them are divided by

    def __init__(self, channels: int, dimensions: int, whitening: float):
        super().__init__()
        self.channels, self.dimensions, self.whitening = channels, dimensions, whitening
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        self.register_buffer("basis", torch.eye(channels)[:dimensions].clone())
        self.register_buffer("scale", torch.ones(1, dimensions, 1, 1))

    def fit(self, features: Iterable[Tensor]) -> None:
        """Fit on feature batches ``[B, C, h, w]`` of normal images (one pass, sums in double precision)."""
        count, total = 0, torch.zeros(self.channels, dtype=torch.float64, device=self.mean.device)
        second = torch.zeros(self.channels, self.channels, dtype=torch.float64, device=self.mean.device)
        for batch in features:
            rows = batch.float().permute(0, 2, 3, 1).reshape(-1, self.channels)
            count += len(rows)
            total += rows.double().sum(0)
            second += (rows.T @ rows).double()
        mean = total / count
        covariance = second / count - torch.outer(mean, mean)
        std = covariance.diagonal().clamp_min(0).sqrt() + 1e-5
        eigenvalues, vectors = torch.linalg.eigh(covariance / torch.outer(std, std))
        kept = eigenvalues.flip(0).clamp_min(1e-10)[: self.dimensions]
        basis = vectors.flip(1).T[: self.dimensions]
        # an eigenvector's sign is arbitrary: fix it, so that the same data give the same model
        signs = torch.sign(basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)))
        self.mean.copy_(mean.view(1, -1, 1, 1))
        self.std.copy_(std.view(1, -1, 1, 1))
        self.basis.copy_(basis * signs)
        unit = (kept ** (1 - self.whitening)).mean().sqrt()  # brings the latent to unit variance
        self.scale.copy_((kept ** (self.whitening / 2) * unit).view(1, -1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[B, C, h, w]`` -> latent ``[B, D, h, w]``."""
        return F.conv2d((features - self.mean) / self.std, self.basis[:, :, None, None]) / self.scale
