"""A team: threads that run every kernel together, each with a share of its units.

Every thread of a team calls the same kernels in the same order. A kernel's work is cut into units, claimed
one by one from a counter, so that a thread whose core is taken away delays the others by one unit only. The
counter and the barrier only ever grow: what belongs to which kernel follows from how far every thread knows
it has come.

``shared``: the address of SHARED_WORDS words, zero at first, that all threads of a team see. ``own``: int64
[OWN_WORDS] of one thread alone.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import fetch_add, load_acquire, now, pause, sleep_on, yield_core

SHARED_WORDS = 32
ARRIVALS = 0
CLAIMS = 128
NEVER = 256
"""Byte offsets into the shared words, each on cache lines of its own. Nobody wakes a sleeper on NEVER."""

OWN_WORDS = 8
INDEX, THREADS, MEETINGS, BASE, UNITS = range(5)

SPINS = 4000
YIELDS_FOR = 1_000_000
NAP = 50_000
"""A wait spins for some 20 us, yields the core for 1 ms, and then sleeps 50 us at a time (ns)."""


def new_own(index: int, threads: int) -> np.ndarray:
    """What thread ``index`` of a team of ``threads`` knows, at first."""
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
    """A barrier: return when every thread of the team has called it."""
    own[MEETINGS] += 1
    everybody = own[MEETINGS] * own[THREADS]
    if fetch_add(shared + ARRIVALS, 1) + 1 == everybody:
        return
    spins = 0
    begin = 0
    while load_acquire(shared + ARRIVALS) < everybody:
        spins += 1
        if spins < SPINS:
            pause()
        elif begin == 0:
            begin = now()
        elif now() - begin < YIELDS_FOR:
            yield_core()
        else:
            sleep_on(shared + NEVER, 0, NAP)
