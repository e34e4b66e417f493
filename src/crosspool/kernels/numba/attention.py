"""Attention of a pass over paged KV, by a team.

A row with many queries (a chunk of a prompt) is cut into tiles of queries and heads, each of which goes
through its blocks in order. A row with few queries has few tiles, and its blocks are computed side by side:
their states are kept, and merged in the same order by whoever needs a query's result. Both ways give the same
bits.
"""

from __future__ import annotations

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
from crosspool.kernels.numba.batch import BLOCK, TILE, first_seen, position_of
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.team import claim, meet, share

SPLIT_QUERIES = 8
"""Rows with more queries have tiles enough."""

SLOTS = 512
"""States that are kept are those of so many blocks of one query each; rows beyond are not split."""

NOT_SPLIT = -1


def attention_room_bytes(shape: AttentionShape) -> int:
    """Scratch shared by the team; only a long context touches all of it."""
    return SLOTS * shape.heads * 4 * (shape.value_width + 2)


def attention_mine_bytes(shape: AttentionShape, rows: int) -> int:
    """Scratch of each thread, for passes of up to ``rows`` rows."""
    return 16 * rows + BLOCK_MINE_BYTES + 2 * TILE * 4 * (shape.value_width + 2)


@kernel
def attend(shared, own, shape, batch, kv, query, room, mine, attended):
    """All threads together: from ``query`` [T, heads, key_width] to ``attended`` [T, heads, value_width],
    both addresses, in model dtype. The pass's KV is there before.

    Rows that are split have no result yet: ``attend_split`` makes it, with the same ``room`` and ``mine``.
    Returns when every thread is done.
    """
    plan = words(mine, 2 * batch.rows)
    share(own, _plan(shape, batch, kv, plan))
    row = 0
    unit = claim(shared, own)
    while unit >= 0:
        while row + 1 < batch.rows and plan[2 * row + 3] <= unit:
            row += 1
        unit -= plan[2 * row + 1]
        if plan[2 * row] == NOT_SPLIT:
            tile = _tile(shape, batch, row, _tiles(shape, batch, row) - 1 - unit)
            _attend_tile(shape, batch, kv, tile, query, mine + 16 * batch.rows, attended)
        else:
            _keep_block(shape, batch, kv, row, unit, plan[2 * row], query, room, mine + 16 * batch.rows)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def attend_split(shape, batch, kv, query, head, room, mine, attended):
    """Make the result of one query (its number in the pass) and head out of the states that ``attend`` has
    kept, if its row is split."""
    row = batch.row_of[query]
    slots = words(mine, 2 * batch.rows)[2 * row]
    if slots == NOT_SPLIT:
        return
    group, width = shape.heads // shape.kv_heads, shape.value_width
    position, queries = position_of(batch, query), batch.starts[row + 1] - batch.starts[row]
    number = head // group * queries * group + (query - batch.starts[row]) * group + head % group
    state = floats(mine + 16 * batch.rows, width + 2)
    forget(state, width)
    for block in range(first_seen(position, kv.window) // BLOCK, position // BLOCK + 1):
        kept = slots * shape.heads + (block - _first_block(batch, kv, row)) * queries * shape.heads + number
        merge(state, floats(room + kept * state_bytes(shape), width + 2), width)
    place = (query * shape.heads + head) * width * element_bytes(batch.dtype)
    finish(state, width, attended + place, batch.dtype)


@kernel
def _plan(shape, batch, kv, plan):
    """Which rows are split, and how many units there are. Of row r, ``plan[2 * r]`` is its first slot or
    NOT_SPLIT, ``plan[2 * r + 1]`` the number of its first unit."""
    units, slots = 0, 0
    for row in range(batch.rows):
        queries = batch.starts[row + 1] - batch.starts[row]
        blocks = (batch.firsts[row] + queries - 1) // BLOCK + 1 - _first_block(batch, kv, row)
        split = queries <= SPLIT_QUERIES and blocks > 1 and slots + queries * blocks <= SLOTS
        plan[2 * row], plan[2 * row + 1] = slots if split else NOT_SPLIT, units
        slots += queries * blocks if split else 0
        units += _tiles(shape, batch, row) * (blocks if split else 1)
    return units


@inline
def _first_block(batch, kv, row):
    """The first block that any of a row's queries sees."""
    return first_seen(batch.firsts[row], kv.window) // BLOCK


@inline
def _tiles(shape, batch, row):
    queries = batch.starts[row + 1] - batch.starts[row]
    return shape.kv_heads * -(-queries * (shape.heads // shape.kv_heads) // TILE)


@inline
def _tile(shape, batch, row, index):
    """Tile number ``index`` of a row: by queries, then by key-value head."""
    queries = batch.starts[row + 1] - batch.starts[row]
    first = index // shape.kv_heads * TILE
    count = min(TILE, queries * (shape.heads // shape.kv_heads) - first)
    return Tile(row, index % shape.kv_heads, first, count)


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
        attend_block(shape, batch, kv, tile, block, query, others, mine)
        for v in range(tile.size):
            state, other = floats(states + v * stride, width + 2), floats(others + v * stride, width + 2)
            merge(state, other, width)
    for v in range(tile.size):
        place = batch.starts[tile.row] + (tile.first + v) // group
        head = tile.kv_head * group + (tile.first + v) % group
        out = attended + (place * shape.heads + head) * width * element_bytes(batch.dtype)
        finish(floats(states + v * stride, width + 2), width, out, batch.dtype)


@inline
def _keep_block(shape, batch, kv, row, unit, slots, query, room, mine):
    """One tile's states of one block of a row that is split, to where they are kept: [block][kv head][query]
    [head of the group]."""
    tiles, queries = _tiles(shape, batch, row), batch.starts[row + 1] - batch.starts[row]
    tile, block = _tile(shape, batch, row, unit % tiles), unit // tiles
    number = tile.kv_head * queries * (shape.heads // shape.kv_heads) + tile.first
    kept = slots * shape.heads + block * queries * shape.heads + number
    block += _first_block(batch, kv, row)
    attend_block(shape, batch, kv, tile, block, query, room + kept * state_bytes(shape), mine)
