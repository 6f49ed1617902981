"""How unusual a residual is where it is found. Without torch, for exported models.

What a residual means depends on what it is a residual of: a smooth surface is rebuilt almost exactly, an edge or a grain never is. Normal
vectors are divided into clusters, and each cluster has a Gaussian of the residuals of its vectors. PaDiM (Defard et al., ICPR 2021) has a
Gaussian of the features for each place of the image, which needs parts that lie still.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import faiss  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from numpy.typing import NDArray

from gladad.features.index import faiss_threads

Array = NDArray[np.float32]

CLUSTERS = 256
PER_DIMENSION = 10
"""Vectors of a cluster for each dimension, on average, at least: where there are fewer, there are fewer clusters."""
SAMPLED = 64
"""Vectors per cluster that the clusters are found with."""
IMAGES = 20
"""That the mean covariance counts as, beside a cluster's own."""
RIDGE, TINY = 0.01, 1e-6
"""Of the mean variance within clusters, and at least: added to all, because directions without any variance must not decide."""


class Gaussians:
    """A Gaussian of residuals for each cluster of vectors.

    Args:
        centres: ``[K, D]`` float32, of the clusters.
        means: ``[K, D]`` of the residuals in each.
        whiteners: ``[K, D, D]``, the inverse of the Cholesky factor of their covariance.
    """

    def __init__(self, centres: Array, means: Array, whiteners: NDArray[np.floating[Any]]):
        dimensions = centres.shape[1]
        self._coarse = faiss.IndexFlatL2(dimensions)
        self._coarse.add(np.ascontiguousarray(centres, np.float32))
        self._maps = []
        for mean, whitener in zip(means.astype(np.float32), whiteners.astype(np.float32), strict=True):
            whitening = faiss.LinearTransform(dimensions, dimensions, True)
            faiss.copy_array_to_vector(whitener.ravel(), whitening.A)
            faiss.copy_array_to_vector(-whitener @ mean, whitening.b)
            whitening.is_trained = True
            self._maps.append(whitening)

    def distances(self, vectors: Array, residuals: Array, threads: int = 1) -> Array:
        """Mahalanobis distance ``[Q]`` over the root of D, of residuals ``[Q, D]`` in the clusters of the vectors ``[Q, D]``."""
        assert residuals.shape[1] == self._coarse.d, residuals.shape  # read by their addresses below
        with faiss_threads(threads):
            cluster = self._coarse.search(vectors, 1)[1][:, 0]
            order = cluster.argsort(kind="stable")  # those of a cluster lie together
            ends = cluster[order].searchsorted(np.arange(len(self._maps) + 1)).tolist()
            ordered, white = residuals[order], np.full(residuals.shape, np.nan, np.float32)  # what is not finite has no cluster
            for whitening, (first, last) in zip(self._maps, pairwise(ends), strict=True):
                if first < last:
                    own, to = faiss.swig_ptr(ordered[first:last]), faiss.swig_ptr(white[first:last])
                    whitening.apply_noalloc(last - first, own, to)  # type: ignore[attr-defined, unused-ignore]
        found = np.empty(len(vectors), np.float32)
        found[order] = np.sqrt(np.square(white).mean(1))
        return found


def fit_gaussians(vectors: Array, residuals: Array, images: NDArray[np.integer[Any]], seed: int) -> tuple[Array, Array, Array]:
    """Centres ``[K, D]``, means ``[K, D]`` and whiteners ``[K, D, D]`` for `Gaussians`, from normal images.

    The covariance of a cluster is drawn towards the mean one within clusters, the more so the fewer images it is from. Images are counted,
    not vectors: those of an image vary together, with its light and its shadows, so a few images say little of the next one however
    many vectors they have.

    Args:
        vectors: ``[N, D]`` float32, N >= 1.
        residuals: Those of these vectors, likewise.
        images: ``[N]`` number of the image that each is of.
        seed: Of the clusters.
    """
    count, dimensions = vectors.shape
    clusters = max(1, min(CLUSTERS, count // (PER_DIMENSION * dimensions)))
    search = faiss.Kmeans(dimensions, clusters, niter=10, seed=1 + seed % 2**30, max_points_per_centroid=SAMPLED, min_points_per_centroid=1)
    with faiss_threads(1):
        search.train(vectors)
        cluster = search.index.search(vectors, 1)[1][:, 0]
    means, scatters = np.zeros((clusters, dimensions), np.float32), np.zeros((clusters, dimensions, dimensions))
    seen = np.zeros((clusters, 1, 1))  # images of each cluster
    for number in range(clusters):
        members = cluster == number
        own = residuals[members]
        if len(own):
            means[number] = own.mean(0)
            scatters[number] = (own - means[number]).T @ (own - means[number])
            seen[number] = len(np.unique(images[members]))
    within = scatters.sum(0) / count
    ridge = max(RIDGE * within.diagonal().mean(), TINY) * np.eye(dimensions)
    sizes = np.bincount(cluster, minlength=clusters).clip(1)[:, None, None]
    covariances = (seen * (scatters / sizes) + IMAGES * within) / (seen + IMAGES) + ridge
    return np.array(search.centroids, np.float32), means, np.linalg.inv(np.linalg.cholesky(covariances)).astype(np.float32)
