"""The largest of many float32, at the speed of memory."""

from __future__ import annotations

import numpy as np
from numba import carray

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.intrinsics import float_of_bits, floats, pointer

BLOCK = 2048
INFINITY = np.int32(0x7F800000)
MINUS_INFINITY = np.uint32(0xFF800000)
"""The bits of the infinities: beyond them, in either direction, lies what is not a number."""

ZERO, LEAST, MOST = np.int32(0), np.int32(-(2**31)), np.uint32(2**32 - 1)


@kernel
def largest(address, count):
    """The place of the largest of float32 [count] at an address, of equals the lowest place; -1 if no
    largest finite number exists: NaN or +infinity is among them, or there is nothing but -infinity.

    Maxima of integers may be taken in any order, so a compiler makes vector code of them. As integers with a
    sign, floats above zero are in order; as integers without, those below zero are in reverse.
    """
    best = np.float32(-np.inf)
    begin_of_best = -1
    for begin in range(0, count, BLOCK):
        # Indices that begin at 0 are seen not to be negative, which Numba would count from the end.
        width = min(BLOCK, count - begin)
        signed = carray(pointer(address + 4 * begin), (BLOCK,), np.int32)
        unsigned = carray(pointer(address + 4 * begin), (BLOCK,), np.uint32)
        highest, nearest, farthest = LEAST, MOST, np.uint32(0)
        for i in range(width):
            highest = max(highest, signed[i])
            nearest = min(nearest, unsigned[i])
            farthest = max(farthest, unsigned[i])
        if highest >= INFINITY or farthest > MINUS_INFINITY:
            return -1
        value = float_of_bits(np.uint32(highest)) if highest >= ZERO else float_of_bits(nearest)
        if value > best:
            best, begin_of_best = value, begin
    if begin_of_best < 0:
        return -1
    values = floats(address, count)
    place = begin_of_best
    while values[place] != best:
        place += 1
    return place
