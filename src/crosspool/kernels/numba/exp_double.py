"""The exponential of float64 in plain arithmetic, so that loops over it become vector code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from crosspool.kernels.numba.compile import inline
from crosspool.kernels.numba.intrinsics import I64, declared, pointer

F64 = ir.DoubleType()

LOG2_E = 1 / math.log(2)
LN2_HIGH = math.log(2)
LN2_LOW = 2.3190468138462996e-17
"""ln 2 rounded to float64, and the rest."""

ROUNDS = 1.5 * 2.0**52
"""Added to a float64 below 2**51, it leaves the nearest integer in the low bits."""

ROUNDS_BITS = int(np.float64(ROUNDS).view(np.int64))
LOWEST = -746.0
C2, C3, C4, C5, C6, C7, C8, C9, C10, C11, C12, C13 = (1 / math.factorial(n) for n in range(2, 14))


@intrinsic
def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.call(declared(builder, "llvm.fma.f64", F64, [F64] * 3), arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


@intrinsic
def bits_of_double(typing: Any, value: Any) -> Any:
    """The bits (int64) of a float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I64)

    return types.int64(types.float64), generate


@intrinsic
def double_of_bits(typing: Any, bits: Any) -> Any:
    """The float64 whose bits these (int64) are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F64)

    return types.float64(types.int64), generate


@inline
def doubles(address, count):
    """float64 [count] at an address."""
    return carray(pointer(address), (count,), np.float64)


@inline
def exp_of_negative(x):
    """e to the power of a float64 of at most 0, within 1 unit in the last place; 1 for 0, 0 below -746.

    x = n ln 2 + r with |r| <= ln 2 / 2, and e**r by its Taylor series.
    """
    x = x if x > LOWEST else LOWEST
    shifted = _fused(x, LOG2_E, ROUNDS)
    n = shifted - ROUNDS
    power = bits_of_double(shifted) - ROUNDS_BITS
    r = _fused(-n, LN2_LOW, _fused(-n, LN2_HIGH, x))
    series = _fused(r, _fused(r, C13, C12), C11)
    series = _fused(r, _fused(r, _fused(r, series, C10), C9), C8)
    series = _fused(r, _fused(r, _fused(r, series, C7), C6), C5)
    series = _fused(r, _fused(r, _fused(r, series, C4), C3), C2)
    series = _fused(r, _fused(r, series, 1.0), 1.0)
    half = power >> 1
    return series * _power_of_two(half) * _power_of_two(power - half)


@inline
def _power_of_two(n):
    """2 to the power of an int64 from -1022 to 1023."""
    return double_of_bits((n + 1023) << 52)
