"""What both kinds of attention halves do: pieces of a token from address to address, and whole products."""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes, narrow, widen
from crosspool.kernels.numba.intrinsics import floats
from crosspool.kernels.numba.norm import LANES, rms_norm
from crosspool.kernels.numba.projection import project, projection_units
from crosspool.kernels.numba.rope import rotate
from crosspool.kernels.numba.team import claim, meet, share

CACHE_LINE = 64

NO_BIAS = np.int64(0)
STORES, ADDS = np.int64(0), np.int64(1)
"""Arguments of products. Numba compiles a kernel once more for every literal among its arguments, but these
are variables to it."""


@inline
def next_line(address):
    """The first cache line that begins at an address or after it."""
    return -(-address // CACHE_LINE) * CACHE_LINE


@kernel
def norm_piece(address, count, weight, epsilon, dtype, out, mine):
    """Norm ``count`` elements by the weights at address ``weight``, from one address to another, all in
    ``dtype``. ``mine`` is this thread's scratch, see piece_mine_bytes."""
    values, scratch = floats(mine, count), floats(mine + 4 * count, count + LANES)
    widen(address, dtype, count, values)
    rms_norm(values, count, weight, epsilon, dtype, scratch)
    narrow(values, count, out, dtype)


@kernel
def rotate_piece(batch, token, address, count, interleaved, out, mine):
    """``count`` elements of a token's key or query from one address to another, with the first ``2 * half``
    rotated to its position. ``mine`` is this thread's scratch, see piece_mine_bytes."""
    values = floats(mine, count)
    cos, sin = batch.cos[token * batch.half :], batch.sin[token * batch.half :]
    widen(address, batch.dtype, count, values)
    rotate(values, batch.half, cos, sin, interleaved, batch.dtype)
    narrow(values, count, out, batch.dtype)


@kernel
def project_all(shared, own, matrix, bias, x, batch, out, adds, mine):
    """All threads together: a Matrix by ``x`` [T, columns], plus ``bias``, to ``out`` [T, rows], or, with
    ``adds``, added to what is there; see ``project``. Returns when every thread is done."""
    size = element_bytes(batch.dtype)
    x_stride, stride = matrix.columns * size, matrix.rows * size
    share(own, projection_units(matrix, batch.queries))
    unit = claim(shared, own)
    while unit >= 0:
        project(matrix, bias, unit, x, x_stride, batch.queries, batch.dtype, out, stride, adds, mine)
        unit = claim(shared, own)
    meet(shared, own)
