"""The FFN half of a layer for many tokens by the matrix unit: every vector is packed once, the pairs' inputs
before anything is multiplied, and activations where they are made.

Pairs of one member are packed in groups of SIDE. The products are those of ``amx_rows``, to the bit.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.activation import gate_by
from crosspool.kernels.numba.amx import group_bytes, pack_vectors, packed_rows
from crosspool.kernels.numba.amx_tile import DEPTH, SIDE, TILE_BYTES, transpose
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import BFLOAT16, add_rounded, narrow
from crosspool.kernels.numba.ffn_fields import (
    ACTIVATION,
    CACHE_LINE,
    DOWN_ROWS,
    EXPERT_WORDS,
    HIDDEN,
    MATRICES,
    MOST_DOWN_ROWS,
    ROUTED,
    SHARED_EXPERT,
    WIDEST,
)
from crosspool.kernels.numba.intrinsics import floats, halves, words
from crosspool.kernels.numba.linear import rows_of_unit
from crosspool.kernels.numba.matrix import MATRIX_WORDS, matrix_at
from crosspool.kernels.numba.team import THREADS, claim, meet, share

AT_ONCE = 2 * SIDE
"""Pairs that are multiplied together: two groups."""


@kernel
def packed_half(shared, own, fields, count, room, mine, out):
    """All threads together: gate, up and down of pairs that have been sorted, and the sums of every token."""
    _pack_inputs(shared, own, fields, room)
    _expand(shared, own, fields, room, mine)
    _contract(shared, own, fields, count, room, mine, out)


@inline
def _pack_inputs(shared, own, fields, room):
    """The inputs of every pair, packed. A unit is a group."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    begins, groups = words(room.begins, members + 1), words(room.groups, members + 1)
    total = 0
    for member in range(members):
        total += -(-(begins[member + 1] - begins[member]) // SIDE)
    share(own, total)
    member, before = 0, 0
    unit = claim(shared, own)
    while unit >= 0:
        own_groups = -(-(begins[member + 1] - begins[member]) // SIDE)
        while unit >= before + own_groups:
            before += own_groups
            member += 1
            own_groups = -(-(begins[member + 1] - begins[member]) // SIDE)
        first = begins[member] + (unit - before) * SIDE
        if unit == before:
            groups[member] = unit
        inputs, count = words(room.inputs, begins[member + 1]), min(SIDE, begins[member + 1] - first)
        packed = room.packed + unit * group_bytes(fields[HIDDEN])
        pack_vectors(inputs[first:], count, fields[HIDDEN], packed)
        unit = claim(shared, own)
    meet(shared, own)


@inline
def _rows_of_unit(gate):
    """Rows of a gate that a unit has: whole tiles of activations."""
    return -(-rows_of_unit(gate) // DEPTH) * DEPTH


@inline
def _gate_units(fields, begins, member):
    if begins[member] == begins[member + 1]:
        return 0
    gate = matrix_at(fields, MATRICES + EXPERT_WORDS * member)
    return -(-gate.rows // _rows_of_unit(gate))


@inline
def _expand(shared, own, fields, room, mine):
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
        _expand_rows(fields, begins, member, unit - before, room, mine)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _expand_rows(fields, begins, member, block, room, mine):
    """One block of rows of one member's gate and up, for all its pairs."""
    at = MATRICES + EXPERT_WORDS * member
    gate, up = matrix_at(fields, at), matrix_at(fields, at + MATRIX_WORDS)
    first = block * _rows_of_unit(gate)
    rows = min(gate.rows - first, _rows_of_unit(gate))
    gates = -(-mine // CACHE_LINE) * CACHE_LINE
    ups = gates + 4 * AT_ONCE * rows
    rounded = ups + 4 * AT_ONCE * rows
    packed, target = _groups_of(fields, room, member)
    target += first // DEPTH * TILE_BYTES
    for begin in range(begins[member], begins[member + 1], AT_ONCE):
        count, again = min(AT_ONCE, begins[member + 1] - begin), begin > begins[member]
        _multiply(gate, first, rows, packed, count, again, gates)
        _multiply(up, first, rows, packed, count, again, ups)
        _activate(fields, count, rows, gates, ups, rounded, target, group_bytes(gate.rows))
        packed += 2 * group_bytes(fields[HIDDEN])
        target += 2 * group_bytes(gate.rows)


@inline
def _groups_of(fields, room, member):
    """Where a member's packed inputs and activations begin."""
    group = words(room.groups, member + 1)[member]
    activations = room.activations + group * group_bytes(fields[WIDEST])
    return room.packed + group * group_bytes(fields[HIDDEN]), activations


@inline
def _multiply(matrix, first, rows, packed, count, again, out):
    """Some rows of a matrix by packed vectors, to [count, rows] at ``out``."""
    weights, stride = matrix.address + first * matrix.stride, np.int64(4 * rows)
    packed_rows(weights, matrix.stride, rows, matrix.columns, packed, count, again, out, stride)


@inline
def _activate(fields, count, rows, gates, ups, rounded, target, group_stride):
    """Activations of ``rows`` products of up to two groups of pairs, to their tiles from ``target`` on."""
    width = -(-rows // DEPTH) * DEPTH
    values = floats(gates, count * rows)
    gate_by(fields[ACTIVATION], values, floats(ups, count * rows), count * rows, BFLOAT16)
    if width == rows:
        narrow(values, count * rows, rounded, BFLOAT16)
    else:
        for i in range(count):
            place = rounded + 2 * i * width
            narrow(values[i * rows :], rows, place, BFLOAT16)
            rest = halves(place, width)
            for row in range(rows, width):
                rest[row] = 0
    pointers = words(gates, SIDE)
    for first in range(0, count, SIDE):
        for i in range(SIDE):
            pointers[i] = rounded + 2 * min(first + i, count - 1) * width
        for step in range(width // DEPTH):
            transpose(gates, np.int64(64 * step), target + step * TILE_BYTES, np.int64(64))
        target += group_stride


@inline
def _contract(shared, own, fields, count, room, mine, out):
    """Down of every pair, and the sum of each token's pairs. A unit is a part of all outputs: as large as
    leaves each thread one, so that activations are read as seldom as can be."""
    part = min(MOST_DOWN_ROWS, max(DOWN_ROWS, fields[HIDDEN] // own[THREADS] // DOWN_ROWS * DOWN_ROWS))
    share(own, -(-fields[HIDDEN] // part))
    unit = claim(shared, own)
    while unit >= 0:
        first = unit * part
        _contract_rows(fields, first, min(part, fields[HIDDEN] - first), count, room, mine, out)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def _contract_rows(fields, first, rows, count, room, mine, out):
    """``rows`` output elements of all tokens, DOWN_ROWS at a time of each member."""
    members = fields[ROUTED] + fields[SHARED_EXPERT]
    begins = words(room.begins, members + 1)
    tokens, gains = words(room.tokens, begins[members]), floats(room.pair_gains, begins[members])
    sums = mine + 4 * AT_ONCE * DOWN_ROWS
    totals = floats(sums, count * rows)
    for i in range(count * rows):
        totals[i] = np.float32(0)
    for member in range(members):
        down = matrix_at(fields, MATRICES + EXPERT_WORDS * member + 2 * MATRIX_WORDS)
        for part in range(0, rows, DOWN_ROWS):
            own = min(DOWN_ROWS, rows - part)
            _, packed = _groups_of(fields, room, member)
            for begin in range(begins[member], begins[member + 1], AT_ONCE):
                pairs, again = min(AT_ONCE, begins[member + 1] - begin), begin > begins[member]
                _multiply(down, first + part, own, packed, pairs, again, mine)
                for i in range(pairs):
                    total = sums + 4 * (tokens[begin + i] * rows + part)
                    add_rounded(mine + 4 * i * own, own, gains[begin + i], BFLOAT16, total)
                packed += 2 * group_bytes(down.columns)
    for token in range(count):
        place = out + 2 * (token * fields[HIDDEN] + first)
        narrow(totals[token * rows :], rows, place, BFLOAT16)
