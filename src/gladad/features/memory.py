"""What is kept of normal latents: some of their vectors, to find the nearest to others, and how their residuals vary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gladad.core.threads import one_thread
from gladad.features.gaussians import Gaussians, fit_gaussians
from gladad.features.index import VectorIndex


class Memory(nn.Module):
    """Latent vectors of normal images, and the image that each is of.

    The search runs on the CPU.
    """

    rows: Tensor  # [M, D] float16, those of an image one after the other
    owner: Tensor  # [M] int32, number of the image, rising

    def __init__(self, dimensions: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, dimensions, dtype=torch.float16))
        self.register_buffer("owner", torch.zeros(0, dtype=torch.int32))
        self._index: list[Index] = []  # in a list so that it is no part of the saved state

    def remember(self, rows: Tensor, owner: Tensor) -> None:
        """Hold these ``[M, D]`` vectors of the images ``[M]`` and no others."""
        order = owner.argsort(stable=True)
        self.rows, self.owner, self._index = rows[order].half(), owner[order].int(), []

    @property
    def index(self) -> Index:
        """Of the vectors, made when it is first asked for."""
        if not self._index:
            self._index = [Index(self.rows)]
        return self._index[0]

    def forward(self, latent: Tensor, owners: Tensor | None = None) -> Tensor:
        """The nearest vector to every cell of ``[B, D, h, w]``, in the same shape and dtype.

        With ``owners`` ``[B]``, each image's own vectors are left out, those of its copies included, unless there are no others.
        """
        index = self.index
        cells = latent.permute(0, 2, 3, 1).flatten(1, 2)  # [B, h w, D]
        found = []
        for number, own in enumerate(cells):
            barred = (0, 0)
            if owners is not None:
                own_rows = torch.nonzero(self.owner == owners[number].to(self.owner))
                if 0 < len(own_rows) < len(self.rows):
                    barred = (int(own_rows[0]), int(own_rows[-1]) + 1)
            found.append(self.rows[index.nearest(own, barred)[1].to(self.rows.device)].to(latent.dtype))
        nearest: Tensor = torch.stack(found).unflatten(1, latent.shape[2:]).permute(0, 3, 1, 2)
        return nearest


class ClusterGaussians(nn.Module):
    """`Gaussians` of the residuals of normal latents. Distances are computed on the CPU."""

    centres: Tensor  # [K, D] float32
    means: Tensor  # [K, D] float32
    whiteners: Tensor  # [K, D, D] float16

    def __init__(self, dimensions: int):
        super().__init__()
        self.register_buffer("centres", torch.zeros(0, dimensions))
        self.register_buffer("means", torch.zeros(0, dimensions))
        self.register_buffer("whiteners", torch.zeros(0, dimensions, dimensions, dtype=torch.float16))
        self._gaussians: list[Gaussians] = []  # in a list so that it is no part of the saved state

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of the buffers, because faiss's transforms cannot be copied."""
        return self.__dict__ | {"_gaussians": []}

    def fit(self, rebuilt: Tensor, residual: Tensor, owner: Tensor, seed: int) -> None:
        """Learn the residuals of rebuilt normal latents, both ``[N, D, h, w]``, of the photographs ``[N]``."""
        vectors, residuals = (_array(each.permute(0, 2, 3, 1).flatten(0, 2)) for each in (rebuilt, residual))
        images = owner.cpu().numpy().repeat(len(vectors) // len(rebuilt))
        with one_thread():
            found = fit_gaussians(vectors, residuals, images, seed)
        self.hold(*(torch.from_numpy(each).to(self.centres.device) for each in found))

    def hold(self, centres: Tensor, means: Tensor, whiteners: Tensor) -> None:
        """Hold copies of these ``[K, D]``, ``[K, D]`` and ``[K, D, D]`` and no others: tensors that were read keep their file open."""
        self.centres, self.means, self.whiteners = centres.clone(), means.clone(), whiteners.to(torch.float16, copy=True)
        self._gaussians = []

    def forward(self, rebuilt: Tensor, residual: Tensor) -> Tensor:
        """Distance ``[B, 1, h, w]`` of every cell's residual, both ``[B, D, h, w]``; about 1 where images are as those learnt."""
        if not self._gaussians:
            self._gaussians = [Gaussians(*(each.cpu().numpy() for each in (self.centres, self.means, self.whiteners)))]
        threads, found = torch.get_num_threads(), []  # one at inspection, see `gladad.core.threads.one_thread`
        for one, other in zip(rebuilt, residual, strict=True):
            found.append(self._gaussians[0].distances(_array(one.flatten(1).T), _array(other.flatten(1).T), threads))
        distances: Tensor = torch.from_numpy(np.stack(found)).to(rebuilt).unflatten(1, rebuilt.shape[2:])[:, None]
        return distances


class Index:
    """`VectorIndex` of tensors ``[M, D]``."""

    def __init__(self, rows: Tensor):
        with one_thread():  # the clusters' last digits may depend on their number; a search's result does not
            self.vectors = VectorIndex(_array(rows))

    def nearest(self, queries: Tensor, barred: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
        """Squared distance ``[Q]`` and number ``[Q]`` of the nearest vector to each of ``[Q, D]``, on the CPU."""
        threads = torch.get_num_threads()  # one at inspection, see `gladad.core.threads.one_thread`
        distances, numbers = self.vectors.nearest(_array(queries), barred, threads)
        return torch.from_numpy(distances), torch.from_numpy(numbers)


def _array(rows: Tensor) -> Any:
    return np.ascontiguousarray(rows.float().cpu().numpy())


def covering(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Numbers of at most ``size`` of the rows ``[N, D]`` that cover them: rare ones are not lost among many alike.

    Half are drawn at random and the rest with probability proportional to the squared distance to those: one round of k-means||
    (Bahmani et al., VLDB 2012), which needs one search where a greedy coreset needs ``size``.
    """
    order = torch.randperm(len(rows), generator=generator)
    if len(rows) <= size:
        return order
    first, rest = order[: size // 2], order[size // 2 :]
    weight = Index(rows[first]).nearest(rows[rest])[0] + 1e-12
    # the first arrivals of exponential races: a draw without replacement from any number of rows
    race = torch.empty_like(weight).exponential_(generator=generator) / weight
    return torch.cat([first, rest[race.topk(size - len(first), largest=False).indices]])
