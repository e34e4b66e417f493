"""Each step of the protocol of control.py as one compiled function. Addresses are of slots, teams, words."""

from __future__ import annotations

from crosspool.core.token_record import RECORD_WORDS
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import (
    exchange,
    fetch_add,
    full_fence,
    load_acquire,
    sleep_on,
    store_release,
    wake_all,
    words,
    write_file,
)
from crosspool.workers.resident.control import (
    ASLEEP,
    BELL,
    ENGINE_ASLEEP,
    EVENT_DELIVERED,
    EVENT_KIND,
    EVENT_MADE,
    EVENT_REQUEST,
    EVENT_ROW,
    EVENT_SLOT,
    EVENT_TOKEN,
    EVENT_WORDS,
    EVENTS_READ,
    EVENTS_WRITTEN,
    NEWS,
    NO_REQUEST,
    PARTS_DONE,
    POSITION,
    RETIRED,
    RING_EVENTS,
    STAGE_BITS,
    STOP,
    TOKENS_TO,
)

FULL_RING_NAP = 100_000
"""How long a team sleeps at a time (ns) when the engine's thread does not fetch its events."""


# -- micro-batches -------------------------------------------------------------------------------------------


@kernel
def submit(slot, sequence, team):
    """Engine's thread: a free slot's descriptor is filled; offer its first stage to an attention team."""
    store_release(slot + 8 * POSITION, sequence << STAGE_BITS)
    ring_bell(team)


@inline
def position_of(slot):
    """The slot's position if it holds a micro-batch that has not retired, else -1."""
    position = load_acquire(slot + 8 * POSITION)
    return position if position >> STAGE_BITS > load_acquire(slot + 8 * RETIRED) else -1


@inline
def is_last_part(slot, parts):
    """A team is done with its part of a stage of so many: whether all are done now, and their results seen.
    Then this team says what comes next."""
    if parts == 1:
        return True
    if fetch_add(slot + 8 * PARTS_DONE, 1) + 1 < parts:
        return False
    exchange(slot + 8 * PARTS_DONE, 0)
    return True


@inline
def hand_over(slot, stage):
    """The team that ran the stage before: let the next stage's teams see it and all that was written. Their
    bells are rung after this."""
    sequence = load_acquire(slot + 8 * POSITION) >> STAGE_BITS
    store_release(slot + 8 * POSITION, sequence << STAGE_BITS | stage)


@inline
def retire(slot):
    """The team that ended the micro-batch, after its last event: the slot is free from here on."""
    store_release(slot + 8 * RETIRED, load_acquire(slot + 8 * POSITION) >> STAGE_BITS)


# -- bells ---------------------------------------------------------------------------------------------------


@kernel
def ring_bell(team):
    """Give a team's leader a reason to look for a task."""
    fetch_add(team + 8 * BELL, 1)
    full_fence()
    if load_acquire(team + 8 * ASLEEP) != 0:
        wake_all(team + 8 * BELL)


@inline
def await_bell(team, heard, timeout):
    """Leader: sleep until the bell has rung since it was ``heard`` so often, or for ``timeout`` ns."""
    exchange(team + 8 * ASLEEP, 1)
    if load_acquire(team + 8 * BELL) == heard:
        sleep_on(team + 8 * BELL, heard, timeout)
    exchange(team + 8 * ASLEEP, 0)


# -- events --------------------------------------------------------------------------------------------------


@inline
def send_event(control, team, ring, kind, request, token, slot_index, row, made):
    """Leader: put an event into its team's ring; if that is full, wait for the engine's thread.

    A token of a request that may go into the pipe is written there first. Returns whether the pipe has it: a
    full one is not waited for. If not, there is news for the engine's thread.
    """
    written = load_acquire(team + 8 * EVENTS_WRITTEN)
    while written - load_acquire(team + 8 * EVENTS_READ) >= RING_EVENTS:
        if load_acquire(control + 8 * STOP) != 0:
            return False
        ring_news(control)
        sleep_on(team + 8 * EVENTS_READ, load_acquire(team + 8 * EVENTS_READ), FULL_RING_NAP)
    event = words(ring + 8 * EVENT_WORDS * (written % RING_EVENTS), EVENT_WORDS)
    event[EVENT_KIND], event[EVENT_REQUEST], event[EVENT_TOKEN] = kind, request, token
    event[EVENT_SLOT], event[EVENT_ROW], event[EVENT_MADE] = slot_index, row, made
    delivered = False
    if request != NO_REQUEST:
        size = 8 * RECORD_WORDS
        pipe = words(control, TOKENS_TO + 1)[TOKENS_TO]
        delivered = write_file(pipe, ring + 8 * EVENT_WORDS * (written % RING_EVENTS), size) == size
    event[EVENT_DELIVERED] = delivered
    store_release(team + 8 * EVENTS_WRITTEN, written + 1)
    return delivered


@kernel
def ring_news(control):
    """Give the engine's thread a reason to poll."""
    fetch_add(control + 8 * NEWS, 1)
    full_fence()
    if load_acquire(control + 8 * ENGINE_ASLEEP) != 0:
        wake_all(control + 8 * NEWS)


@kernel
def await_news(control, seen, timeout):
    """Engine's thread: sleep until there is news since ``seen``, or for ``timeout`` ns. Returns the count of
    news now."""
    exchange(control + 8 * ENGINE_ASLEEP, 1)
    if load_acquire(control + 8 * NEWS) == seen:
        sleep_on(control + 8 * NEWS, seen, timeout)
    exchange(control + 8 * ENGINE_ASLEEP, 0)
    return load_acquire(control + 8 * NEWS)


@kernel
def read_word(address):
    """For the engine's thread: a word, and everything that was written before it was released."""
    return load_acquire(address)


@kernel
def write_word(address, value):
    """For the engine's thread: release a word."""
    store_release(address, value)
