"""What a team runs next: core/pick.py, compiled as it is, over the micro-batches in the slots."""

from __future__ import annotations

from numba.extending import register_jitable

from crosspool.core import pick as rule
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import exchange, fetch_add, load_acquire, words
from crosspool.workers.resident.control import (
    BEGUN,
    CHUNK_END,
    LAYER_COST,
    MODEL,
    PASSED,
    PHASE,
    POSITION,
    SLOT_WORDS,
    SLOTS_IN_USE,
    STAGE_BITS,
    START_BY,
    TEAM,
)
from crosspool.workers.resident.crew import (
    CONTROL,
    CREW_WORDS,
    MODELS,
    NUMBER,
    SHARDED,
    SLOT_TABLE,
    WEIGHTS,
    WEIGHTS_TEAMS,
)
from crosspool.workers.resident.model_words import LAYERS, model_at
from crosspool.workers.resident.protocol import position_of

NOTHING = rule.NOTHING
delays = register_jitable(rule.delays)
pick = kernel(rule.pick)

READY, PREFILL, DUE, ORDER, COST, BEFORE, INDEX, PART, RAN = range(9)
COLUMNS = 9
"""Rows of a leader's table, int64 [COLUMNS, SLOTS]: what core/pick.py asks of each micro-batch, its slot, and
which part of its FFN is this team's. RAN is kept for each slot: the position of the last part run."""


@inline
def slot_at(crew, index):
    """The address of a slot."""
    return crew[SLOT_TABLE] + 8 * SLOT_WORDS * index


@inline
def model_of(crew, slot):
    """The words of the model of a slot (its words)."""
    return model_at(words(crew[MODELS], slot[MODEL] + 1)[slot[MODEL]])


@inline
def stage_of(model, position):
    """The stage within its pass: attention of layer l is 2l, its FFN 2l + 1, the head the last."""
    return (position & ((1 << STAGE_BITS) - 1)) % (2 * model[LAYERS] + 1)


@inline
def is_ffn(model, stage):
    return stage % 2 == 1 and stage < 2 * model[LAYERS]


@inline
def parts_of(crew):
    """How many devices share each FFN."""
    return crew[WEIGHTS] if crew[SHARDED] else 1


@inline
def team_of_part(crew, layer, part):
    """The team that computes a part of a layer's FFN (core/topology.py ffn_devices)."""
    device = part if crew[SHARDED] else layer % crew[WEIGHTS]
    return words(crew[WEIGHTS_TEAMS], crew[WEIGHTS])[device]


@inline
def own_part(crew, model, slot, stage):
    """Which part of a stage is this team's (0 where a stage is not shared), or -1."""
    if not is_ffn(model, stage):
        return 0 if slot[TEAM] == crew[NUMBER] else -1
    for part in range(parts_of(crew)):
        if team_of_part(crew, stage // 2, part) == crew[NUMBER]:
            return part
    return -1


@kernel
def choose_task(crew_address, table, now):
    """Fill the leader's table; return the column of the task to run now, or NOTHING.

    What is left of an FFN that other teams have begun comes first: it is the same one task to whoever waits
    for it.
    """
    crew = words(crew_address, CREW_WORDS)
    count = 0
    for index in range(load_acquire(crew[CONTROL] + 8 * SLOTS_IN_USE)):
        address = slot_at(crew, index)
        position = position_of(address)
        if position < 0:
            continue
        slot = words(address, SLOT_WORDS)
        model = model_of(crew, slot)
        stage = stage_of(model, position)
        part = own_part(crew, model, slot, stage)
        if part >= 0 and table[RAN, index] == position:
            part = -1
        table[READY, count], table[PART, count], table[INDEX, count] = part >= 0, part, index
        table[PREFILL, count], table[ORDER, count] = slot[PHASE], position >> STAGE_BITS
        table[DUE, count], table[COST, count] = slot[START_BY], slot[LAYER_COST]
        table[BEFORE, count] = slot[PASSED]
        if part >= 0 and slot[BEGUN] == position:
            return count
        count += 1
    return pick(
        table[READY, :count],
        table[PREFILL, :count],
        table[DUE, :count],
        table[ORDER, :count],
        table[COST, :count],
        table[BEFORE, :count],
        now,
    )


@kernel
def note_begin(crew_address, table, column, now):
    """A team begins the task of a column. The first part of a prefill's goes before every decode that it
    delays (core/in_flight.py)."""
    crew = words(crew_address, CREW_WORDS)
    index = table[INDEX, column]
    address = slot_at(crew, index)
    position = load_acquire(address + 8 * POSITION)
    table[RAN, index] = position
    first = exchange(address + 8 * BEGUN, position) != position
    if not (first and table[PREFILL, column]):
        return
    cost = table[COST, column]
    words(address, SLOT_WORDS)[CHUNK_END] = now + cost
    for other in range(load_acquire(crew[CONTROL] + 8 * SLOTS_IN_USE)):
        place = slot_at(crew, other)
        slot = words(place, SLOT_WORDS)
        if position_of(place) >= 0 and not slot[PHASE] and delays(slot[START_BY], cost, now):
            fetch_add(place + 8 * PASSED, 1)


@kernel
def already_passed(slots, in_use, phase, start_by):
    """Whether a prefill layer task that runs now makes a decode's token that begins wait (1 or 0)."""
    if phase:
        return 0
    for index in range(in_use):
        slot = words(slots + 8 * SLOT_WORDS * index, SLOT_WORDS)
        if slot[CHUNK_END] != 0 and delays(start_by, 0, slot[CHUNK_END]):
            return 1
    return 0
