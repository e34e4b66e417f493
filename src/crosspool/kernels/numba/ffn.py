"""The FFN half of a layer: dense, or routed experts and a shared one, for all tokens of a pass.

A token and one of its experts are a **pair**. Pairs are sorted by expert, so that all tokens of an expert
share one read of its weights; the shared expert, and a dense FFN, are experts of every token. Results of a
token's experts are added in float32 in the order of expert ids, the shared one last.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.activation import gate_by
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import add_rounded, element_bytes, narrow
from crosspool.kernels.numba.ffn_fields import (
    ACTIVATION,
    CHOICES,
    DOWN_ROWS,
    EXPERT_WORDS,
    HIDDEN,
    MATRICES,
    ROUTED,
    ROUTER,
    SHARED_EXPERT,
    WIDEST,
    packs,
    room_of,
)
from crosspool.kernels.numba.ffn_packed import packed_half
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.linear import BY_UNIT, VECTORS_AT_ONCE, multiply_rows, rows_of_unit
from crosspool.kernels.numba.matrix import MATRIX_WORDS, matrix_at
from crosspool.kernels.numba.router import EXPERTS, GROUPS, route, router_logits
from crosspool.kernels.numba.team import claim, meet, share

TOKENS_ROUTED_AT_ONCE = 4
"""So few tokens are routed and sorted by one thread: a meeting costs more."""


@kernel
def _no_half(shared, own, fields, count, room, mine, out):
    """Where there is no matrix unit nothing is packed, and what would be cannot be compiled."""


_packed_half = packed_half if BY_UNIT else _no_half


@kernel
def ffn_half(shared, own, fields, normed, count, dtype, room, mine, out):
    """All threads together: ``normed`` [count, H] at an address, in ``dtype``, to ``out`` [count, H].

    ``room`` and ``mine`` are the addresses of shared and own scratch, see ffn_room_bytes and ffn_mine_bytes.
    Returns when every thread is done.
    """
    places = room_of(room, fields, count)
    _route(shared, own, fields, normed, count, dtype, places)
    if packs(fields, count, dtype):
        _packed_half(shared, own, fields, count, places, mine, out)
    else:
        _expand(shared, own, fields, dtype, places, mine)
        _contract(shared, own, fields, count, dtype, places, mine, out)


@inline
def _route(shared, own, fields, normed, count, dtype, room):
    """Fill everything in the room but the activations."""
    routed = fields[ROUTED] > 1 or fields[ROUTER + EXPERTS] > 0
    router = fields[ROUTER:MATRICES]
    few = count <= TOKENS_ROUTED_AT_ONCE
    if routed:
        width = fields[HIDDEN] * element_bytes(dtype)
        share(own, 1)
        if claim(shared, own) == 0:
            x = words(room.x, count)
            for token in range(count):
                x[token] = normed + token * width
            claim(shared, own)
        meet(shared, own)
        router_logits(shared, own, router, words(room.x, count), dtype, count, room.logits)
        if not few:
            share(own, count)
            token = claim(shared, own)
            while token >= 0:
                _route_token(fields, router, room, token)
                token = claim(shared, own)
            meet(shared, own)
    share(own, 1)
    if claim(shared, own) == 0:
        if routed and few:
            for token in range(count):
                _route_token(fields, router, room, token)
        _sort(fields, routed, normed, count, dtype, room)
        claim(shared, own)
    meet(shared, own)


@inline
def _route_token(fields, router, room, token):
    choices = fields[CHOICES]
    logits = room.logits + 4 * token * (fields[ROUTED] + fields[ROUTER + GROUPS])
    chosen = words(room.chosen + 8 * token * choices, choices)
    route(router, logits, chosen, floats(room.gains + 4 * token * choices, choices))


@inline
def _sort(fields, routed, normed, count, dtype, room):
    """Pairs by member and then by token."""
    choices, members = fields[CHOICES], fields[ROUTED] + fields[SHARED_EXPERT]
    pairs = count * (choices + fields[SHARED_EXPERT])
    chosen, gains = words(room.chosen, count * choices), floats(room.gains, count * choices)
    begins = words(room.begins, members + 1)
    tokens, inputs, places = words(room.tokens, pairs), words(room.inputs, pairs), words(room.places, pairs)
    pair_gains = floats(room.pair_gains, pairs)
    if not routed:
        for token in range(count):
            chosen[token], gains[token] = 0, np.float32(1)
    for member in range(members + 1):
        begins[member] = 0
    for choice in range(count * choices):
        begins[chosen[choice]] += 1
    if fields[SHARED_EXPERT]:
        begins[members - 1] = count
    before = 0
    for member in range(members + 1):
        own_pairs = begins[member]
        begins[member] = before
        before += own_pairs
    width = fields[HIDDEN] * element_bytes(dtype)
    for choice in range(count * (choices + fields[SHARED_EXPERT])):
        token = choice // choices if choice < count * choices else choice - count * choices
        member = chosen[choice] if choice < count * choices else members - 1
        pair = begins[member]
        begins[member] += 1
        tokens[pair], inputs[pair] = token, normed + token * width
        places[pair] = room.activations + pair * fields[WIDEST] * element_bytes(dtype)
        pair_gains[pair] = gains[choice] if choice < count * choices else np.float32(1)
    for member in range(members, 0, -1):
        begins[member] = begins[member - 1]
    begins[0] = 0


@inline
def _expand(shared, own, fields, dtype, room, mine):
    """Gate and up of every pair. A unit is a block of rows of one member; members without pairs have none."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    begins = words(room.begins, members + 1)
    units = 0
    for member in range(members):
        units += _gate_units(fields, begins, member)
    share(own, units)
    member, before = 0, 0
    unit = claim(shared, own)
    while unit >= 0:
        while unit >= before + _gate_units(fields, begins, member):
            before += _gate_units(fields, begins, member)
            member += 1
        _expand_rows(fields, begins, member, unit - before, dtype, room, mine)
        unit = claim(shared, own)
    meet(shared, own)


@inline
def _gate_units(fields, begins, member):
    if begins[member] == begins[member + 1]:
        return 0
    gate = matrix_at(fields, MATRICES + EXPERT_WORDS * member)
    return -(-gate.rows // rows_of_unit(gate))


@kernel
def _expand_rows(fields, begins, member, block, dtype, room, mine):
    """One block of rows of one member's gate and up, for all its pairs."""
    at = MATRICES + EXPERT_WORDS * member
    gate, up = matrix_at(fields, at), matrix_at(fields, at + MATRIX_WORDS)
    first = block * rows_of_unit(gate)
    last = min(gate.rows, first + rows_of_unit(gate))
    stride = 4 * (last - first)
    inputs, places = words(room.inputs, begins[member + 1]), words(room.places, begins[member + 1])
    for begin in range(begins[member], begins[member + 1], VECTORS_AT_ONCE):
        count = min(VECTORS_AT_ONCE, begins[member + 1] - begin)
        ups = mine + count * stride
        multiply_rows(gate, first, last, inputs[begin:], dtype, count, mine, stride)
        multiply_rows(up, first, last, inputs[begin:], dtype, count, ups, stride)
        for i in range(count):
            values = floats(mine + i * stride, last - first)
            gate_by(fields[ACTIVATION], values, floats(ups + i * stride, last - first), last - first, dtype)
            narrow(values, last - first, places[begin + i] + first * element_bytes(dtype), dtype)


@inline
def _contract(shared, own, fields, count, dtype, room, mine, out):
    """Down of every pair, and the sum of each token's pairs. A unit is DOWN_ROWS elements of all outputs."""
    share(own, -(-fields[HIDDEN] // DOWN_ROWS))
    unit = claim(shared, own)
    while unit >= 0:
        _contract_rows(fields, unit * DOWN_ROWS, count, dtype, room, mine, out)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _contract_rows(fields, first, count, dtype, room, mine, out):
    """Output elements ``first`` to at most ``first + DOWN_ROWS - 1`` of all tokens."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    begins = words(room.begins, members + 1)
    tokens, places = words(room.tokens, begins[members]), words(room.places, begins[members])
    gains = floats(room.pair_gains, begins[members])
    rows = min(DOWN_ROWS, fields[HIDDEN] - first)
    sums = mine + 4 * VECTORS_AT_ONCE * DOWN_ROWS
    totals = floats(sums, count * rows)
    for i in range(count * rows):
        totals[i] = np.float32(0)
    for member in range(members):
        down = matrix_at(fields, MATRICES + EXPERT_WORDS * member + 2 * MATRIX_WORDS)
        for begin in range(begins[member], begins[member + 1], VECTORS_AT_ONCE):
            pairs = min(VECTORS_AT_ONCE, begins[member + 1] - begin)
            multiply_rows(down, first, first + rows, places[begin:], dtype, pairs, mine, 4 * rows)
            for i in range(pairs):
                total = sums + 4 * tokens[begin + i] * rows
                add_rounded(mine + 4 * i * rows, rows, gains[begin + i], dtype, total)
    size = element_bytes(dtype)
    for token in range(count):
        place = out + (token * fields[HIDDEN] + first) * size
        narrow(totals[token * rows :], rows, place, dtype)
