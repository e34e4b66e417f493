"""A team's products of a matrix with the vectors of a pass: [T, columns] to [T, rows] in model dtype.

A unit of work is a block of the matrix's rows by a block of vectors, and is finished by the thread that has
claimed it: bias, rounding, residual stream.
"""

from __future__ import annotations

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.elements import element_bytes, narrow, round_to, widen
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.linear import VECTORS_AT_ONCE, multiply_rows, rows_of_unit
from crosspool.kernels.numba.matrix import Matrix

MANY, LARGER = 4 * VECTORS_AT_ONCE, 4
"""With so many vectors a unit has so many times more rows: it packs its vectors for the matrix unit, which
takes as long as 32 rows."""


@inline
def _rows_at_once(matrix, count):
    return rows_of_unit(matrix) * (LARGER if count >= MANY else 1)


@inline
def row_blocks(matrix, count):
    """Blocks into which the rows of a Matrix are cut for ``count`` vectors; units go through these first."""
    return -(-matrix.rows // _rows_at_once(matrix, count))


@inline
def projection_units(matrix, count):
    """Units of the product of a Matrix with ``count`` vectors."""
    return row_blocks(matrix, count) * -(-count // VECTORS_AT_ONCE)


def projection_mine_bytes(matrix: Matrix) -> int:
    """Scratch of each thread for products with a matrix."""
    rows = min(matrix.rows, LARGER * int(rows_of_unit(matrix)))
    return 8 * VECTORS_AT_ONCE + 4 * rows * (VECTORS_AT_ONCE + 1)


@kernel
def project(matrix, bias, unit, x, x_stride, count, dtype, out, out_stride, adds, mine):
    """One unit: some rows of a Matrix by some of ``count`` vectors in ``dtype``.

    Vector v is at ``x + v * x_stride``; its products plus ``bias`` (an address, in ``dtype``; 0: none),
    rounded to ``dtype``, go to ``out + v * out_stride``, or, with ``adds``, are added to what is there.
    ``mine`` is this thread's scratch, see projection_mine_bytes.
    """
    blocks, at_once, size = row_blocks(matrix, count), _rows_at_once(matrix, count), element_bytes(dtype)
    first, begin = unit % blocks * at_once, unit // blocks * VECTORS_AT_ONCE
    rows = min(at_once, matrix.rows - first)
    vectors = min(VECTORS_AT_ONCE, count - begin)
    addresses = words(mine, vectors)
    for v in range(vectors):
        addresses[v] = x + (begin + v) * x_stride
    other = floats(mine + 8 * VECTORS_AT_ONCE, rows)
    products = mine + 8 * VECTORS_AT_ONCE + 4 * rows
    multiply_rows(matrix, first, first + rows, addresses, dtype, vectors, products, 4 * rows)
    for v in range(vectors):
        values = floats(products + v * 4 * rows, rows)
        place = out + (begin + v) * out_stride + first * size
        if bias != 0:
            widen(bias + first * size, dtype, rows, other)
            _add(values, other)
        if adds:
            round_to(values, rows, dtype)
            widen(place, dtype, rows, other)
            _add(values, other)
        narrow(values, rows, place, dtype)


@inline
def _add(values, other):
    for i in range(len(values)):
        values[i] += other[i]
