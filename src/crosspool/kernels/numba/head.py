"""Final norm and LM head: logits of the queries that choose a token."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes, narrow, widen
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.linear import VECTORS_AT_ONCE, multiply_rows, rows_of_unit, units_of
from crosspool.kernels.numba.matrix import MATRIX_WORDS, Weight, matrix_at, put_matrix
from crosspool.kernels.numba.norm import LANES, rms_norm
from crosspool.kernels.numba.team import claim, meet, share

MATRIX = 0
NORM, EPSILON = MATRIX_WORDS, MATRIX_WORDS + 1
HEAD_WORDS = MATRIX_WORDS + 2
"""NORM is the address of the norm's weights, EPSILON the bits of a float64."""


def describe_head(norm: Tensor, epsilon: float, weight: Weight) -> np.ndarray:
    """int64 [HEAD_WORDS] from the final norm [H], in model dtype, and the LM head [V, H]."""
    fields = np.zeros(HEAD_WORDS, np.int64)
    put_matrix(fields, MATRIX, weight)
    fields[NORM] = norm.data_ptr()
    fields.view(np.float64)[EPSILON] = epsilon
    return fields


@inline
def head_room_bytes(hidden, count):
    """Scratch shared by the team, for up to ``count`` queries: whole words."""
    return 8 * count + 8 * -(-4 * count * hidden // 8)


def head_mine_bytes(hidden: int) -> int:
    """Scratch of each thread."""
    return 4 * (2 * hidden + LANES)


@kernel
def head(shared, own, fields, hidden, queries, count, dtype, room, mine, logits):
    """All threads together: float32 logits [count, V] at an address, not rounded to ``dtype``.

    ``hidden`` is the address of the residual stream [T, H], ``queries`` int64 [>= count] says whose logits
    are wanted. Returns when every thread is done.
    """
    matrix = matrix_at(fields, MATRIX)
    width = matrix.columns * element_bytes(dtype)
    x = words(room, count)
    share(own, count)
    place = claim(shared, own)
    while place >= 0:
        values = floats(mine, matrix.columns)
        scratch = floats(mine + 4 * matrix.columns, matrix.columns + LANES)
        widen(hidden + queries[place] * width, dtype, matrix.columns, values)
        epsilon = fields.view(np.float64)[EPSILON]
        rms_norm(values, matrix.columns, fields[NORM], epsilon, dtype, scratch)
        x[place] = room + 8 * count + place * width
        narrow(values, matrix.columns, x[place], dtype)
        place = claim(shared, own)
    meet(shared, own)
    rows, units, stride = rows_of_unit(matrix), units_of(matrix), 4 * matrix.rows
    share(own, units * -(-count // VECTORS_AT_ONCE))
    unit = claim(shared, own)
    while unit >= 0:
        begin, first = unit // units * VECTORS_AT_ONCE, unit % units * rows
        last, vectors = min(matrix.rows, first + rows), min(VECTORS_AT_ONCE, count - begin)
        out = logits + begin * stride + 4 * first
        multiply_rows(matrix, first, last, x[begin:], dtype, vectors, out, stride)
        unit = claim(shared, own)
    meet(shared, own)
