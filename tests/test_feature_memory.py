"""What is kept of normal latents: the memory, its search, what it leaves out and how it is chosen; and the Gaussians of residuals."""

from __future__ import annotations

from copy import deepcopy

import faiss
import numpy as np
import pytest
import torch

from gladad.features import gaussians
from gladad.features.index import CLUSTERED, VectorIndex
from gladad.features.memory import ClusterGaussians, Index, Memory, covering


def vectors(count: int, dimensions: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [50, 3 * CLUSTERED])
def test_the_search_finds_the_nearest_or_nearly(count: int) -> None:
    rows, queries = vectors(count), vectors(200, seed=1)
    exact = torch.cdist(queries, rows).square().amin(1)
    found, numbers = Index(rows).nearest(queries)
    torch.testing.assert_close(found, (queries - rows[numbers]).square().sum(1), rtol=1e-4, atol=1e-4)
    if count < CLUSTERED:
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert float((found - exact).mean() / exact.mean()) < 0.25  # noise without any structure is the hardest case
    assert torch.equal(Index(rows).nearest(queries)[1], numbers)


@pytest.mark.parametrize("each", [10, CLUSTERED])
def test_an_image_is_not_shown_its_own_vectors(each: int) -> None:
    memory = Memory(4)
    rows, owner = vectors(3 * each, 4), torch.arange(3).repeat_interleave(each)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    memory.remember(rows[order], owner[order])
    latent = rows[: 2 * each].unflatten(0, (2, each, 1)).permute(0, 3, 1, 2)
    assert torch.equal(memory(latent), latent.half().float())  # everything knows itself
    others = memory(latent, torch.tensor([0, 1]))
    for number in range(2):
        allowed = rows[owner != number].half().float()
        shown = others[number, :, :, 0].T
        assert (torch.cdist(shown, allowed).amin(1) < 1e-3).all()


def test_of_one_image_there_is_nothing_to_leave_out() -> None:
    memory = Memory(4)
    memory.remember(vectors(20, 4), torch.zeros(20))
    latent = vectors(20, 4).view(1, 20, 1, 4).permute(0, 3, 1, 2)
    assert torch.equal(memory(latent, torch.tensor([0])), memory(latent))


def test_rare_vectors_are_not_lost_among_many_alike() -> None:
    rows = torch.cat([vectors(5000) * 0.1, vectors(40, seed=3) + 20])
    for seed in range(3):
        kept = covering(rows, 400, torch.Generator().manual_seed(seed))
        assert len(kept.unique()) == 400
        assert int((kept >= 5000).sum()) > 30  # a random choice of 400 would hold three of the 40
    assert covering(rows[:10], 400, torch.Generator()).sort().values.tolist() == list(range(10))


def test_an_index_and_gaussians_leave_the_number_of_threads_as_it_was() -> None:
    """Faiss and torch may share one OpenMP: a training that follows must not be left with a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        index = Index(torch.randn(CLUSTERED + 10, 8))
        index.nearest(torch.randn(5, 8))
        ClusterGaussians(8).fit(torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5), torch.arange(2), seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_of_one_cluster_the_distance_is_that_of_mahalanobis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussians, "RIDGE", 0.0)
    made = vectors(70, 8).numpy() @ vectors(8, 8, seed=3).numpy() + 2
    centres, means, whiteners = gaussians.fit_gaussians(vectors(70, 8, seed=1).numpy(), made, np.arange(70) // 7, seed=0)
    assert len(centres) == 1  # of 10 vectors for each of 8 dimensions
    found = gaussians.Gaussians(centres, means, whiteners).distances(vectors(5, 8, seed=2).numpy(), made[:5])
    scatter = (made - made.mean(0)).T @ (made - made.mean(0))
    covariance = scatter / 70 + gaussians.TINY * np.eye(8)
    centred = made[:5] - made.mean(0)
    np.testing.assert_allclose(found, np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred) / 8), rtol=1e-3)


def test_the_same_residual_counts_more_where_residuals_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussians, "CLUSTERS", 2)  # so that each is seen in many images
    sides, count = torch.tensor([-5.0, 5.0]), 4000
    side = torch.arange(count) % 2
    rebuilt = sides[side][:, None] + vectors(count, 4)
    residual = vectors(count, 4, seed=1) * torch.tensor([0.1, 1.0])[side][:, None]
    found = ClusterGaussians(4)
    found.fit(*(rows.reshape(400, 10, 1, 4).permute(0, 3, 1, 2) for rows in (rebuilt, residual)), torch.arange(400), seed=0)
    distance = found(sides.view(1, 1, 1, 2).expand(1, 4, 1, 2), torch.full((1, 4, 1, 2), 0.5))[0, 0, 0]
    assert float(distance[0]) > 4 * float(distance[1])
    usual = found(*(rows.T.reshape(1, 4, 40, 100) for rows in (rebuilt, residual)))
    small, large = (float(usual.flatten()[side == number].square().mean()) for number in (0, 1))
    assert small < large == pytest.approx(1, abs=0.05)  # the mean covariance of all clusters is part of that of each


@pytest.mark.parametrize(("images", "own"), [(1, 1 / 21), (60, 60 / 80)])
def test_few_images_say_little_of_a_cluster_however_many_cells_they_have(images: int, own: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussians, "CLUSTERS", 2)
    side, cells = np.arange(4000) % 2, np.arange(4000) // 2
    rebuilt = np.array([[-50.0], [50.0]], np.float32)[side] + vectors(4000, 4).numpy()
    residual = np.array([[0.1], [1.0]], np.float32)[side] * vectors(4000, 4, seed=1).numpy()
    centres, _, whiteners = gaussians.fit_gaussians(rebuilt, residual, cells * images // 2000, seed=0)
    variance = np.square(np.linalg.inv(whiteners)).sum(2)[centres[:, 0] < 0].mean()
    mean = (0.01 + 1) / 2
    assert variance == pytest.approx(own * 0.01 + (1 - own) * mean + gaussians.RIDGE * mean, rel=0.05)


def test_copies_of_a_photograph_count_once() -> None:
    rebuilt, residual = (vectors(400, 4, seed=seed).reshape(4, 10, 10, 4).permute(0, 3, 1, 2) for seed in (0, 1))
    two, four = ClusterGaussians(4), ClusterGaussians(4)
    two.fit(rebuilt, residual, torch.tensor([0, 0, 1, 1]), seed=0)
    four.fit(rebuilt, residual, torch.arange(4), seed=0)
    nearer = [each.whiteners.float().std(0).mean() for each in (two, four)]
    assert len(two.centres) > 1 and 0 < float(nearer[0]) < float(nearer[1])  # to the mean of all clusters


def test_residuals_without_any_variance_have_finite_distances() -> None:
    flat = torch.zeros(2, 4, 3, 3)
    found = ClusterGaussians(4)
    found.fit(flat, flat, torch.arange(2), seed=0)
    assert found(flat, flat).eq(0).all() and found(flat, flat + 1).isfinite().all()


def test_what_is_not_finite_has_no_distance() -> None:
    """Any number would be taken for a judgement."""
    rebuilt, residual = vectors(400, 4).T.reshape(1, 4, 20, 20), vectors(400, 4, seed=1).T.reshape(1, 4, 20, 20)
    found = ClusterGaussians(4)
    found.fit(rebuilt, residual, torch.arange(1), seed=0)
    before = found(rebuilt, residual)
    broken = rebuilt.clone()
    broken[0, :, 3, 5] = torch.nan
    after = found(broken, residual)
    assert after.isnan().nonzero().tolist() == [[0, 0, 3, 5]]
    rest = after.isfinite()
    torch.testing.assert_close(after[rest], before[rest])


def test_gaussians_in_use_can_be_copied() -> None:
    rebuilt, residual = (vectors(400, 4, seed=seed).T.reshape(1, 4, 20, 20) for seed in (0, 1))
    found = ClusterGaussians(4)
    found.fit(rebuilt, residual, torch.arange(1), seed=0)
    before = found(rebuilt, residual)
    copy = deepcopy(found)
    assert torch.equal(copy(rebuilt, residual), before)
    copy.fit(rebuilt, 2 * residual, torch.arange(1), seed=0)
    assert torch.equal(found(rebuilt, residual), before) and not torch.equal(copy(rebuilt, residual), before)


def test_distances_depend_on_the_image_alone() -> None:
    rebuilt, residual = (vectors(3 * 200, 6, seed=seed).reshape(3, 20, 10, 6).permute(0, 3, 1, 2) for seed in (0, 1))
    found = ClusterGaussians(6)
    found.fit(rebuilt, residual, torch.arange(3), seed=0)
    together = found(rebuilt, residual)
    assert len(found.centres) > 1
    assert all(torch.equal(found(rebuilt[i : i + 1], residual[i : i + 1])[0], together[i]) for i in range(3))


def test_a_search_leaves_the_number_of_threads_to_others() -> None:
    """torch reads the number that faiss sets, and would work on one thread from then on."""
    own, before = vectors(3000, 4).numpy(), faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        VectorIndex(own).nearest(own[:5])
        found = gaussians.Gaussians(*gaussians.fit_gaussians(own, own, np.arange(3000) // 100, seed=0))
        found.distances(own[:5], own[:5])
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
