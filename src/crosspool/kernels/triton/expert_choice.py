"""The rules by which a token's experts are chosen from their logits (kernels/reference/router.py).

Experts stand in columns. Where there are groups, each has a power of two of columns, some of them empty, so
that groups are the rows of a reshaped tile; columns are in the order of ids. What is compared are **keys**,
64-bit integers in the order of floating numbers, of which equal numbers get the greater one the lower their
column: so no two are equal, and the lowest id comes first. What is not a number is greater than any number,
so that it shows in the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NONE: tl.constexpr = tl.constexpr(-(2**63))
"""A key below all others."""


@triton.jit
def scores_of(logits, exists, SIGMOID: tl.constexpr):
    """float32 [tokens, columns] -> likewise, 0 in empty columns."""
    if SIGMOID:
        scores = tl.where(exists, 1 / (1 + tl.exp(-logits)), 0.0)
    else:
        highest = tl.max(tl.where(exists, logits, float("-inf")), 1)
        shares = tl.where(exists, tl.exp(logits - highest[:, None]), 0.0)
        scores = shares / tl.sum(shares, 1)[:, None]
    return scores


@triton.jit
def best_experts(
    ranks,
    exists,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    """int32 [tokens, columns]: 1 for the TOP_K best by ``ranks``, of the best TOP_GROUPS of GROUPS."""
    keys = tl.where(exists, _keys(ranks), _NONE)
    if GROUPS > 1:
        keys = _of_best_groups(ranks, keys, GROUPS, TOP_GROUPS, BEST_OF_GROUP, GROUP_COLUMNS)
    chosen = tl.zeros(ranks.shape, tl.int32)
    for _ in range(TOP_K):
        best = keys == tl.max(keys, 1)[:, None]
        chosen = tl.where(best, 1, chosen)
        keys = tl.where(best, _NONE, keys)
    return chosen


@triton.jit
def _keys(values):
    """int64 [rows, columns]: see above. Numbers must not be -0."""
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    columns = tl.arange(0, values.shape[1])
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - columns)[None, :]


@triton.jit
def _of_best_groups(
    ranks,
    keys,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_OF_GROUP: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
):
    """Keys, but none outside each token's best groups (arXiv 2405.04434): those whose best expert, or whose
    best two together, rank highest."""
    tokens: tl.constexpr = keys.shape[0]
    groups: tl.constexpr = keys.shape[1] // GROUP_COLUMNS
    ranks = ranks.reshape(tokens, groups, GROUP_COLUMNS)
    keys = keys.reshape(tokens, groups, GROUP_COLUMNS)
    best = keys == tl.max(keys, 2)[:, :, None]
    rank = tl.sum(tl.where(best, ranks, 0.0), 2)
    if BEST_OF_GROUP == 2:
        others = tl.where(best, _NONE, keys)
        second = others == tl.max(others, 2)[:, :, None]
        rank += tl.sum(tl.where(second, ranks, 0.0), 2)
    group_keys = tl.where(tl.arange(0, groups)[None, :] < GROUPS, _keys(rank), _NONE)
    before = tl.sum((group_keys[:, None, :] > group_keys[:, :, None]).to(tl.int32), 2)
    return tl.where((before < TOP_GROUPS)[:, :, None], keys, _NONE).reshape(tokens, groups * GROUP_COLUMNS)
