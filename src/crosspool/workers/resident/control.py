"""The words through which the engine's thread and the teams speak: layout, and who writes what when.

All are int64 in one block of memory. What several threads write at once is on cache lines of its own.

The engine's thread **submits** a micro-batch: it fills a free slot's descriptor, and then releases its
POSITION. A position is ``sequence << STAGE_BITS | stage``: sequence numbers of submitted micro-batches and
the stages of one only ever grow, so a position never comes back and one word tells which micro-batch a slot
holds and how far it is. Whoever has run a stage releases the next position, which hands the hidden states to
the team whose stage that is. The team that ends a micro-batch sends its last event, and then releases the
slot's RETIRED as the micro-batch's sequence. Only then is the slot free: a counter of all retired
micro-batches would free slots of those that still run. tests/workers/resident/test_protocol_model.py
explores all orders of these steps.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from crosspool.core.token_record import RECORD_WORDS, TOKEN_RECORD

LINE = 8
"""Words of a cache line."""

STAGE_BITS = 24

# -- one slot: SLOT_WORDS words ------------------------------------------------------------------------------
SLOT_WORDS = 8 * LINE

# The descriptor, 64 bytes, written by the engine's thread while the slot is free.
MODEL, PHASE, TEAM, INTERVAL, LAYER_COST, STEPS, BODY, HAS_HEAD = range(8)

POSITION = 1 * LINE
RETIRED = 2 * LINE
PARTS_DONE = 3 * LINE
"""Parts of the stage that have ended, where several teams have a part each. 0 again before the next stage."""

START_BY = 4 * LINE
PASSED = 4 * LINE + 1
ERROR = 4 * LINE + 2
CHUNK_END = 5 * LINE
"""When a prefill's layer task that runs now is expected to end; 0 if none runs."""

BEGUN = 5 * LINE + 1
"""The position that some team has begun with, or with its part of."""

RECALLED = 6 * LINE
"""Set by the engine's thread: retire at the next step boundary."""

WIDTH, SPREAD = 6 * LINE + 1, 6 * LINE + 2
"""Written with the descriptor. WIDTH: stages of a layer (order.py). SPREAD: bit t is set if team t has a part
of the context of some row; 0 if all of it is at home."""

ATTENTION_TIME, ATTENTION_TASKS, FFN_TIME, FFN_TASKS = range(7 * LINE, 7 * LINE + 4)

# -- one team: TEAM_WORDS words ------------------------------------------------------------------------------
TEAM_WORDS = 8 * LINE
BELL = 0
"""Counts reasons to look for a task: submissions, and stages that other teams have ended. A futex."""

ASLEEP = 1 * LINE
TASK = 2 * LINE
"""How many threads the leader has called to its last task, itself included, from bit CALLED_BIT on; below,
how many tasks it has given. A futex for members that are called."""

CALLED_BIT = 48
MEMBERS_ASLEEP = 3 * LINE
RETURNS = 3 * LINE + 1
"""Counts how often members were called that had not been called before. A futex for those that are not."""

TASK_SLOT, TASK_STAGE, TASK_PART, TASK_ARRIVED, TASK_BASE = range(4 * LINE, 4 * LINE + 5)
"""The task, and what of the leader's own words (kernels/numba/team.py) a member needs that was away."""

NO_SLOT = -1
"""TASK_SLOT of a task that sends the members home."""

EVENTS_WRITTEN = 5 * LINE
EVENTS_READ = 6 * LINE
BEATS = 7 * LINE
"""Tasks done and sleeps ended: a team whose beats stand still while a task runs is stuck."""


# -- global words --------------------------------------------------------------------------------------------
GLOBAL_WORDS = 4 * LINE
STOP = 0
SLOTS_IN_USE = 1 * LINE
"""Slots from this one on have never been used."""

NEWS = 2 * LINE
"""Counts events and calls of ``wake``. A futex for the engine's thread."""

ENGINE_ASLEEP = 3 * LINE
TOKENS_TO = 3 * LINE + 1
"""The file descriptor of the pipe into which teams write the tokens of PIPED rows (body_words.py)."""

# -- events --------------------------------------------------------------------------------------------------
EVENT_WORDS = 8
RING_EVENTS = 4096
EVENT_KIND, EVENT_REQUEST, EVENT_TOKEN = range(RECORD_WORDS)
EVENT_SLOT, EVENT_ROW, EVENT_MADE, EVENT_DELIVERED = range(RECORD_WORDS, RECORD_WORDS + 4)
TOKEN_EVENT, RETIRED_EVENT = TOKEN_RECORD, TOKEN_RECORD + 1
NO_REQUEST = -1
"""The first words of a token's event are its record for the pipe, from where it is written, too, unless its
request is NO_REQUEST. DELIVERED says that the pipe has taken it."""

SLOTS = 256


@dataclass(frozen=True, slots=True)
class Control:
    """The block of words. ``slots``, ``teams`` and ``rings`` are addresses of the first of each kind."""

    memory: np.ndarray
    num_teams: int
    address: int

    @staticmethod
    def allocate(num_teams: int) -> Control:
        """All words zero."""
        words = GLOBAL_WORDS + SLOTS * SLOT_WORDS + num_teams * (TEAM_WORDS + RING_EVENTS * EVENT_WORDS)
        memory = new_words(words)
        return Control(memory, num_teams, int(memory.ctypes.data))

    @property
    def slots(self) -> int:
        return self.address + 8 * GLOBAL_WORDS

    @property
    def teams(self) -> int:
        return self.slots + 8 * SLOTS * SLOT_WORDS

    @property
    def rings(self) -> int:
        return self.teams + 8 * self.num_teams * TEAM_WORDS

    def slot_words(self, slot: int) -> np.ndarray:
        begin = GLOBAL_WORDS + slot * SLOT_WORDS
        return self.memory[begin : begin + SLOT_WORDS]

    def team_words(self, team: int) -> np.ndarray:
        begin = GLOBAL_WORDS + SLOTS * SLOT_WORDS + team * TEAM_WORDS
        return self.memory[begin : begin + TEAM_WORDS]

    def ring(self, team: int) -> np.ndarray:
        """Events of one team, int64 [RING_EVENTS, EVENT_WORDS]."""
        begin = GLOBAL_WORDS + SLOTS * SLOT_WORDS + self.num_teams * TEAM_WORDS
        size = RING_EVENTS * EVENT_WORDS
        begin += team * size
        return self.memory[begin : begin + size].reshape(RING_EVENTS, EVENT_WORDS)


def new_bytes(size: int) -> np.ndarray:
    """Zeroed memory, uint8 [size], on whole pages; physical memory is taken where it is first written."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8)


def new_words(count: int) -> np.ndarray:
    """Zeroed memory, int64 [count]."""
    return new_bytes(8 * count).view(np.int64)
