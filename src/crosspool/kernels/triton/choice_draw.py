"""Where the filters of token choice end, and the draw from what they keep. Weights are float64, of tokens in
the order of their ids; nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels import choice_fields
from crosspool.kernels.triton.choice_row import real
from crosspool.kernels.triton.random_draw import uniform

_BLOCK = tl.constexpr(1024)
_SEED, _INDEX = tl.constexpr(choice_fields.SEED), tl.constexpr(choice_fields.INDEX)
_TOP_K, _TOP_P = tl.constexpr(choice_fields.TOP_K), tl.constexpr(choice_fields.TOP_P)
_BEYOND_ONE = tl.constexpr(0x3FF0000000000001)
"""The bits of the next float64 after 1, which is the largest weight."""

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def drawn(fields, weights, count, total):
    """The place of the drawn one of ``count`` weights, of ``total`` with all that can not be drawn.

    Kept are the weights whose bits are ``end`` or more, and the first ``most`` of those between ``begin`` and
    it.
    """
    begin, end, most = tl.full((), 1, tl.int64), tl.full((), _BEYOND_ONE, tl.int64), count
    above_count, above = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    inside, between = _sum_from(weights, count, begin)
    top_k, top_p = tl.load(fields + _TOP_K), real(fields, _TOP_P)
    if (top_k > 0) & (top_k < count):
        begin, end, above_count, above, inside, between = _narrow(
            weights, count, begin, end, inside, between, top_k.to(tl.float64), True
        )
        most = top_k.to(tl.int32) - above_count
        between = between * (most.to(tl.float64) / inside.to(tl.float64))
        total = above + between
    if top_p < 1:
        target = top_p * total
        # What has the last place of top_k is not all kept: it is counted to be, once it is reached.
        begin, end, above_count, above, inside, between = _narrow(
            weights,
            count,
            begin,
            tl.full((), _BEYOND_ONE, tl.int64),
            above_count + most,
            above + between,
            target,
            False,
        )
        each = between / inside.to(tl.float64)
        reach = tl.ceil((target - above) / each).to(tl.int32)
        most = tl.minimum(tl.maximum(reach, 1), inside)
    u = uniform(tl.load(fields + _SEED), tl.load(fields + _INDEX))
    return _invert(weights, count, begin, end, most, u)


@triton.jit
def _sum_from(weights, count, begin):
    """Number and sum of the weights whose bits are ``begin`` or more."""
    number, total = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    for first in range(0, count, _BLOCK):
        at = first + tl.arange(0, _BLOCK)
        own = tl.load(weights + at, at < count, 0.0)
        own = tl.where(own.to(tl.int64, bitcast=True) >= begin, own, 0.0)
        number += tl.sum((own > 0).to(tl.int32))
        total += tl.sum(own)
    return number, total


@triton.jit
def _narrow(weights, count, begin, end, inside, between, target, COUNTED: tl.constexpr):
    """Halve the range of bits from ``begin`` to ``end`` in which ``target`` is reached, from the largest
    weight down, until it holds one weight or equal ones.

    The target is a number of weights if COUNTED, else their sum. At first ``inside`` weights, whose sum is
    ``between``, are in the range and none beyond it. Returns the range, number and sum of the weights beyond
    it, and of those in it.
    """
    above_count, above = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    while (end - begin > 1) & (inside > 1):
        middle = begin + (end - begin) // 2
        number, total = _sum_from(weights, count, middle)
        reached = total
        if COUNTED:
            reached = number.to(tl.float64)
        if reached >= target:
            begin = middle
            inside, between = number - above_count, total - above
        else:
            end = middle
            inside, between = inside + above_count - number, between + above - total
            above_count, above = number, total
    return begin, end, above_count, above, inside, between


@triton.jit
def _invert(weights, count, begin, end, most, u):
    """Invert the cumulative distribution of the kept weights at ``u`` in [0, 1)."""
    total, seen = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)
    for first in range(0, count, _BLOCK):
        own, seen = _kept(weights, first, count, begin, end, most, seen)
        total += tl.sum(own)
    below = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
    target = tl.minimum(u * total, below)
    before, place, last = tl.full((), 0.0, tl.float64), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    first, seen = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    while (first < count) & (place < 0):
        own, seen = _kept(weights, first, count, begin, end, most, seen)
        at = first + tl.arange(0, _BLOCK)
        passes = (before + tl.cumsum(own) > target) & (own > 0)
        found = tl.min(tl.where(passes, at, _NOWHERE))
        place = tl.where(found < _NOWHERE, found, -1)
        last = tl.maximum(last, tl.max(tl.where(own > 0, at, 0)))
        before += tl.sum(own)
        first += _BLOCK
    # Should this order of adding not reach what the other did, it is the last one.
    return tl.where(place < 0, last, place)


@triton.jit
def _kept(weights, first, count, begin, end, most, seen):
    """A block of weights, those that are not kept as 0. ``seen`` counts those in the range before it."""
    at = first + tl.arange(0, _BLOCK)
    own = tl.load(weights + at, at < count, 0.0)
    bits = own.to(tl.int64, bitcast=True)
    within = (bits >= begin) & (bits < end)
    number = seen + tl.cumsum(within.to(tl.int32))
    kept = (bits >= end) | (within & (number <= most))
    return tl.where(kept, own, 0.0), seen + tl.sum(within.to(tl.int32))
