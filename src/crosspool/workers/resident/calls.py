"""How a team's leader calls its members to a task, all of them or the first few.

A task has a meeting at its end, so the leader gives the next one only when all that were called have taken
this one: they may read its words at leisure. Others must not: they know from TASK alone that they are not
called, and sleep until they are (attendance.py says why).
"""

from __future__ import annotations

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import (
    fetch_add,
    full_fence,
    load_acquire,
    now,
    pause,
    sleep_on,
    store_release,
    wake_all,
    words,
    yield_core,
)
from crosspool.kernels.numba.team import ARRIVED, BASE, INDEX, OWN_WORDS, THREADS
from crosspool.workers.resident.control import (
    CALLED_BIT,
    MEMBERS_ASLEEP,
    RETURNS,
    TASK,
    TASK_ARRIVED,
    TASK_BASE,
    TASK_PART,
    TASK_SLOT,
    TASK_STAGE,
)

SPIN_FOR = 50_000
YIELD_FOR = 250_000
SLEEP_FOR = 1_000_000_000
"""A wait spins so long (ns), yields until so long after its begin, and then sleeps so long at a time."""

NOT_CALLED = -2

PAUSES = 4


@inline
def wait_a_little(begin):
    """Spin or yield. Returns False when it is time to sleep."""
    waited = now() - begin
    if waited < SPIN_FOR:
        for _ in range(PAUSES):
            pause()
    elif waited < YIELD_FOR:
        yield_core()
    return waited < YIELD_FOR


@kernel
def call(team, own, slot, stage, part):
    """Leader: let the members among its THREADS run this, too."""
    task, own_words = words(team, TASK_BASE + 1), words(own, OWN_WORDS)
    task[TASK_SLOT], task[TASK_STAGE], task[TASK_PART] = slot, stage, part
    task[TASK_ARRIVED], task[TASK_BASE] = own_words[ARRIVED], own_words[BASE]
    before, called = load_acquire(team + 8 * TASK), own_words[THREADS]
    store_release(team + 8 * TASK, called << CALLED_BIT | number_of(before) + 1)
    full_fence()
    if load_acquire(team + 8 * MEMBERS_ASLEEP) != 0:
        wake_all(team + 8 * TASK)
    if called > before >> CALLED_BIT:
        fetch_add(team + 8 * RETURNS, 1)
        wake_all(team + 8 * RETURNS)


@kernel
def await_call(team, own, taken, patience):
    """Member: wait for a task after number ``taken`` to which it is called. Returns its number, or NOT_CALLED
    if the last task is for others, after ``patience`` (ns)."""
    own_words = words(own, OWN_WORDS)
    begin = now()
    while True:
        returns = load_acquire(team + 8 * RETURNS)
        task = load_acquire(team + 8 * TASK)
        if number_of(task) == taken:
            if wait_a_little(begin):
                continue
            _sleep_until_task(team, task)
        elif task >> CALLED_BIT > own_words[INDEX]:
            what = words(team, TASK_BASE + 1)
            own_words[THREADS] = task >> CALLED_BIT
            own_words[ARRIVED], own_words[BASE] = what[TASK_ARRIVED], what[TASK_BASE]
            return number_of(task)
        elif now() - begin > patience:
            return NOT_CALLED
        else:
            sleep_on(team + 8 * RETURNS, returns, patience)
            continue
        begin = now()


@inline
def _sleep_until_task(team, seen):
    fetch_add(team + 8 * MEMBERS_ASLEEP, 1)
    full_fence()
    if load_acquire(team + 8 * TASK) == seen:
        sleep_on(team + 8 * TASK, seen, SLEEP_FOR)
    fetch_add(team + 8 * MEMBERS_ASLEEP, -1)


@inline
def number_of(task):
    """The number of a task, from TASK."""
    return task & ((1 << CALLED_BIT) - 1)
