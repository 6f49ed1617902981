"""The nearest of many vectors, searched by faiss. Without torch, for exported models."""

from __future__ import annotations

import math
from typing import Any

import faiss  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from numpy.typing import NDArray

PROBES = 4
"""Clusters searched for each vector, of as many as the square root of half the memory: within 2 % of the smallest squared distance."""
CLUSTERED = 2_000
"""Fewer vectors are searched one by one."""
Array = NDArray[np.float32]


class VectorIndex:
    """The nearest of some vectors ``[M, D]``, by squared Euclidean distance.

    Args:
        vectors: Float32.
        centres: `centres` of an earlier index of the same vectors, which saves finding them.
    """

    def __init__(self, vectors: Array, centres: Array | None = None):
        self._index: Any = faiss.IndexFlatL2(vectors.shape[1])
        self._clusters = int(math.sqrt(len(vectors) / 2)) if len(vectors) > CLUSTERED else 0
        if self._clusters:
            self._coarse = self._index  # faiss does not keep it alive
            faiss.omp_set_num_threads(1)
            if centres is not None:
                self._coarse.add(centres)
            self._index = faiss.IndexIVFFlat(self._coarse, vectors.shape[1], self._clusters)
            self._index.train(vectors)  # finds nothing to do where there are centres
        self._index.add(vectors)

    @property
    def centres(self) -> Array:
        """Of the clusters ``[K, D]``; none where vectors are searched one by one."""
        found: Array = self._coarse.reconstruct_n(0, self._clusters) if self._clusters else np.empty((0, self._index.d), np.float32)
        return found

    def nearest(self, queries: Array, barred: tuple[int, int] = (0, 0), threads: int = 1) -> tuple[Array, NDArray[np.int64]]:
        """Squared distance ``[Q]`` and number ``[Q]`` of the nearest vector to each of ``[Q, D]``.

        Vectors with numbers from the first to below the second of ``barred`` are left out.
        """
        faiss.omp_set_num_threads(threads)
        others = faiss.IDSelectorNot(faiss.IDSelectorRange(*barred)) if barred[0] < barred[1] else None
        distances, numbers = self._searched(queries, others, PROBES)
        lost = numbers < 0  # all vectors of the clusters searched are barred
        if lost.any():
            distances[lost], numbers[lost] = self._searched(queries[lost], others, self._clusters)
        return distances, numbers

    def _searched(self, vectors: Array, others: Any, probes: int) -> tuple[Any, Any]:
        kind: Any = faiss.SearchParametersIVF if self._clusters else faiss.SearchParameters
        parameters = kind(sel=others, nprobe=probes) if self._clusters else kind(sel=others)
        distances, numbers = self._index.search(vectors, 1, params=parameters)
        return distances[:, 0], numbers[:, 0]
