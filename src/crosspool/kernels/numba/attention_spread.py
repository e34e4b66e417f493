"""Attention of a pass whose context lies on several devices: each computes the blocks that it has.

A block belongs to one device, wherever its positions are cut by pages. Its states (attention_block.py) do not
depend on who computes them, and are merged in the order of blocks by the rows' home, as on one device: so are
the bits of the result. States of all queries at once would take too much memory for a long prompt, so queries
go in rounds: all devices compute those of a round, then the home merges them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.attention_ahead import look_nowhere
from crosspool.kernels.numba.attention_block import (
    BLOCK_MINE_BYTES,
    AttentionShape,
    Tile,
    attend_block,
    finish,
    forget,
    merge,
    state_bytes,
)
from crosspool.kernels.numba.batch import BLOCK, TILE, first_seen
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.team import claim, meet, share

HEADS_AT_ONCE = 4

FIRST_UNIT, FIRST_QUERY, FIRST_STATE, FIRST_OWN, PLAN_WORDS = range(5)
"""Of each row in a round: the numbers of its first unit of work, of its first query, of its first state (one
for a query and block, of all heads), and which of this part's blocks is the first that it sees."""


class Spread(NamedTuple):
    """Whose blocks are whose, and which round this is.

    ``blocks[(r * groups + g) * parts + p]`` is the address of int64 [1 + n]: n, and the numbers, ascending,
    of the blocks of row r in layer group g that device number p computes. Of a row's Q queries, those from
    ``Q * round // rounds`` to ``Q * (round + 1) // rounds - 1`` belong to a round.
    """

    parts: int
    rounds: int
    round: int
    blocks: np.ndarray


def spread_mine_bytes(shape: AttentionShape, rows: int) -> int:
    """Scratch of each thread, for passes of up to ``rows`` rows."""
    return 8 * PLAN_WORDS * rows + BLOCK_MINE_BYTES + 4 * (shape.value_width + 2)


@kernel
def attend_part(shared, own, shape, batch, kv, spread, part, query, states, mine):
    """All threads of one device: the states of the round's queries over this part's blocks, to address
    ``states`` [query and block, heads], where other devices write theirs at the same time.

    ``query`` is the address of the pass's queries [T, heads, key_width]; its KV is in the pages. Returns when
    every thread is done.
    """
    plan, place = words(mine, PLAN_WORDS * batch.rows), mine + 8 * PLAN_WORDS * batch.rows
    share(own, _plan(shape, batch, kv, spread, part, plan))
    look_nowhere(place)
    row = 0
    unit = claim(shared, own)
    while unit >= 0:
        while row + 1 < batch.rows and plan[PLAN_WORDS * (row + 1) + FIRST_UNIT] <= unit:
            row += 1
        number = unit - plan[PLAN_WORDS * row + FIRST_UNIT]
        _attend(shape, batch, kv, spread, part, row, number, plan, query, states, place)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def merge_parts(shared, own, shape, batch, kv, spread, states, mine, attended):
    """All threads at home, when every part is done: the results of the round's queries, to address
    ``attended`` [T, heads, value_width] in model dtype. Returns when every thread is done."""
    plan = words(mine, PLAN_WORDS * batch.rows)
    _plan(shape, batch, kv, spread, np.int64(0), plan)
    last = batch.rows - 1
    end = (plan[PLAN_WORDS * last + FIRST_QUERY] + _count(batch, spread, last)) * shape.heads
    share(own, -(-end // HEADS_AT_ONCE))
    row = 0
    unit = claim(shared, own)
    while unit >= 0:
        for head in range(unit * HEADS_AT_ONCE, min(end, (unit + 1) * HEADS_AT_ONCE)):
            query = head // shape.heads
            while row + 1 < batch.rows and plan[PLAN_WORDS * (row + 1) + FIRST_QUERY] <= query:
                row += 1
            place = mine + 8 * PLAN_WORDS * batch.rows
            number = query - plan[PLAN_WORDS * row + FIRST_QUERY]
            _merge(shape, batch, kv, spread, row, number, head % shape.heads, plan, states, place, attended)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _plan(shape, batch, kv, spread, part, plan):
    """Fill the plan of every row for a part; returns how many units there are. A unit is a tile of queries
    and one block."""
    units, queries, states = 0, 0, 0
    for row in range(batch.rows):
        count, begin, end = _count(batch, spread, row), _first_block(batch, kv, row), _end_block(batch, row)
        own = _blocks(batch, kv, spread, part, row)
        first = 0
        while first < len(own) and own[first] < begin:
            first += 1
        seen = first
        while seen < len(own) and own[seen] < end:
            seen += 1
        place = PLAN_WORDS * row
        plan[place + FIRST_UNIT], plan[place + FIRST_QUERY] = units, queries
        plan[place + FIRST_STATE], plan[place + FIRST_OWN] = states, first
        units += (seen - first) * _tiles(shape, count)
        queries += count
        states += count * (end - begin)
    return units


@inline
def _blocks(batch, kv, spread, part, row):
    """The numbers of a row's blocks that a part computes."""
    address = spread.blocks[(row * batch.groups + kv.group) * spread.parts + part]
    return words(address + 8, words(address, 1)[0])


@inline
def _first_block(batch, kv, row):
    """The first block that any of a row's queries sees."""
    return first_seen(batch.firsts[row], kv.window) // BLOCK


@inline
def _end_block(batch, row):
    """The first block that none of a row's queries sees any more."""
    return (batch.firsts[row] + batch.starts[row + 1] - batch.starts[row] - 1) // BLOCK + 1


@inline
def _first(batch, spread, row):
    """The first query of a row, counted within it, that belongs to the round."""
    return (batch.starts[row + 1] - batch.starts[row]) * spread.round // spread.rounds


@inline
def _count(batch, spread, row):
    """How many queries of a row belong to the round."""
    return (batch.starts[row + 1] - batch.starts[row]) * (spread.round + 1) // spread.rounds - _first(
        batch, spread, row
    )


@inline
def _tiles(shape, count):
    """How many tiles ``count`` queries are."""
    return shape.kv_heads * -(-count * (shape.heads // shape.kv_heads) // TILE)


@kernel
def _attend(shape, batch, kv, spread, part, row, number, plan, query, states, mine):
    """One unit of a row: a tile of its queries over one of the part's blocks."""
    group, count = shape.heads // shape.kv_heads, _count(batch, spread, row)
    tiles, place = _tiles(shape, count), PLAN_WORDS * row
    block = _blocks(batch, kv, spread, part, row)[plan[place + FIRST_OWN] + number // tiles]
    kv_head, first = number % tiles % shape.kv_heads, number % tiles // shape.kv_heads * TILE
    size = min(TILE, count * group - first)
    tile = Tile(row, kv_head, 1, _first(batch, spread, row) * group + first, size)
    state = plan[place + FIRST_STATE] + (block - _first_block(batch, kv, row)) * count
    out = states + (state * shape.heads + kv_head * count * group + first) * state_bytes(shape)
    attend_block(shape, batch, kv, tile, block, query, out, 0, mine)


@kernel
def _merge(shape, batch, kv, spread, row, number, head, plan, states, mine, attended):
    """The result of one head of the round's query ``number`` of a row."""
    group, width, count = shape.heads // shape.kv_heads, shape.value_width, _count(batch, spread, row)
    query = _first(batch, spread, row) + number
    position, begin = batch.firsts[row] + query, _first_block(batch, kv, row)
    own = head // group * count * group + number * group + head % group
    state = floats(mine, width + 2)
    forget(state, width)
    for block in range(first_seen(position, kv.window) // BLOCK, position // BLOCK + 1):
        place = plan[PLAN_WORDS * row + FIRST_STATE] + (block - begin) * count
        other = floats(states + (place * shape.heads + own) * state_bytes(shape), width + 2)
        merge(state, other, width)
    place = ((batch.starts[row] + query) * shape.heads + head) * width
    finish(state, width, attended + place * element_bytes(batch.dtype), batch.dtype)
