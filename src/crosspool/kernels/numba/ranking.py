"""The best of many without sorting them all: binary heaps of (value, id).

The order is: larger values first, and of equals the lowest id. A heap is two arrays of which the first
``count`` entries are in use, with the first in order at the root. Of negated values and ids, that is the one
last in order.
"""

from __future__ import annotations

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel

ROOT = np.int64(0)
"""Not plain 0, for which Numba would compile every function once more."""


@inline
def _precedes(value, identifier, other_value, other_identifier):
    return value > other_value or (value == other_value and identifier < other_identifier)


@kernel
def settle(values, ids, place, count, value, identifier):
    """Put an entry at ``place`` or below it, such that the heap is one again if what was there is gone."""
    child = 2 * place + 1
    while child < count:
        sibling = child + 1
        if sibling < count and _precedes(values[sibling], ids[sibling], values[child], ids[child]):
            child = sibling
        if not _precedes(values[child], ids[child], value, identifier):
            break
        values[place], ids[place] = values[child], ids[child]
        place = child
        child = 2 * place + 1
    values[place], ids[place] = value, identifier


@kernel
def make_heap(values, ids, count):
    """Make a heap of ``count`` entries in any order."""
    for place in range(count // 2 - 1, -1, -1):
        settle(values, ids, place, count, values[place], ids[place])


@kernel
def best_of(candidates, count, most, values, ids):
    """The ``most`` best of ``count`` candidates, whose ids are their places: a heap of them, negated, in
    ``values`` (float64) and ``ids`` (int64), so that its root is the last of them. 1 <= most <= count."""
    for i in range(most):
        values[i], ids[i] = -candidates[i], -i
    make_heap(values, ids, most)
    last = -values[0]
    for i in range(most, count):
        # A later one that equals the last comes after it.
        if candidates[i] > last:
            settle(values, ids, ROOT, most, -candidates[i], -i)
            last = -values[0]


@kernel
def sort_best(values, ids, count):
    """Turn a heap from ``best_of`` into its entries, no longer negated, in order."""
    for place in range(count - 1, -1, -1):
        value, identifier = -values[0], -ids[0]
        if place > 0:
            settle(values, ids, ROOT, place, values[place], ids[place])
        values[place], ids[place] = value, identifier
