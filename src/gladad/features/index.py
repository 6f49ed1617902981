"""The nearest of many vectors, by faiss. Without torch, for exported models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import faiss  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from numpy.typing import NDArray

PROBES = 4
"""Clusters searched for each vector, of as many as the square root of half the memory: within 2 % of the smallest squared distance."""
CLUSTERED = 2_000
"""Fewer vectors are one cluster."""
Array = NDArray[np.float32]
Numbers = NDArray[np.int64]

faiss.cvar.distance_compute_blas_threshold = 1  # queries from which on distances are a matrix product; faiss's 20 is slower here


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """Let faiss use so many threads. OpenMP keeps one number for each thread that calls, and torch may read the same: it is put back."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class VectorIndex:
    """The nearest of some vectors ``[M, D]``, by squared Euclidean distance.

    An inverted file, as `faiss.IndexIVFFlat`, but all queries of a cluster are compared with it in one matrix product: a third of the time.

    Args:
        vectors: Float32.
        centres: `centres` of an earlier index of the same vectors, which saves finding them.
    """

    def __init__(self, vectors: Array, centres: Array | None = None):
        clusters = int(math.sqrt(len(vectors) / 2)) if len(vectors) > CLUSTERED else 1
        self._coarse = faiss.IndexFlatL2(vectors.shape[1])
        with faiss_threads(1):
            if centres is not None:
                self._coarse.add(centres)
            elif clusters > 1:
                faiss.IndexIVFFlat(self._coarse, vectors.shape[1], clusters).train(vectors)
            else:
                self._coarse.add(vectors[:1])
            owner = self._coarse.search(vectors, 1)[1][:, 0]
        self._numbers: Numbers = owner.argsort(kind="stable")  # vectors of a cluster lie together, by rising numbers
        self._vectors = np.ascontiguousarray(vectors[self._numbers])
        self._starts: list[int] = owner[self._numbers].searchsorted(np.arange(clusters + 1)).tolist()

    @property
    def centres(self) -> Array:
        """Of the clusters ``[K, D]``."""
        found: Array = self._coarse.reconstruct_n(0, self._coarse.ntotal)
        return found

    def nearest(self, queries: Array, barred: tuple[int, int] = (0, 0), threads: int = 1) -> tuple[Array, Numbers]:
        """Squared distance ``[Q]`` and number ``[Q]`` of the nearest vector to each of ``[Q, D]``.

        Vectors with numbers from the first to below the second of ``barred`` are left out.
        """
        with faiss_threads(threads):
            clusters = self._coarse.search(queries, min(PROBES, self._coarse.ntotal))[1]
            distances, numbers = self._searched(queries, clusters, barred)
            lost = numbers < 0  # all vectors of the clusters searched are barred
            if lost.any():
                everywhere = np.tile(np.arange(self._coarse.ntotal), (int(lost.sum()), 1))
                distances[lost], numbers[lost] = self._searched(queries[lost], everywhere, barred)
        return distances, numbers

    def _searched(self, queries: Array, clusters: Numbers, barred: tuple[int, int]) -> tuple[Array, Numbers]:
        """The nearest in clusters ``[Q, P]``; infinitely far and of number -1 where these hold none."""
        wanted = clusters.ravel()
        order = wanted.argsort(kind="stable")  # queries of a cluster lie together
        asking, ends = queries[order // clusters.shape[1]], wanted[order].searchsorted(np.arange(self._coarse.ntotal + 1)).tolist()
        # a cluster has two parts where vectors in its midst are barred
        distances, places = np.full((2, len(order)), np.inf, np.float32), np.full((2, len(order)), -1)
        for cluster, (first, last) in enumerate(pairwise(ends)):
            if first == last:
                continue
            for side, (start, end) in enumerate(self._parts(cluster, barred)):
                own = [asking[first:last], self._vectors[start:end], distances[side, first:last], places[side, first:last]]
                asked, known, nearest, place = map(faiss.swig_ptr, own)
                # `faiss.knn` without what it does in Python, for which other threads would wait
                faiss.knn_L2sqr(asked, known, queries.shape[1], last - first, end - start, 1, nearest, place)
                own[3] += start
        found, place = (np.empty_like(each) for each in (distances, places))
        found[:, order], place[:, order] = distances, places  # by query again
        by_query = [each.reshape(2, *clusters.shape).swapaxes(0, 1).reshape(len(queries), 2 * clusters.shape[1]) for each in (found, place)]
        best = by_query[0].argmin(1)[:, None]
        nearest, place = (np.take_along_axis(each, best, 1)[:, 0] for each in by_query)
        return nearest, np.where(place < 0, -1, self._numbers[place])

    def _parts(self, cluster: int, barred: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Where the vectors of a cluster lie, without those barred."""
        start, end = self._starts[cluster : cluster + 2]
        first, last = (start + self._numbers[start:end].searchsorted(barred)).tolist() if barred[0] < barred[1] else (end, end)
        for part in ((start, first), (last, end)):
            if part[0] < part[1]:
                yield part
