"""A seeded draw: the same numbers as kernels/reference/sampling.py.

SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) as a
function of its counter.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z):
    """The finaliser of SplitMix64: a bijection on 64 bits."""
    z = (z ^ (z >> 30)) * _FIRST_FACTOR
    z = (z ^ (z >> 27)) * _SECOND_FACTOR
    return z ^ (z >> 31)


@triton.jit
def uniform(seed, index):
    """The draw number ``index`` of ``seed`` (int64 both), uniform in [0, 1), with 53 random bits."""
    counter = (index + 1).to(tl.uint64) * _GOLDEN
    return (_mix(_mix(seed.to(tl.uint64)) + counter) >> 11).to(tl.float64) * (2.0**-53)
