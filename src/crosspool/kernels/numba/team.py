"""A team: threads that run every kernel together, each with a share of its units.

The threads that take part call the same kernels in the same order. A kernel's work is cut into units, claimed
one by one from a counter, so that a thread whose core is taken away delays the others by one unit only. The
counter and the barrier only ever grow: what belongs to which kernel follows from how far every thread knows
it has come. Between kernels a thread may stay away, and come back with what those who stayed know.

``shared``: the address of SHARED_WORDS words, zero at first, that all threads of a team see. ``own``: int64
[OWN_WORDS] of one thread alone.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import (
    exchange,
    fetch_add,
    full_fence,
    load_acquire,
    now,
    pause,
    sleep_on,
    store_release,
    wake_all,
)

MOST_THREADS = 256
ARRIVALS = 0
CLAIMS = 128
SLEEPERS = 256
WAITING_SINCE = 264
LATE = 384
"""Byte offsets into the shared words; what is written often is on cache lines of its own. WAITING_SINCE is
when (ns) one of the SLEEPERS came. From LATE on there is a word for each thread: how long others have waited
for it."""

SHARED_WORDS = LATE // 8 + MOST_THREADS

OWN_WORDS = 8
INDEX, THREADS, ARRIVED, BASE, UNITS = range(5)
"""THREADS take part: those of a lower INDEX than that. ARRIVED is what ARRIVALS is when all have met as often
as this thread has, BASE what CLAIMS is when the kernel begins."""

SPINS = 64
SPIN_FOR = 200_000
SLEEP_FOR = 1_000_000_000
"""A wait spins without a look at the clock, then for so long (ns), and then sleeps until the last one comes.
It never yields: on a core that others want, that costs a whole time slice of theirs."""


def new_own(index: int, threads: int) -> np.ndarray:
    """What thread ``index`` of a team of ``threads`` knows, at first."""
    if not 0 <= index < threads <= MOST_THREADS:
        raise ValueError(f"thread {index} of {threads}: a team has {MOST_THREADS} threads at most")
    own = np.zeros(OWN_WORDS, np.int64)
    own[INDEX], own[THREADS] = index, threads
    return own


@inline
def share(own, units):
    """Begin a kernel of ``units`` units. Every thread of the team says the same number."""
    own[UNITS] = units


@inline
def claim(shared, own):
    """The next unit for this thread, or -1 when all are taken."""
    unit = fetch_add(shared + CLAIMS, 1) - own[BASE]
    return unit if unit < own[UNITS] else -1


@inline
def meet(shared, own):
    """End a kernel: return when every unit is done and seen by all. Each thread has had one claim refused."""
    own[BASE] += own[UNITS] + own[THREADS]
    wait_for_all(shared, own)


@kernel
def wait_for_all(shared, own):
    """A barrier: return when every thread that takes part has called it."""
    own[ARRIVED] += own[THREADS]
    everybody = own[ARRIVED]
    if fetch_add(shared + ARRIVALS, 1) + 1 == everybody:
        full_fence()
        if load_acquire(shared + SLEEPERS) != 0:
            waited = now() - load_acquire(shared + WAITING_SINCE)
            fetch_add(shared + LATE + 8 * own[INDEX], waited)
            wake_all(shared + ARRIVALS)
        return
    for _ in range(SPINS):
        if load_acquire(shared + ARRIVALS) >= everybody:
            return
        pause()
    _wait_long(shared, everybody)


@kernel
def _wait_long(shared, everybody):
    begin = now()
    while now() - begin < SPIN_FOR:
        if load_acquire(shared + ARRIVALS) >= everybody:
            return
        pause()
    store_release(shared + WAITING_SINCE, begin)
    while load_acquire(shared + ARRIVALS) < everybody:
        fetch_add(shared + SLEEPERS, 1)
        full_fence()
        arrived = load_acquire(shared + ARRIVALS)
        if arrived < everybody:
            sleep_on(shared + ARRIVALS, arrived, SLEEP_FOR)
        fetch_add(shared + SLEEPERS, -1)


@inline
def take_late(shared, index):
    """How long (ns) others have waited for a thread since this was last asked: waits that ended in sleep, for
    the one that came last."""
    return exchange(shared + LATE + 8 * index, 0)
