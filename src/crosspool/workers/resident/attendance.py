"""Which threads of a team take part: those whose cores the team has to itself.

Where another process computes on a core, the thread there has half of it, in slices of some milliseconds, and
the team waits for it in every other slice. It is faster without. So the leader watches for whom the others
wait, and leaves out who costs more than he does. It calls him again when his core is free, and after a while
in any case: twice as long a while if nothing had changed.

Those left out are the last ones by index. Who is late gets the core of the last one that takes part, who is
left out on his; so nothing but cores is ever exchanged, and the leader may be the one who is late.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import MOST_CORES, move_thread, words
from crosspool.kernels.numba.team import OWN_WORDS, THREADS, take_late

WINDOW = 100_000_000
"""So much work (ns) is looked at together."""

CALM = 1_000_000_000
"""After so much work (ns) with nobody late all is as if it had never been otherwise."""

FIRST_PAUSE, LONGEST_PAUSE = 500_000_000, 8_000_000_000
"""How long (ns) a thread is left out the first time, and at most."""

ALL, BUSY, CALM_FOR, PAUSE, RETURN_AT = range(5)
PLACES = 8
PLACE_WORDS = 2
THREAD, CORE = range(PLACE_WORDS)
"""ALL threads there are; BUSY: work in this window; RETURN_AT: when all are called again. From word PLACES on
there are the THREAD (the system's number, 0 before it runs) and the CORE of each, -1 if it has several."""


def new_attendance(threads: int) -> np.ndarray:
    """The words of a team that all take part in."""
    state = np.zeros(PLACES + PLACE_WORDS * threads, np.int64)
    state[ALL], state[PAUSE] = threads, FIRST_PAUSE
    return state


def note_place(state: np.ndarray, index: int, thread: int, cores: frozenset[int]) -> None:
    """Thread ``index`` runs, as ``thread``, on these cores."""
    (core,) = cores if len(cores) == 1 and max(cores) < MOST_CORES else (-1,)
    at = PLACES + PLACE_WORDS * index
    state[at + CORE], state[at + THREAD] = core, thread


def core_of(state: np.ndarray, index: int) -> int:
    """The core on which thread ``index`` is now, -1 if it has several."""
    return int(state[PLACES + PLACE_WORDS * index + CORE])


def call_all_soon(state: np.ndarray) -> None:
    """Call all that are left out, from the next task on."""
    state[RETURN_AT] = 0


@kernel
def review(state_address, shared, own, time, span):
    """Leader, after a task that ended at ``time`` and took ``span`` (ns): set how many THREADS take part in
    the next one."""
    own_words, state = words(own, OWN_WORDS), words(state_address, PLACES)
    threads, everybody = own_words[THREADS], state[ALL]
    if threads < everybody and time >= state[RETURN_AT]:
        _forget(state, shared)
        own_words[THREADS] = everybody
        return
    state[BUSY] += span
    if threads == 1 or state[BUSY] < WINDOW:
        return
    worst, late = 0, 0
    for index in range(threads):
        waited = take_late(shared, index)
        if waited > late:
            worst, late = index, waited
    if late * (threads + 1) > state[BUSY]:
        own_words[THREADS] = threads - 1
        _exchange_cores(state_address, worst, threads - 1)
        state[CALM_FOR], state[RETURN_AT] = 0, time + state[PAUSE]
        state[PAUSE] = min(2 * state[PAUSE], LONGEST_PAUSE)
    elif threads == everybody:
        state[CALM_FOR] += state[BUSY]
        if state[CALM_FOR] > CALM:
            state[PAUSE] = FIRST_PAUSE
    state[BUSY] = 0


@inline
def _forget(state, shared):
    state[BUSY] = 0
    for index in range(state[ALL]):
        take_late(shared, index)


@inline
def _exchange_cores(state_address, one, other):
    if one == other:
        return
    state = words(state_address, PLACES + PLACE_WORDS * (other + 1))
    a, b = PLACES + PLACE_WORDS * one, PLACES + PLACE_WORDS * other
    if state[a + THREAD] == 0 or state[b + THREAD] == 0 or state[a + CORE] < 0 or state[b + CORE] < 0:
        return
    state[a + CORE], state[b + CORE] = state[b + CORE], state[a + CORE]
    move_thread(state[a + THREAD], state[a + CORE])
    move_thread(state[b + THREAD], state[b + CORE])
