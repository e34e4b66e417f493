"""Who takes part: a thread that others wait for is left out, on the core where it is late, for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from crosspool.kernels.numba.team import LATE, SHARED_WORDS, THREADS, new_own
from crosspool.workers.resident.attendance import (
    CALM,
    CORE,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PLACE_WORDS,
    PLACES,
    WINDOW,
    call_all_soon,
    new_attendance,
    note_place,
    review,
)

pytestmark = pytest.mark.backend


class Team:
    """A team without threads: tasks of half a window each, in which others wait for some."""

    def __init__(self, threads: int) -> None:
        self.state, self.own = new_attendance(threads), new_own(0, threads)
        self.shared = np.zeros(SHARED_WORDS, np.int64)
        self.time = 0

    def work(self, shares: Sequence[float] = (), span: int = WINDOW // 2) -> int:
        """A task in which thread i was waited for during ``shares[i]`` of it. Returns who takes part then."""
        self.time += span
        for index, share in enumerate(shares):
            self.shared[LATE // 8 + index] += int(share * span)
        state, shared, own = (array.ctypes.data for array in (self.state, self.shared, self.own))
        review(state, shared, own, self.time, span)
        return int(self.own[THREADS])

    def cores(self) -> list[int]:
        return self.state[PLACES + CORE :: PLACE_WORDS].tolist()


def test_who_costs_more_than_he_does_is_left_out() -> None:
    """Without one of n threads work takes n / (n - 1) times as long at most, about."""
    for threads in (2, 3, 8):
        bound = 1 / (threads + 1)
        team = Team(threads)
        assert [team.work([0, bound - 0.01]) for _ in range(10)] == [threads] * 10
        assert [team.work([0, bound + 0.01]) for _ in range(2)] == [threads, threads - 1]


def test_the_last_one_alone_is_never_left_out() -> None:
    team = Team(2)
    assert [team.work([0.9]) for _ in range(4)] == [2, 1, 1, 1]


def test_all_are_called_again_and_each_time_later_while_nothing_changes() -> None:
    team, pauses = Team(2), []
    for _ in range(7):
        while team.work([0, 0.9]) == 2:
            pass
        left = team.time
        while team.work() == 1:
            pass
        pauses.append(team.time - left)
    expected = [min(FIRST_PAUSE * 2**i, LONGEST_PAUSE) for i in range(7)]
    assert pauses == pytest.approx(expected, abs=WINDOW)


def test_after_a_calm_time_the_first_pause_is_short_again() -> None:
    team = Team(2)
    for _ in range(4):
        while team.work([0, 0.9]) == 2:
            pass
        while team.work() == 1:
            pass
    for _ in range(2 * CALM // WINDOW + 2):
        assert team.work() == 2
    while team.work([0, 0.9]) == 2:
        pass
    left = team.time
    while team.work() == 1:
        pass
    assert team.time - left == pytest.approx(FIRST_PAUSE, abs=WINDOW)


def test_a_thread_whose_core_is_free_is_called_from_the_next_task_on() -> None:
    team = Team(2)
    while team.work([0, 0.9]) == 2:
        pass
    call_all_soon(team.state)
    assert team.work() == 2


def test_what_was_late_before_a_return_does_not_count() -> None:
    team = Team(3)
    while team.work([0, 0.9]) == 3:
        pass
    while team.work([0, 0, 0.24]) == 2:
        pass
    assert [team.work() for _ in range(2)] == [3, 3]


@pytest.fixture
def threads() -> Iterator[list[int]]:
    """The system's numbers of three threads that wait."""
    over, started, numbers = threading.Event(), threading.Barrier(4), []

    def wait() -> None:
        numbers.append(threading.get_native_id())
        started.wait()
        over.wait()

    members = [threading.Thread(target=wait) for _ in range(3)]
    for member in members:
        member.start()
    started.wait()
    yield numbers
    over.set()
    for member in members:
        member.join()


def test_the_late_one_gets_the_core_of_the_last_one(threads: list[int]) -> None:
    """Cores may be one and the same here; where there are two, it is the system that is asked."""
    low, high = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    cores = [low, low, high]
    team = Team(3)
    for index, (thread, core) in enumerate(zip(threads, cores, strict=True)):
        os.sched_setaffinity(thread, {core})
        note_place(team.state, index, thread, frozenset({core}))
    while team.work([0.9]) == 3:
        pass
    moved = [high, low, low]
    assert team.cores() == moved
    assert [os.sched_getaffinity(thread) for thread in threads] == [{core} for core in moved]
    while team.work([0, 0.9]) == 2:
        pass
    assert team.cores() == moved


def test_a_thread_without_a_core_of_its_own_stays_where_it_is(threads: list[int]) -> None:
    team = Team(3)
    note_place(team.state, 0, threads[0], frozenset({0, 1}))
    note_place(team.state, 2, threads[2], frozenset({1}))
    while team.work([0.9]) == 3:
        pass
    assert team.cores() == [-1, 0, 1]
