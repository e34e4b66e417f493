"""Teams: every unit is done once, and nobody passes a meeting before all have come."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.intrinsics import address_of, fetch_add, now, sleep_on, words
from crosspool.kernels.numba.team import (
    INDEX,
    SHARED_WORDS,
    THREADS,
    UNITS,
    claim,
    meet,
    new_own,
    share,
    take_late,
    wait_for_all,
)

pytestmark = pytest.mark.backend

ROUNDS = 2000


@kernel
def count_units(shared, own, counts, seen):
    """In round r there are r % 7 units; unit u adds 1 to ``counts[r, u]``. After the meeting of a round every
    thread adds up what it sees of it."""
    for r in range(len(counts)):
        share(own, r % 7)
        unit = claim(shared, own)
        while unit >= 0:
            counts[r, unit] += 1
            unit = claim(shared, own)
        meet(shared, own)
        for unit in range(7):
            seen[r] += counts[r, unit]


@kernel
def count_arrivals(shared, own, arrived, late):
    """Every thread arrives, waits, and then must see all others' arrivals of this round."""
    for r in range(1, len(late) + 1):
        fetch_add(arrived, 1)
        wait_for_all(shared, own)
        late[r - 1] = r * own[1] - words(arrived, 1)[0]
        wait_for_all(shared, own)


def run_team(function: Callable[..., None], threads: int, *arguments: list[object]) -> None:
    """``arguments``: one list for each parameter after ``shared`` and ``own``, with an entry a thread."""
    shared = np.zeros(SHARED_WORDS, np.int64)
    members = [
        threading.Thread(
            target=function,
            args=(shared.ctypes.data, new_own(i, threads), *(own[i] for own in arguments)),
        )
        for i in range(threads)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_unit_is_done_once_before_anybody_goes_on(threads: int) -> None:
    counts = np.zeros((ROUNDS, 7), np.int64)
    seen = [np.zeros(ROUNDS, np.int64) for _ in range(threads)]
    run_team(count_units, threads, [counts] * threads, list(seen))
    for r in range(ROUNDS):
        assert counts[r].tolist() == [1] * (r % 7) + [0] * (7 - r % 7)
        assert all(own[r] == r % 7 for own in seen)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nobody_passes_a_barrier_early(threads: int) -> None:
    arrived = np.zeros(1, np.int64)
    late = [np.ones(ROUNDS, np.int64) for _ in range(threads)]
    run_team(count_arrivals, threads, [arrived.ctypes.data] * threads, list(late))
    assert not any(own.any() for own in late)


@kernel
def meet_late(shared, own, nap, late):
    """When all are there, meet, this thread after a nap; then note how long others have waited for each, and
    last how long all of it took."""
    wait_for_all(shared, own)
    begin = now()
    for _ in range(2):
        wait_for_all(shared, own)
    if own[INDEX] == 0:
        for index in range(own[THREADS]):
            take_late(shared, index)
    wait_for_all(shared, own)
    sleep_on(address_of(own) + 8 * UNITS, own[UNITS], nap)
    for _ in range(2):
        wait_for_all(shared, own)
    if own[INDEX] == 0:
        for index in range(own[THREADS]):
            late[index] = take_late(shared, index)
        late[own[THREADS]] = now() - begin
    wait_for_all(shared, own)


@pytest.mark.parametrize("naps", [(0, 0, 150), (0, 150, 0), (150, 0, 0), (50, 0, 150)])
def test_a_wait_counts_once_for_the_thread_that_comes_last(naps: tuple[int, ...]) -> None:
    late = np.zeros(4, np.int64)
    run_team(meet_late, 3, [1_000_000 * nap for nap in naps], [late] * 3)
    *waited, all_of_it = late.tolist()
    assert waited.index(max(waited)) == naps.index(max(naps))
    assert 0 < sum(waited) <= all_of_it
