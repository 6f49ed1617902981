"""Several at once, in order."""

from __future__ import annotations

import threading
import time

import pytest

from gladad.core.threads import in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 * (item % 3 == 1))
        return item * item

    assert list(in_order(slow_first, range(12), workers)) == [item * item for item in range(12)]
    assert list(in_order(slow_first, [], workers)) == []


def test_two_workers_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def meet(item: int) -> int:
        if item:  # the first item runs alone
            meeting.wait()
        return item

    assert list(in_order(meet, range(5), 2)) == list(range(5))


def test_items_are_taken_as_there_is_room() -> None:
    taken = []

    def items():
        for item in range(100):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 3 + 2 * 2
    results.close()
    assert len(taken) <= 3 + 2 * 2


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_at_its_turn(workers: int) -> None:
    def fails_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(fails_at_three, range(10), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
