"""The memory of normal latents: its search, what it leaves out, and how it is chosen."""

from __future__ import annotations

import pytest
import torch

from gladad.features.index import CLUSTERED
from gladad.features.memory import Index, Memory, covering


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


def test_an_index_leaves_the_number_of_threads_as_it_was() -> None:
    """Faiss and torch may share one OpenMP: a training that follows must not be left with a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        index = Index(torch.randn(CLUSTERED + 10, 8))
        index.nearest(torch.randn(5, 8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
