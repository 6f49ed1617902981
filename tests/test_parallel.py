"""Threads: several images at once in order, one thread for each, tokens and signals that stop work."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gladad.core.errors import Interrupted
from gladad.core.threads import CancelToken, cancelled_by_signals, in_order, interrupted_by_sigterm, one_thread, side_by_side


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


@pytest.mark.parametrize("workers", [1, 3])
def test_a_cancelled_token_stops_between_items(workers: int) -> None:
    token = CancelToken()
    begun: list[int] = []

    def cancels_at_three(item: int) -> int:
        begun.append(item)
        if item == 3:
            token.cancel()
        return item

    results = in_order(cancels_at_three, range(100), workers, token)
    with pytest.raises(Interrupted) as stop:
        list(results)
    assert stop.value.signal == 0 and 3 in begun and len(begun) <= 3 + 2 * workers + 1
    assert token.cancelled and list(in_order(str, range(2), workers, CancelToken())) == ["0", "1"]
    with pytest.raises(Interrupted):
        next(in_order(str, range(2), workers, token))


# ------------------------------------------------------------------------------------------------ one thread for an image


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_new_thread(function: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


@pytest.mark.usefixtures("three_threads")
def test_overlapping_blocks_on_one_thread_leave_the_number_of_others_alone() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def late() -> tuple[int, int]:
        with one_thread():
            entered.set()
            assert may_leave.wait(10)
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    with ThreadPoolExecutor(1) as executor:
        with one_thread():
            other = executor.submit(late)
            assert entered.wait(10)
            with one_thread():
                pass
            assert torch.get_num_threads() == 1  # of the outer block still
            assert in_a_new_thread(torch.get_num_threads) == 3
        may_leave.set()
        assert other.result() == (1, 3)
    assert torch.get_num_threads() == in_a_new_thread(torch.get_num_threads) == 3


# --------------------------------------------------------------------------------------------------------------- signals

SIGNALLED = """
import signal, sys
from gladad.core.threads import CancelToken, cancelled_by_signals
token = CancelToken()
with cancelled_by_signals(token):
    for number in map(int, sys.argv[1:]):
        signal.raise_signal(number)
        print(token.cancelled, token.signal)
"""


@pytest.mark.parametrize(
    ("ignored", "sent", "printed"),
    [
        ("", [signal.SIGINT], "True 2"),
        ("", [signal.SIGTERM], "True 15"),
        ("trap '' INT; ", [signal.SIGINT, signal.SIGTERM], "False 0\nTrue 15"),
    ],
)
def test_signals_cancel_unless_they_are_ignored(ignored: str, sent: list[int], printed: str) -> None:
    command = ["bash", "-c", f'{ignored}exec "$@"', "", sys.executable, "-c", SIGNALLED, *map(str, map(int, sent))]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.stdout.strip(), done.returncode) == (printed, 0), done.stderr


def test_a_handler_that_is_not_pythons_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # as Python says of one that C has set
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with cancelled_by_signals(CancelToken()), interrupted_by_sigterm():
            assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_side_by_side_takes_a_thread_for_each_item() -> None:
    together = threading.Barrier(2, timeout=10)

    def meet(item: int) -> tuple[int, int]:
        together.wait()
        return item, torch.get_num_threads() if threading.current_thread() is not threading.main_thread() else 1

    assert side_by_side(meet, [3, 4], 2) == [(3, 1), (4, 1)]
    assert side_by_side(meet, [5, 6], 2) == [(5, 1), (6, 1)]  # by the same helper
    assert side_by_side(lambda item: item**2, range(5), 2) == [0, 1, 4, 9, 16]


def test_side_by_side_works_alone_beside_other_work() -> None:
    def threads_of(_: object) -> set[str]:
        return set(side_by_side(lambda _: threading.current_thread().name, range(3), 2))

    own = {threading.current_thread().name}
    assert set(side_by_side(lambda _: threading.current_thread().name, range(3), 1)) == own
    assert [len(names) for names in in_order(threads_of, range(4), 2)] == [2, 1, 1, 1]  # the first item has all cores
    inside = side_by_side(threads_of, range(2), 2)  # the helper is taken
    assert [len(names) for names in inside] == [1, 1] and inside[0] == own


def test_errors_of_side_by_side_are_raised_and_leave_it_usable() -> None:
    def fails_at_one(item: int) -> int:
        if item == 1:
            raise ValueError("item 1")
        return item

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(fails_at_one, range(3), 2)
    assert len(set(side_by_side(lambda _: threading.current_thread().name, range(2), 2))) == 2
