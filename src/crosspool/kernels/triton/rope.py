"""Rotary position embedding (arXiv 2104.09864) inside kernels. Meaning: kernels/reference/rope.py.

Heads come as two blocks of float32, the first and the second element of each pair, whether pairs are
neighbours or halves; what is not rotated is left to the caller.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels.triton.table import lane_weights
from crosspool.kernels.triton.words import FREQUENCIES

_FREQUENCIES: tl.constexpr = tl.constexpr(FREQUENCIES)
_HALF_PI: tl.constexpr = tl.constexpr(1.5707963267948966)


@triton.jit
def cos_sin(lane, position, gain, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines, times ``gain``, of each pair's angle at a position: float32 [BLOCK]."""
    at = tl.arange(0, BLOCK)
    frequencies = tl.load(lane_weights(lane, _FREQUENCIES, tl.float32) + at, mask=at < PAIRS, other=0)
    cos, sin = _cos_sin(position.to(tl.float32) * frequencies)
    return cos * gain, sin * gain


@triton.jit
def _cos_sin(angle):
    """Of an angle in radians, float32, to within one unit in the last place or so up to a million and more.

    The quarter turns are taken off in float64, where that is exact enough. Of what remains, at most pi / 4,
    the Taylor series up to the ninth power are exact to 3e-8. (The functions of the GPU's library do the
    same, but keep a table for much larger angles, in memory.)
    """
    turns = tl.floor(angle.to(tl.float64) / _HALF_PI + 0.5)
    rest = (angle.to(tl.float64) - turns * _HALF_PI).to(tl.float32)
    square = rest * rest
    sin = rest + rest * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square / 362880)))
    cos = 1 - square * (0.5 - square * (1 / 24 - square * (1 / 720 - square / 40320)))
    quarter = turns.to(tl.int32) & 3
    swapped = (quarter & 1) == 1
    turned_cos, turned_sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    cos_sign = tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    sin_sign = tl.where(quarter >= 2, -1.0, 1.0)
    return turned_cos * cos_sign, turned_sin * sin_sign


@triton.jit
def load_pairs(heads, mask, PAIRS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of ``heads`` (pointers [n, 1]) that ``mask`` [n, 1] wants: float32 [n, BLOCK] twice."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * BLOCK)
        both = tl.load(heads + at[None, :], mask=mask & (at < 2 * PAIRS)[None, :], other=0)
        first, second = tl.split(tl.reshape(both, (heads.shape[0], BLOCK, 2)))
    else:
        at = tl.arange(0, BLOCK)
        wanted = mask & (at < PAIRS)[None, :]
        first = tl.load(heads + at[None, :], mask=wanted, other=0)
        second = tl.load(heads + PAIRS + at[None, :], mask=wanted, other=0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_turned(
    heads, mask, first, second, cos, sin, PAIRS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Rotate pairs [n, BLOCK], and store them in the type of ``heads`` as ``load_pairs`` reads them."""
    dtype: tl.constexpr = heads.dtype.scalar.element_ty
    turned_first = (first * cos[None, :] - second * sin[None, :]).to(dtype)
    turned_second = (second * cos[None, :] + first * sin[None, :]).to(dtype)
    if INTERLEAVED:
        at = tl.arange(0, 2 * BLOCK)
        both = tl.interleave(turned_first, turned_second)
        tl.store(heads + at[None, :], both, mask=mask & (at < 2 * PAIRS)[None, :])
    else:
        at = tl.arange(0, BLOCK)
        wanted = mask & (at < PAIRS)[None, :]
        tl.store(heads + at[None, :], turned_first, mask=wanted)
        tl.store(heads + PAIRS + at[None, :], turned_second, mask=wanted)
