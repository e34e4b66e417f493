"""Elementary functions of float32 in plain arithmetic, so that loops over them become vector code."""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline
from crosspool.kernels.numba.intrinsics import bits_of_float, float_of_bits

LOG2_E = np.float32(1.44269504)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(np.log(2) - 0.693359375)
"""ln 2 as a short number, whose products with small integers are exact, and the rest."""

ROUNDS = np.float32(1.5 * 2**23)
"""Added to a float32 below 2**22, it leaves the nearest integer in the low bits."""

LOWEST, HIGHEST = np.float32(-87), np.float32(89)
"""Below LOWEST results would lose bits, and then be 0: such numbers cost a processor a hundred cycles."""

ZERO = np.float32(0)
C2, C3, C4, C5, C6, C7 = (np.float32(1 / value) for value in (2, 6, 24, 120, 720, 5040))
ONE = np.float32(1)


@inline
def exp(x):
    """e to the power of a float32, within 2 units in the last place; 0 below -87, infinity above 89.

    x = n ln 2 + r with |r| <= ln 2 / 2, and e**r by its Taylor series.
    """
    small = x < LOWEST
    x = HIGHEST if x > HIGHEST else x
    x = LOWEST if small else x
    shifted = x * LOG2_E + ROUNDS
    n = shifted - ROUNDS
    power = np.int32(bits_of_float(shifted)) - np.int32(bits_of_float(ROUNDS))
    r = x - n * LN2_HIGH - n * LN2_LOW
    series = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))))
    half = np.int32(power >> np.int32(1))
    value = series * _power_of_two(half) * _power_of_two(np.int32(power - half))
    return ZERO if small else value


@inline
def _power_of_two(n):
    """2 to the power of an int32 from -126 to 127."""
    return float_of_bits(np.uint32(np.uint32(n + np.int32(127)) << np.uint32(23)))
