"""Attention of a pass over paged KV, by a team.

A row with many queries (a chunk of a prompt) is cut into tiles of queries and heads, each of which goes
through its blocks in order. A row with few queries has few tiles, and its blocks are computed side by side:
their states are kept, and merged in the same order by whoever needs a query's result. Both ways give the same
bits.
"""

from __future__ import annotations

from crosspool.kernels.numba.amx_attention import WIDEST
from crosspool.kernels.numba.attention_ahead import ask, look_nowhere
from crosspool.kernels.numba.attention_block import (
    BLOCK_MINE_BYTES,
    AttentionShape,
    Tile,
    attend_block,
    finish,
    forget,
    look_at_block,
    merge,
    state_bytes,
)
from crosspool.kernels.numba.batch import BLOCK, TILE, first_seen, position_of
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.team import THREADS, claim, meet, share

SPLIT_QUERIES = 8
"""Rows with more queries have tiles enough."""

SLOTS = 512
"""States that are kept are those of so many blocks of one query each; rows beyond are not split."""

UNITS_A_THREAD = 4
"""A unit is all key-value heads of a block, so that whole rows are read, where that leaves every thread so
many."""

EVERYTHING = 2**31
"""More requests than a block has."""

NOT_SPLIT = -1
PLAN_WORDS = 3


def attention_room_bytes(shape: AttentionShape) -> int:
    """Scratch shared by the team; only a long context touches all of it."""
    return SLOTS * shape.heads * 4 * (shape.value_width + 2)


def attention_mine_bytes(shape: AttentionShape, rows: int) -> int:
    """Scratch of each thread, for passes of up to ``rows`` rows."""
    return 8 * PLAN_WORDS * rows + BLOCK_MINE_BYTES + 2 * TILE * 4 * (shape.value_width + 2)


@kernel
def attend(shared, own, shape, batch, kv, query, room, mine, attended):
    """All threads together: from ``query`` [T, heads, key_width] to ``attended`` [T, heads, value_width],
    both addresses, in model dtype. The pass's KV is there before.

    Rows that are split have no result yet: ``attend_split`` makes it, with the same ``room`` and ``mine``.
    Returns when every thread is done.
    """
    plan, scratch = words(mine, PLAN_WORDS * batch.rows), mine + 8 * PLAN_WORDS * batch.rows
    share(own, _plan(shape, batch, kv, own[THREADS], plan))
    unit = claim(shared, own)
    if unit >= 0:
        # Nothing is to be computed meanwhile, so its first unit is asked for at once.
        _look_at(shape, batch, kv, plan, unit, scratch)
        ask(scratch, EVERYTHING)
    while unit >= 0:
        following = claim(shared, own)
        _look_at(shape, batch, kv, plan, following, scratch)
        row = _row_of(batch, plan, unit)
        slots, first, at_once = plan[PLAN_WORDS * row : PLAN_WORDS * (row + 1)]
        if slots == NOT_SPLIT:
            tile = _tile(shape, batch, row, 1, _tiles(shape, batch, row, 1) - 1 - (unit - first))
            _attend_tile(shape, batch, kv, tile, query, scratch, attended)
        else:
            _keep_block(shape, batch, kv, row, unit - first, slots, at_once, query, room, scratch)
        unit = following
    meet(shared, own)


@kernel
def attend_split(shape, batch, kv, query, head, room, mine, attended):
    """Make the result of one query (its number in the pass) and head out of the states that ``attend`` has
    kept, if its row is split."""
    row = batch.row_of[query]
    slots = words(mine, PLAN_WORDS * batch.rows)[PLAN_WORDS * row]
    if slots == NOT_SPLIT:
        return
    group, width = shape.heads // shape.kv_heads, shape.value_width
    position, queries = position_of(batch, query), batch.starts[row + 1] - batch.starts[row]
    number = head // group * queries * group + (query - batch.starts[row]) * group + head % group
    state = floats(mine + 8 * PLAN_WORDS * batch.rows, width + 2)
    forget(state, width)
    for block in range(first_seen(position, kv.window) // BLOCK, position // BLOCK + 1):
        kept = slots * shape.heads + (block - _first_block(batch, kv, row)) * queries * shape.heads + number
        merge(state, floats(room + kept * state_bytes(shape), width + 2), width)
    place = (query * shape.heads + head) * width * element_bytes(batch.dtype)
    finish(state, width, attended + place, batch.dtype)


@inline
def any_split(batch, mine):
    """Whether ``attend`` has left states of any row to be put together."""
    plan, split = words(mine, PLAN_WORDS * batch.rows), 0
    for row in range(batch.rows):
        split += plan[PLAN_WORDS * row] != NOT_SPLIT
    return split > 0


@kernel
def _plan(shape, batch, kv, threads, plan):
    """Which rows are split, and how many units there are. Of each row there are three words: its first slot
    or NOT_SPLIT, the number of its first unit, and how many key-value heads a unit has."""
    units, slots = 0, 0
    for row in range(batch.rows):
        queries = batch.starts[row + 1] - batch.starts[row]
        blocks = (batch.firsts[row] + queries - 1) // BLOCK + 1 - _first_block(batch, kv, row)
        split = queries <= SPLIT_QUERIES and blocks > 1 and slots + queries * blocks <= SLOTS
        at_once = 1
        if split:
            at_once = _most_heads(shape, queries)
            while at_once > 1 and blocks * _tiles(shape, batch, row, at_once) < UNITS_A_THREAD * threads:
                at_once = (at_once + 1) // 2
            at_once = -(-shape.kv_heads // -(-shape.kv_heads // at_once))
        place = PLAN_WORDS * row
        plan[place], plan[place + 1], plan[place + 2] = slots if split else NOT_SPLIT, units, at_once
        slots += queries * blocks if split else 0
        units += _tiles(shape, batch, row, at_once) * (blocks if split else 1)
    return units


@inline
def _row_of(batch, plan, unit):
    """The row to which a unit belongs."""
    row = 0
    while row + 1 < batch.rows and plan[PLAN_WORDS * (row + 1) + 1] <= unit:
        row += 1
    return row


@inline
def _look_at(shape, batch, kv, plan, unit, mine):
    """From now on ask for what a unit needs, if it is a block of a row that is split."""
    look_nowhere(mine)
    if unit >= 0:
        row = _row_of(batch, plan, unit)
        slots, first, at_once = plan[PLAN_WORDS * row : PLAN_WORDS * (row + 1)]
        if slots != NOT_SPLIT:
            tiles = _tiles(shape, batch, row, at_once)
            tile = _tile(shape, batch, row, at_once, (unit - first) % tiles)
            block = (unit - first) // tiles + _first_block(batch, kv, row)
            look_at_block(shape, batch, kv, tile, block, mine)


@inline
def _most_heads(shape, queries):
    """How many key-value heads a tile of so many queries may have."""
    size = min(TILE, queries * (shape.heads // shape.kv_heads))
    width = max(shape.key_width, shape.value_width)
    return max(1, min(TILE // size, WIDEST // width, shape.kv_heads))


@inline
def _first_block(batch, kv, row):
    """The first block that any of a row's queries sees."""
    return first_seen(batch.firsts[row], kv.window) // BLOCK


@inline
def _tiles(shape, batch, row, at_once):
    """Tiles of a row with ``at_once`` key-value heads each."""
    queries = batch.starts[row + 1] - batch.starts[row]
    return -(-shape.kv_heads // at_once) * -(-queries * (shape.heads // shape.kv_heads) // TILE)


@inline
def _tile(shape, batch, row, at_once, index):
    """Tile number ``index`` of a row: by queries, then by key-value heads."""
    queries, across = batch.starts[row + 1] - batch.starts[row], -(-shape.kv_heads // at_once)
    first, head = index // across * TILE, index % across * at_once
    size = min(TILE, queries * (shape.heads // shape.kv_heads) - first)
    return Tile(row, head, min(at_once, shape.kv_heads - head), first, size)


@kernel
def _attend_tile(shape, batch, kv, tile, query, mine, attended):
    """A tile's blocks in order, and its result."""
    group, width, stride = shape.heads // shape.kv_heads, shape.value_width, state_bytes(shape)
    states = mine + BLOCK_MINE_BYTES
    others = states + TILE * stride
    for v in range(tile.size):
        forget(floats(states + v * stride, width + 2), width)
    position = batch.firsts[tile.row]
    first = first_seen(position + tile.first // group, kv.window) // BLOCK
    last = (position + (tile.first + tile.size - 1) // group) // BLOCK
    for block in range(first, last + 1):
        attend_block(shape, batch, kv, tile, block, query, others, 0, mine)
        for v in range(tile.size):
            state, other = floats(states + v * stride, width + 2), floats(others + v * stride, width + 2)
            merge(state, other, width)
    for v in range(tile.size):
        place = batch.starts[tile.row] + (tile.first + v) // group
        head = tile.kv_head * group + (tile.first + v) % group
        out = attended + (place * shape.heads + head) * width * element_bytes(batch.dtype)
        finish(floats(states + v * stride, width + 2), width, out, batch.dtype)


@inline
def _keep_block(shape, batch, kv, row, unit, slots, at_once, query, room, mine):
    """One tile's states of one block of a row that is split, to where they are kept: [block][kv head][query]
    [head of the group]."""
    tiles, queries = _tiles(shape, batch, row, at_once), batch.starts[row + 1] - batch.starts[row]
    tile, block = _tile(shape, batch, row, at_once, unit % tiles), unit // tiles
    own = queries * (shape.heads // shape.kv_heads)
    kept = (slots + block * queries) * shape.heads + tile.kv_head * own + tile.first
    out, head_stride = room + kept * state_bytes(shape), own * state_bytes(shape)
    block += _first_block(batch, kv, row)
    attend_block(shape, batch, kv, tile, block, query, out, head_stride, mine)
