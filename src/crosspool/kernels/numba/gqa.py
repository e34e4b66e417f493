"""The attention half of a layer with grouped-query attention (arXiv 2305.13245), for all tokens of a pass."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.attention import (
    any_split,
    attend,
    attend_split,
    attention_mine_bytes,
    attention_room_bytes,
)
from crosspool.kernels.numba.attention_block import AttentionShape, state_bytes
from crosspool.kernels.numba.attention_parts import (
    ADDS,
    CACHE_LINE,
    STORES,
    next_line,
    norm_piece,
    project_all,
    rotate_piece,
)
from crosspool.kernels.numba.attention_spread import attend_part, merge_parts, spread_mine_bytes
from crosspool.kernels.numba.batch import position_of, region_of
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import FLOAT32, element_bytes
from crosspool.kernels.numba.gqa_fields import (
    EPSILON,
    HEADS,
    INTERLEAVED,
    KEY,
    KEY_BIAS,
    KEY_NORM,
    KV_HEADS,
    OUTPUT,
    OUTPUT_BIAS,
    QUERY,
    QUERY_BIAS,
    QUERY_NORM,
    SCALE,
    SCRATCH,
    VALUE,
    VALUE_BIAS,
    WIDTH,
)
from crosspool.kernels.numba.intrinsics import halves
from crosspool.kernels.numba.matrix import matrix_at
from crosspool.kernels.numba.projection import project, projection_units
from crosspool.kernels.numba.team import claim, meet, share

HEADS_AT_ONCE = 4
MOST_UNITS = 128
"""A thread claims so many heads of tokens at once, or more where there would be more units than that."""


class Room(NamedTuple):
    """Addresses of the scratch that all threads share, for T tokens, in model dtype but for ``kept``.

    ``query`` [T, HEADS, WIDTH], ``key`` and ``value`` [T, KV_HEADS, WIDTH], as projected; queries are normed
    and rotated in place. ``attended`` [T, HEADS, WIDTH]; ``kept`` is attention's.
    """

    query: int
    key: int
    value: int
    attended: int
    kept: int


@kernel
def _room(room, fields, count, dtype):
    """Where everything is, from address ``room`` on, each on cache lines of its own."""
    token = fields[WIDTH] * element_bytes(dtype)
    query = next_line(room)
    key = next_line(query + count * fields[HEADS] * token)
    value = next_line(key + count * fields[KV_HEADS] * token)
    attended = next_line(value + count * fields[KV_HEADS] * token)
    kept = next_line(attended + count * fields[HEADS] * token)
    return Room(query, key, value, attended, kept)


@kernel
def _shape(fields, dtype, tokens_per_page):
    """What attention has to know."""
    heads, kv_heads, width = fields[HEADS], fields[KV_HEADS], fields[WIDTH]
    head = width * element_bytes(dtype)
    values = tokens_per_page * kv_heads * head
    scale = fields.view(np.float64)[SCALE]
    return AttentionShape(heads, kv_heads, width, width, values, kv_heads * head, head, scale)


def gqa_room_bytes(fields: np.ndarray, tokens: int) -> int:
    """Scratch shared by the team, for passes of up to ``tokens`` tokens in any model dtype."""
    return gqa_spread_room_bytes(fields, tokens, 0) + attention_room_bytes(_shape(fields, FLOAT32, 1))


def gqa_spread_room_bytes(fields: np.ndarray, tokens: int, states: int) -> int:
    """Room of a pass that is spread over devices, of up to ``tokens`` tokens, where that of ``states`` pairs
    of a query and a block is kept."""
    kept = int(_room(0, fields, tokens, FLOAT32).kept)
    shape = _shape(fields, FLOAT32, 1)
    return CACHE_LINE + kept + states * int(shape.heads * state_bytes(shape))


def gqa_mine_bytes(fields: np.ndarray, rows: int) -> int:
    """Scratch of each thread, for passes of up to ``rows`` rows."""
    shape = _shape(fields, FLOAT32, 1)
    return int(fields[SCRATCH]) + max(attention_mine_bytes(shape, rows), spread_mine_bytes(shape, rows))


@kernel
def gqa_half(shared, own, fields, normed, batch, kv, room, mine, hidden):
    """All threads together: add the attention of ``normed`` to the residual stream ``hidden``, both addresses
    of [T, H] in model dtype, and write the pass's keys and values into their pages.

    ``room`` and ``mine`` are the addresses of shared and own scratch, see gqa_room_bytes and gqa_mine_bytes.
    The pass rotates no more than a head. Returns when every thread is done.
    """
    places = _room(room, fields, batch.queries, batch.dtype)
    shape = _shape(fields, batch.dtype, kv.tokens_per_page)
    kept = mine + fields[SCRATCH]
    _project(shared, own, fields, normed, batch, places, mine)
    _prepare(shared, own, fields, shape, batch, kv, places, mine)
    attend(shared, own, shape, batch, kv, places.query, places.kept, kept, places.attended)
    if any_split(batch, kept):
        _merge(shared, own, shape, batch, kv, places, kept)
    output, bias = matrix_at(fields, OUTPUT), fields[OUTPUT_BIAS]
    project_all(shared, own, output, bias, places.attended, batch, hidden, ADDS, mine)


@kernel
def gqa_begin(shared, own, fields, normed, batch, kv, room, mine):
    """All threads at home: the begin of a half that is spread over devices. The pass's keys and values are in
    their pages then, and its queries in ``room``, which is the pass's own, see gqa_spread_room_bytes."""
    places = _room(room, fields, batch.queries, batch.dtype)
    shape = _shape(fields, batch.dtype, kv.tokens_per_page)
    _project(shared, own, fields, normed, batch, places, mine)
    _prepare(shared, own, fields, shape, batch, kv, places, mine)


@kernel
def gqa_part(shared, own, fields, batch, kv, spread, part, room, mine):
    """All threads of one device: its part of the context, for the queries of a round."""
    places = _room(room, fields, batch.queries, batch.dtype)
    shape = _shape(fields, batch.dtype, kv.tokens_per_page)
    attend_part(
        shared, own, shape, batch, kv, spread, part, places.query, places.kept, mine + fields[SCRATCH]
    )


@kernel
def gqa_end(shared, own, fields, batch, kv, spread, room, mine, hidden):
    """All threads at home: merge a round, and after the last one add the half's result to ``hidden``."""
    places = _room(room, fields, batch.queries, batch.dtype)
    shape = _shape(fields, batch.dtype, kv.tokens_per_page)
    merge_parts(shared, own, shape, batch, kv, spread, places.kept, mine + fields[SCRATCH], places.attended)
    if spread.round == spread.rounds - 1:
        output, bias = matrix_at(fields, OUTPUT), fields[OUTPUT_BIAS]
        project_all(shared, own, output, bias, places.attended, batch, hidden, ADDS, mine)


@kernel
def _project(shared, own, fields, normed, batch, room, mine):
    """Queries, keys and values as projected."""
    query, key, value = matrix_at(fields, QUERY), matrix_at(fields, KEY), matrix_at(fields, VALUE)
    queries, dtype, size = batch.queries, batch.dtype, element_bytes(batch.dtype)
    keys = projection_units(query, queries)
    values = keys + projection_units(key, queries)
    share(own, values + projection_units(value, queries))
    unit = claim(shared, own)
    while unit >= 0:
        matrix, bias, out, piece = query, fields[QUERY_BIAS], room.query, unit
        if unit >= values:
            matrix, bias, out, piece = value, fields[VALUE_BIAS], room.value, unit - values
        elif unit >= keys:
            matrix, bias, out, piece = key, fields[KEY_BIAS], room.key, unit - keys
        x_stride, stride = matrix.columns * size, matrix.rows * size
        project(matrix, bias, piece, normed, x_stride, queries, dtype, out, stride, STORES, mine)
        unit = claim(shared, own)
    meet(shared, own)


@inline
def _heads_at_once(heads):
    """How many of ``heads`` heads of all tokens a unit has."""
    return max(HEADS_AT_ONCE, -(-heads // MOST_UNITS))


@kernel
def _prepare(shared, own, fields, shape, batch, kv, room, mine):
    """Norm and rotate every query and key, and every key and value into its page. A unit is some heads, of
    each token's first those of its query, then those of its key and value."""
    heads = shape.heads + shape.kv_heads
    end = batch.queries * heads
    step = _heads_at_once(end)
    share(own, -(-end // step))
    unit = claim(shared, own)
    while unit >= 0:
        for head in range(unit * step, min(end, (unit + 1) * step)):
            _prepare_head(fields, shape, batch, kv, head // heads, head % heads, room, mine)
        unit = claim(shared, own)
    meet(shared, own)


@inline
def _prepare_head(fields, shape, batch, kv, token, head, room, mine):
    if head < shape.heads:
        place = room.query + (token * shape.heads + head) * shape.head_bytes
        _turn(fields, batch, token, place, fields[QUERY_NORM], place, mine)
    else:
        head -= shape.heads
        offset, position = token * shape.token_bytes + head * shape.head_bytes, position_of(batch, token)
        region = region_of(batch, kv, batch.row_of[token], position // kv.tokens_per_page)
        out = region + position % kv.tokens_per_page * shape.token_bytes + head * shape.head_bytes
        _turn(fields, batch, token, room.key + offset, fields[KEY_NORM], out, mine)
        _copy(room.value + offset, shape.head_bytes, out + shape.value_offset)


@kernel
def _turn(fields, batch, token, address, weight, out, mine):
    """Norm a head of a query or a key in place if there are weights, and rotate it to where it belongs."""
    width = fields[WIDTH]
    if weight != 0:
        norm_piece(address, width, weight, fields.view(np.float64)[EPSILON], batch.dtype, address, mine)
    rotate_piece(batch, token, address, width, fields[INTERLEAVED], out, mine)


@inline
def _copy(address, count, out):
    """Copy ``count`` bytes, an even number."""
    source, target = halves(address, count // 2), halves(out, count // 2)
    for i in range(count // 2):
        target[i] = source[i]


@kernel
def _merge(shared, own, shape, batch, kv, room, mine):
    """Put together what attention has kept of rows that are split. A unit is some heads of queries."""
    end = batch.queries * shape.heads
    step = _heads_at_once(end)
    share(own, -(-end // step))
    unit = claim(shared, own)
    while unit >= 0:
        for head in range(unit * step, min(end, (unit + 1) * step)):
            query = head // shape.heads
            attend_split(shape, batch, kv, query, head % shape.heads, room.kept, mine, room.attended)
        unit = claim(shared, own)
    meet(shared, own)
