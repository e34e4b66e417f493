"""The attention half of a layer with latent attention (arXiv 2405.04434), for all tokens of a pass.

Keys and values are never expanded: each head's matrices are applied to its query before attention and to the
attended latent after it (section 2.1.2), so that a latent serves all heads as key and value.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.attention import attend, attend_split, attention_mine_bytes, attention_room_bytes
from crosspool.kernels.numba.attention_block import AttentionShape, state_bytes
from crosspool.kernels.numba.attention_parts import (
    ADDS,
    CACHE_LINE,
    NO_BIAS,
    STORES,
    next_line,
    norm_piece,
    project_all,
    rotate_piece,
)
from crosspool.kernels.numba.attention_spread import attend_part, merge_parts, spread_mine_bytes
from crosspool.kernels.numba.batch import position_of, region_of
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes
from crosspool.kernels.numba.linear import VECTORS_AT_ONCE
from crosspool.kernels.numba.matrix import Matrix, matrix_at
from crosspool.kernels.numba.mla_fields import (
    DTYPE,
    EPSILON,
    EXPAND_KEY,
    EXPAND_VALUE,
    HEADS,
    INTERLEAVED,
    LATENT,
    LATENT_BIAS,
    LATENT_NORM,
    NOPE,
    OUTPUT,
    OUTPUT_BIAS,
    QUERY,
    QUERY_DOWN,
    QUERY_DOWN_BIAS,
    QUERY_NORM,
    RANK,
    ROTARY,
    SCALE,
    SCRATCH,
    VALUE,
)
from crosspool.kernels.numba.projection import project, projection_units, row_blocks
from crosspool.kernels.numba.team import claim, meet, share

KEPT, MERGED = np.int64(0), np.int64(1)
"""What attention has left: states to be merged, or results. Variables to Numba, see attention_parts.py."""


class Room(NamedTuple):
    """Addresses of the scratch that all threads share, for T tokens, in model dtype but for ``kept``.

    As projected: ``latent`` [T, RANK + ROTARY], ``down`` [T, query rank] and ``heads`` [T, HEADS, NOPE +
    ROTARY]. In latent space: ``query`` [T, HEADS, RANK + ROTARY], ``attended`` [T, HEADS, RANK]. ``values``
    [T, HEADS, VALUE]; ``kept`` is attention's.
    """

    latent: int
    down: int
    heads: int
    query: int
    attended: int
    values: int
    kept: int


@kernel
def _room(room, fields, count):
    """Where everything is, from address ``room`` on, each on cache lines of its own."""
    rank, rotary, heads, size = fields[RANK], fields[ROTARY], fields[HEADS], _size(fields)
    latent = next_line(room)
    down = next_line(latent + count * size * (rank + rotary))
    parts = next_line(down + count * size * matrix_at(fields, QUERY_DOWN).rows)
    query = next_line(parts + count * size * heads * (fields[NOPE] + rotary))
    attended = next_line(query + count * size * heads * (rank + rotary))
    values = next_line(attended + count * size * heads * rank)
    kept = next_line(values + count * size * heads * fields[VALUE])
    return Room(latent, down, parts, query, attended, values, kept)


@inline
def _size(fields):
    """Bytes of an element of the model's type."""
    return element_bytes(fields[DTYPE])


@kernel
def _shape(fields):
    """What attention has to know."""
    size, width = _size(fields), fields[RANK] + fields[ROTARY]
    scale = fields.view(np.float64)[SCALE]
    return AttentionShape(fields[HEADS], 1, width, fields[RANK], 0, width * size, width * size, scale)


@inline
def _key_of_head(fields, head):
    """From a head's query to latent space: [RANK, NOPE]."""
    stride = fields[NOPE] * _size(fields)
    place = fields[EXPAND_KEY] + head * fields[RANK] * stride
    return Matrix(place, stride, fields[RANK], fields[NOPE], fields[DTYPE], 0)


@inline
def _value_of_head(fields, head):
    """From an attended latent to a head's value: [VALUE, RANK]."""
    stride = fields[RANK] * _size(fields)
    place = fields[EXPAND_VALUE] + head * fields[VALUE] * stride
    return Matrix(place, stride, fields[VALUE], fields[RANK], fields[DTYPE], 0)


def mla_room_bytes(fields: np.ndarray, tokens: int) -> int:
    """Scratch shared by the team, for passes of up to ``tokens`` tokens."""
    return mla_spread_room_bytes(fields, tokens, 0) + attention_room_bytes(_shape(fields))


def mla_spread_room_bytes(fields: np.ndarray, tokens: int, states: int) -> int:
    """Room of a pass that is spread over devices, of up to ``tokens`` tokens, where that of ``states`` pairs
    of a query and a block is kept."""
    shape = _shape(fields)
    return CACHE_LINE + int(_room(0, fields, tokens).kept) + states * int(shape.heads * state_bytes(shape))


def mla_mine_bytes(fields: np.ndarray, rows: int) -> int:
    """Scratch of each thread, for passes of up to ``rows`` rows."""
    shape = _shape(fields)
    return int(fields[SCRATCH]) + max(attention_mine_bytes(shape, rows), spread_mine_bytes(shape, rows))


@kernel
def mla_half(shared, own, fields, normed, batch, kv, room, mine, hidden):
    """All threads together: add the attention of ``normed`` to the residual stream ``hidden``, both addresses
    of [T, H] in model dtype, and write the pass's latents and rotary keys into their pages.

    ``room`` and ``mine`` are the addresses of shared and own scratch, see mla_room_bytes and mla_mine_bytes.
    Returns when every thread is done.
    """
    places = _room(room, fields, batch.queries)
    _project(shared, own, fields, normed, batch, places, mine)
    _absorb(shared, own, fields, batch, kv, places, mine)
    kept = mine + fields[SCRATCH]
    shape = _shape(fields)
    attend(shared, own, shape, batch, kv, places.query, places.kept, kept, places.attended)
    _expand(shared, own, fields, batch, kv, places, KEPT, mine)
    output, bias = matrix_at(fields, OUTPUT), fields[OUTPUT_BIAS]
    project_all(shared, own, output, bias, places.values, batch, hidden, ADDS, mine)


@kernel
def mla_begin(shared, own, fields, normed, batch, kv, room, mine):
    """All threads at home: the begin of a half that is spread over devices. The pass's latents are in their
    pages then, and its queries in ``room``, which is the pass's own, see mla_spread_room_bytes."""
    places = _room(room, fields, batch.queries)
    _project(shared, own, fields, normed, batch, places, mine)
    _absorb(shared, own, fields, batch, kv, places, mine)


@kernel
def mla_part(shared, own, fields, batch, kv, spread, part, room, mine):
    """All threads of one device: its part of the context, for the queries of a round."""
    places, shape = _room(room, fields, batch.queries), _shape(fields)
    attend_part(
        shared, own, shape, batch, kv, spread, part, places.query, places.kept, mine + fields[SCRATCH]
    )


@kernel
def mla_end(shared, own, fields, batch, kv, spread, room, mine, hidden):
    """All threads at home: merge a round, and after the last one add the half's result to ``hidden``."""
    places, shape = _room(room, fields, batch.queries), _shape(fields)
    merge_parts(shared, own, shape, batch, kv, spread, places.kept, mine + fields[SCRATCH], places.attended)
    if spread.round == spread.rounds - 1:
        _expand(shared, own, fields, batch, kv, places, MERGED, mine)
        output, bias = matrix_at(fields, OUTPUT), fields[OUTPUT_BIAS]
        project_all(shared, own, output, bias, places.values, batch, hidden, ADDS, mine)


@kernel
def _project(shared, own, fields, normed, batch, room, mine):
    """Latents and queries as projected."""
    queries, dtype, size = batch.queries, batch.dtype, _size(fields)
    latent, query, down = matrix_at(fields, LATENT), matrix_at(fields, QUERY), matrix_at(fields, QUERY_DOWN)
    width = latent.columns * size
    first = down if down.rows > 0 else query
    out = room.down if down.rows > 0 else room.heads
    units = projection_units(latent, queries)
    share(own, units + projection_units(first, queries))
    unit = claim(shared, own)
    while unit >= 0:
        if unit < units:
            place, stride = room.latent, latent.rows * size
            project(
                latent, fields[LATENT_BIAS], unit, normed, width, queries, dtype, place, stride, STORES, mine
            )
        else:
            stride, bias = first.rows * size, fields[QUERY_DOWN_BIAS]
            project(first, bias, unit - units, normed, width, queries, dtype, out, stride, STORES, mine)
        unit = claim(shared, own)
    meet(shared, own)
    if down.rows > 0:
        _project_queries(shared, own, fields, batch, room, mine)


@kernel
def _project_queries(shared, own, fields, batch, room, mine):
    """The norm of the queries' own latent, and the queries."""
    query = matrix_at(fields, QUERY)
    rank, weight, epsilon = query.columns, fields[QUERY_NORM], fields.view(np.float64)[EPSILON]
    share(own, batch.queries)
    token = claim(shared, own)
    while token >= 0:
        place = room.down + token * rank * _size(fields)
        norm_piece(place, rank, weight, epsilon, batch.dtype, place, mine)
        token = claim(shared, own)
    meet(shared, own)
    project_all(shared, own, query, NO_BIAS, room.down, batch, room.heads, STORES, mine)


@kernel
def _absorb(shared, own, fields, batch, kv, room, mine):
    """Every token's latent and rotary key into its page, every query into latent space, one unit a token or a
    piece of a head."""
    matrix = _key_of_head(fields, 0)
    units = projection_units(matrix, batch.queries)
    share(own, batch.queries + fields[HEADS] * units)
    unit = claim(shared, own)
    while unit >= 0:
        if unit < batch.queries:
            _write(fields, batch, kv, unit, room, mine)
        else:
            piece = unit - batch.queries
            _absorb_head(fields, batch, piece // units, piece % units, room, mine)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _write(fields, batch, kv, token, room, mine):
    """A token's normed latent and rotated key into its page."""
    rank, rotary, size = fields[RANK], fields[ROTARY], _size(fields)
    position = position_of(batch, token)
    region = region_of(batch, kv, batch.row_of[token], position // kv.tokens_per_page)
    out = region + position % kv.tokens_per_page * (rank + rotary) * size
    place = room.latent + token * (rank + rotary) * size
    norm_piece(place, rank, fields[LATENT_NORM], fields.view(np.float64)[EPSILON], batch.dtype, out, mine)
    part = place + rank * size
    rotate_piece(batch, token, part, rotary, fields[INTERLEAVED], out + rank * size, mine)


@kernel
def _absorb_head(fields, batch, head, piece, room, mine):
    """A piece of one head's product, and, with the first rows, the rotary part of its tokens."""
    size, nope, rank = _size(fields), fields[NOPE], fields[RANK]
    x_stride = fields[HEADS] * (nope + fields[ROTARY]) * size
    out_stride = fields[HEADS] * (rank + fields[ROTARY]) * size
    x = room.heads + head * (nope + fields[ROTARY]) * size
    out = room.query + head * (rank + fields[ROTARY]) * size
    matrix = _key_of_head(fields, head)
    project(matrix, NO_BIAS, piece, x, x_stride, batch.queries, batch.dtype, out, out_stride, STORES, mine)
    blocks = row_blocks(matrix, batch.queries)
    if piece % blocks == 0:
        begin = piece // blocks * VECTORS_AT_ONCE
        for token in range(begin, min(batch.queries, begin + VECTORS_AT_ONCE)):
            part = x + token * x_stride + nope * size
            place = out + token * out_stride + rank * size
            rotate_piece(batch, token, part, fields[ROTARY], fields[INTERLEAVED], place, mine)


@kernel
def _expand(shared, own, fields, batch, kv, room, merged, mine):
    """Attended latents into values. A unit is a head of a block of tokens: before it, unless that is
    ``merged``, what attention has kept of them is put together."""
    blocks = -(-batch.queries // VECTORS_AT_ONCE)
    share(own, fields[HEADS] * blocks)
    unit = claim(shared, own)
    while unit >= 0:
        _expand_head(fields, batch, kv, unit // blocks, unit % blocks, room, merged, mine)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _expand_head(fields, batch, kv, head, block, room, merged, mine):
    """One head of one block of tokens."""
    begin = block * VECTORS_AT_ONCE
    count = min(VECTORS_AT_ONCE, batch.queries - begin)
    if not merged:
        shape, kept = _shape(fields), mine + fields[SCRATCH]
        for token in range(begin, begin + count):
            attend_split(shape, batch, kv, token, head, room.kept, kept, room.attended)
    rank, value, size = fields[RANK], fields[VALUE], _size(fields)
    x_stride, out_stride = fields[HEADS] * rank * size, fields[HEADS] * value * size
    x = room.attended + begin * x_stride + head * rank * size
    out = room.values + begin * out_stride + head * value * size
    matrix = _value_of_head(fields, head)
    for piece in range(row_blocks(matrix, count)):
        project(matrix, NO_BIAS, piece, x, x_stride, count, batch.dtype, out, out_stride, STORES, mine)
