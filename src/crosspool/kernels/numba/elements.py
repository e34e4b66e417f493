"""Storage types and their conversion: kernels compute in float32 and store in a model's own type.

Codes instead of types, because one compiled kernel serves every model.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import (
    bits_of_float,
    float_of_bits,
    float_of_half,
    floats,
    half_of_float,
    halves,
)

FLOAT32 = 0
BFLOAT16 = 1
FLOAT16 = 2
INT8 = 3
"""Weights only: a row of int8 and one float32 scale."""


@inline
def element_bytes(dtype):
    """Bytes of one element."""
    return 4 if dtype == FLOAT32 else 1 if dtype == INT8 else 2


@inline
def float_of_bfloat(bits):
    """The value of a bfloat16 given by its bits (uint16)."""
    return float_of_bits(np.uint32(np.uint32(bits) << np.uint32(16)))


@inline
def bfloat_of_float(value):
    """The bits (uint16) of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""
    bits = bits_of_float(value)
    odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
    quiet = np.uint32(bits | np.uint32(0x400000))
    chosen = quiet if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded
    return np.uint16(chosen >> np.uint32(16))


@kernel
def widen(address, dtype, count, out):
    """Read ``count`` elements of a 16- or 32-bit type into ``out``, float32 [>= count]."""
    if dtype == FLOAT32:
        wide = floats(address, count)
        for i in range(count):
            out[i] = wide[i]
    elif dtype == BFLOAT16:
        bits = halves(address, count)
        for i in range(count):
            out[i] = float_of_bfloat(bits[i])
    else:
        bits = halves(address, count)
        for i in range(count):
            out[i] = float_of_half(bits[i])


@kernel
def narrow(values, count, address, dtype):
    """Store ``count`` of ``values`` (float32) as elements of a 16- or 32-bit type."""
    if dtype == FLOAT32:
        wide = floats(address, count)
        for i in range(count):
            wide[i] = values[i]
    elif dtype == BFLOAT16:
        bits = halves(address, count)
        for i in range(count):
            bits[i] = bfloat_of_float(values[i])
    else:
        bits = halves(address, count)
        for i in range(count):
            bits[i] = half_of_float(values[i])


@kernel
def round_to(values, count, dtype):
    """Round ``count`` of ``values`` (float32) in place to what ``dtype`` can hold."""
    if dtype == BFLOAT16:
        for i in range(count):
            values[i] = float_of_bfloat(bfloat_of_float(values[i]))
    elif dtype == FLOAT16:
        for i in range(count):
            values[i] = float_of_half(half_of_float(values[i]))


@kernel
def add_rounded(values, count, gain, dtype, totals):
    """Add ``count`` float32 at address ``values``, rounded to ``dtype`` and then times ``gain``, to those at
    address ``totals``."""
    added, to = floats(values, count), floats(totals, count)
    if dtype == BFLOAT16:
        for i in range(count):
            to[i] += float_of_bfloat(bfloat_of_float(added[i])) * gain
    elif dtype == FLOAT16:
        for i in range(count):
            to[i] += float_of_half(half_of_float(added[i])) * gain
    else:
        for i in range(count):
            to[i] += added[i] * gain
