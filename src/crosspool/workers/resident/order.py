"""What a team runs next: core/pick.py, compiled as it is, over the micro-batches in the slots."""

from __future__ import annotations

from numba.extending import register_jitable

from crosspool.core import pick as rule
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import exchange, fetch_add, full_fence, load_acquire, words
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
    SPREAD,
    STAGE_BITS,
    START_BY,
    TEAM,
    WIDTH,
)
from crosspool.workers.resident.crew import (
    AT_HOME,
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
which part of its stage is this team's. RAN is kept for each slot: the position of the last part run."""


@inline
def slot_at(crew, index):
    """The address of a slot."""
    return crew[SLOT_TABLE] + 8 * SLOT_WORDS * index


@inline
def model_of(crew, slot):
    """The words of the model of a slot (its words)."""
    return model_at(words(crew[MODELS], slot[MODEL] + 1)[slot[MODEL]])


# Each layer has WIDTH stages, the last of them its FFN; the head is the last stage of a pass. The attention
# half is one stage, or, where rows have pages elsewhere, one piece after another (spread_stages.py).


@inline
def stage_of(model, slot, position):
    """The stage within its pass."""
    return (position & ((1 << STAGE_BITS) - 1)) % (slot[WIDTH] * model[LAYERS] + 1)


@inline
def is_head(model, slot, stage):
    return stage == slot[WIDTH] * model[LAYERS]


@inline
def is_ffn(slot, stage):
    return stage % slot[WIDTH] == slot[WIDTH] - 1


@inline
def continues_half(slot, stage):
    """Whether a stage is a piece of an attention half that has begun: to the order rule, the rest of one
    task."""
    return 0 < stage % slot[WIDTH] < slot[WIDTH] - 1


@inline
def is_shared_context(slot, stage):
    """Whether a stage is the parts of the context that devices have of it."""
    return continues_half(slot, stage) and stage % slot[WIDTH] % 2 == 1


@inline
def parts_of(crew, slot, stage):
    """How many teams have a part of a stage."""
    if is_ffn(slot, stage):
        return crew[WEIGHTS] if crew[SHARDED] else 1
    return count_teams(slot[SPREAD]) if is_shared_context(slot, stage) else 1


@inline
def ffn_team(crew, slot, stage, part):
    """The team that computes a part of a layer's FFN (core/topology.py ffn_devices)."""
    if crew[AT_HOME]:
        return slot[TEAM]
    device = part if crew[SHARDED] else stage // slot[WIDTH] % crew[WEIGHTS]
    return words(crew[WEIGHTS_TEAMS], crew[WEIGHTS])[device]


@inline
def teams_of(crew, slot, stage):
    """The teams that have a part of a stage: bit t is set if team t has."""
    if is_shared_context(slot, stage):
        return slot[SPREAD]
    if not is_ffn(slot, stage):
        return 1 << slot[TEAM]
    teams = 0
    for part in range(parts_of(crew, slot, stage)):
        teams |= 1 << ffn_team(crew, slot, stage, part)
    return teams


@inline
def own_part(crew, slot, stage):
    """Which part of a stage is this team's (0 where a stage is not shared), or -1. Parts of the context are
    in the order of their teams."""
    number = crew[NUMBER]
    if is_ffn(slot, stage):
        for part in range(parts_of(crew, slot, stage)):
            if ffn_team(crew, slot, stage, part) == number:
                return part
        return -1
    teams = teams_of(crew, slot, stage)
    return count_teams(teams & ((1 << number) - 1)) if teams >> number & 1 else -1


@inline
def count_teams(teams):
    """How many bits are set."""
    count = 0
    while teams != 0:
        teams &= teams - 1
        count += 1
    return count


@kernel
def choose_task(crew_address, table, now):
    """Fill the leader's table; return the column of the task to run now, or NOTHING.

    What is left of a layer task that has begun comes first: it is the same one task to whoever waits for it.
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
        stage = stage_of(model, slot, position)
        part = own_part(crew, slot, stage)
        if part >= 0 and (table[RAN, index] == position or _has_changed(address, position)):
            part = -1
        table[READY, count], table[PART, count], table[INDEX, count] = part >= 0, part, index
        table[PREFILL, count], table[ORDER, count] = slot[PHASE], position >> STAGE_BITS
        table[DUE, count], table[COST, count] = slot[START_BY], slot[LAYER_COST]
        table[BEFORE, count] = slot[PASSED]
        if part >= 0 and (slot[BEGUN] == position or continues_half(slot, stage)):
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


@inline
def _has_changed(address, position):
    """Whether a slot has meanwhile left a position: what was read of it may then be of its next
    micro-batch."""
    full_fence()
    return position_of(address) != position


@kernel
def note_begin(crew_address, table, column, now):
    """A team begins the task of a column. The first part and piece of a prefill's goes before every decode
    that it delays (core/in_flight.py)."""
    crew = words(crew_address, CREW_WORDS)
    index = table[INDEX, column]
    address = slot_at(crew, index)
    position = load_acquire(address + 8 * POSITION)
    table[RAN, index] = position
    first = exchange(address + 8 * BEGUN, position) != position
    own = words(address, SLOT_WORDS)
    if continues_half(own, stage_of(model_of(crew, own), own, position)):
        return
    if not (first and table[PREFILL, column]):
        return
    cost = table[COST, column]
    own[CHUNK_END] = now + cost
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
