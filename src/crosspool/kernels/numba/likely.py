"""Filters of token choice: min_p, top_k and top_p leave only the likely tokens a weight.

What top_k and top_p keep is the beginning of one order (ranking.py), so the last that they keep says
everything.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.exp_double import bits_of_double, double_of_bits
from crosspool.kernels.numba.random_draw import add_up
from crosspool.kernels.numba.ranking import ROOT, best_of, make_heap, settle

FEW = 256
"""So many candidates of top_p are put in order; more are first sorted out by their size."""


@kernel
def keep_likely(weights, count, min_p, top_k, top_p, values, ids, sums):
    """Set to zero those of ``weights`` (float64 [>= count], the largest is 1) that the filters do not keep.

    First those below ``min_p``, then all but the ``top_k`` largest (no limit below 1), then all but the
    fewest that reach ``top_p`` of the sum of what is left (arXiv 1904.09751; 1: all). ``values`` (float64)
    and ``ids`` (int64) of ``count`` entries are scratch, and ``sums`` as for ``draw``.
    """
    if min_p > 0:
        for i in range(count):
            weights[i] = weights[i] if weights[i] >= min_p else 0.0
    if 0 < top_k < count:
        best_of(weights, count, top_k, values, ids)
        _cut_after(weights, count, -values[0], -ids[0])
    if top_p < 1:
        total = add_up(weights, count, sums)
        last, identifier = _end_of_nucleus(weights, count, total, top_p, values, ids)
        _cut_after(weights, count, last, identifier)


@inline
def _cut_after(weights, count, last, identifier):
    """Keep what comes before the weight ``last`` of token ``identifier``, and this one."""
    for i in range(count):
        kept = (weights[i] > last) | ((weights[i] == last) & (i <= identifier))
        weights[i] = weights[i] if kept else 0.0


@kernel
def _end_of_nucleus(weights, count, total, top_p, values, ids):
    """The weight and id of the last token of the nucleus."""
    # Everything below this bound together is less than 1 - top_p of the sum: it is never reached.
    bound = (1 - top_p) * total / count
    left = np.int64(0)
    for i in range(count):
        if weights[i] >= bound:
            values[left], ids[left] = weights[i], i
            left += 1
    left, reached, equal = _narrow(values, ids, left, bound, top_p * total)
    if equal:
        place = np.int64(0)
        reached += values[0]
        while reached < top_p * total and place < left - 1:
            place += 1
            reached += values[place]
        return values[place], ids[place]
    make_heap(values, ids, left)
    reached += values[0]
    while reached < top_p * total and left > 1:
        left -= 1
        settle(values, ids, ROOT, left, values[left], ids[left])
        reached += values[0]
    return values[0], ids[0]


@kernel
def _narrow(values, ids, count, low, target):
    """Leave few of ``count`` candidates, weights from ``low`` to 1, by halving the range of the bits of a
    weight.

    Returns how many are left, those among which the sum from the largest down reaches ``target``; the sum of
    those dropped that are larger; and whether those left are all equal. The lowest id stays the first.
    """
    first, end = bits_of_double(low), bits_of_double(1.0) + 1
    reached = 0.0
    while count > FEW and end - first > 1:
        middle = first + (end - first) // 2
        pivot = double_of_bits(middle)
        larger, above = np.int64(0), 0.0
        for i in range(count):
            larger += values[i] >= pivot
            above += values[i] if values[i] >= pivot else 0.0
        is_above = reached + above >= target
        if larger == count and not is_above:
            break  # Rounding: they do not reach the target at all, and the last is the end.
        kept = np.int64(0)
        for i in range(count):
            value, identifier = values[i], ids[i]
            values[kept], ids[kept] = value, identifier
            kept += (value >= pivot) == is_above
        count = kept
        if is_above:
            first = middle
        else:
            end = middle
            reached += above
    return count, reached, end - first <= 1
