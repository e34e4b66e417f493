"""Expert choice: logits by the whole team, then each token's experts by one thread.

The rules are those of kernels/reference/router.py. A logit is added up in float32 in one fixed order, so a
token's experts never depend on what else is in the pass.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import floats
from crosspool.kernels.numba.linear import VECTORS_AT_ONCE, multiply_rows, rows_of_unit, units_of
from crosspool.kernels.numba.matrix import MATRIX_WORDS, Matrix, Weight, matrix_at, put_matrix
from crosspool.kernels.numba.team import claim, meet, share

MATRIX = 0
EXPERTS, BIAS, TOP_K, SIGMOID, NORMALISE, SCALE, GROUPS, TOP_GROUPS, BEST_OF_GROUP = range(
    MATRIX_WORDS, MATRIX_WORDS + 9
)
ROUTER_WORDS = MATRIX_WORDS + 9
"""BIAS is an address (0: none), SCALE the bits of a float64; BEST_OF_GROUP experts added up rank a group."""

SCORINGS = {"softmax": 0, "sigmoid": 1}
EXPERTS_THAT_RANK = {"max": 1, "top2_sum": 2}

TINY = np.finfo(np.float32).tiny


def describe_router(
    weight: Weight,
    selection_bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    normalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
    group_score: str,
) -> np.ndarray:
    """int64 [ROUTER_WORDS] from the arguments of interface.Router. Raises ValueError for rules that cannot
    choose ``top_k`` experts, and KeyError for a rule that nobody wrote."""
    fields = np.zeros(ROUTER_WORDS, np.int64)
    put_matrix(fields, MATRIX, weight)
    experts = int(fields[MATRIX + Matrix._fields.index("rows")])
    best = EXPERTS_THAT_RANK[group_score]
    if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"{experts} experts in {groups} groups of which the best {top_groups} count")
    if groups > 1 and experts // groups < best:
        raise ValueError(f"{group_score} ranks a group by {best} experts, and it has {experts // groups}")
    if not 1 <= top_k <= experts // groups * top_groups:
        raise ValueError(f"top {top_k} of {experts} experts, {top_groups} of {groups} groups")
    if selection_bias is not None:
        _check_bias(selection_bias, experts)
        fields[BIAS] = selection_bias.data_ptr()
    fields[EXPERTS], fields[TOP_K] = experts, top_k
    fields[SIGMOID], fields[NORMALISE] = SCORINGS[scoring], normalise
    fields[GROUPS], fields[TOP_GROUPS], fields[BEST_OF_GROUP] = groups, top_groups, best
    fields.view(np.float64)[SCALE] = scale
    return fields


def _check_bias(bias: Tensor, experts: int) -> None:
    if bias.shape != (experts,) or bias.element_size() != 4 or not bias.is_floating_point():
        raise ValueError(f"selection bias {bias.dtype} {list(bias.shape)} for {experts} experts")
    if not bias.is_contiguous():
        raise ValueError(f"selection bias with strides {bias.stride()}")


def logits_floats(experts: int, groups: int) -> int:
    """Float32 values that one token's logits take: one an expert, and room to rank the groups."""
    return experts + groups


@kernel
def router_logits(shared, own, fields, x, dtype, count, logits):
    """All threads together: the logits of ``count`` tokens, at ``x`` (int64 [count], addresses) in ``dtype``.

    Token t's float32 [E] go to address ``logits + t * 4 * (E + groups)``, see ``logits_floats``. Returns when
    every thread is done.
    """
    matrix = matrix_at(fields, MATRIX)
    rows, units = rows_of_unit(matrix), units_of(matrix)
    stride = 4 * (fields[EXPERTS] + fields[GROUPS])
    share(own, units * -(-count // VECTORS_AT_ONCE))
    unit = claim(shared, own)
    while unit >= 0:
        token, first = unit // units * VECTORS_AT_ONCE, unit % units * rows
        last, tokens = min(matrix.rows, first + rows), min(VECTORS_AT_ONCE, count - token)
        out = logits + token * stride + 4 * first
        multiply_rows(matrix, first, last, x[token:], dtype, tokens, out, stride)
        unit = claim(shared, own)
    meet(shared, own)


@kernel
def route(fields, logits, chosen, gains):
    """One token's experts: ``chosen`` int64 [>= top_k], the best first, of equals the lowest id first, and
    their weights ``gains`` float32 [>= top_k].

    ``logits`` is the address of the token's float32 [E + groups] as from ``router_logits``; they are
    overwritten. The selection bias decides who is chosen and never enters the weights.
    """
    top_k = fields[TOP_K]
    scores = floats(logits, fields[EXPERTS])
    if fields[SIGMOID]:
        for expert in range(len(scores)):
            scores[expert] = np.float32(1) / (np.float32(1) + np.exp(-scores[expert]))
    else:
        _softmax(scores)
    _choose(fields, scores, floats(logits + 4 * fields[EXPERTS], fields[GROUPS]), chosen, gains)
    total = np.float32(0)
    for place in range(top_k):
        gains[place] = scores[chosen[place]]
        total += gains[place]
    if fields[NORMALISE]:
        for place in range(top_k):
            gains[place] /= max(total, TINY)
    scale = np.float32(fields.view(np.float64)[SCALE])
    for place in range(top_k):
        gains[place] *= scale


@inline
def _softmax(scores):
    """In place, added up in order."""
    highest = scores[0]
    for expert in range(len(scores)):
        highest = max(highest, scores[expert])
    total = np.float32(0)
    for expert in range(len(scores)):
        scores[expert] = np.exp(scores[expert] - highest)
        total += scores[expert]
    for expert in range(len(scores)):
        scores[expert] /= total


@inline
def _choose(fields, scores, ranks, chosen, gains):
    """The best experts of the best groups (arXiv 2405.04434) into ``chosen``. ``gains`` holds what ranked
    them meanwhile, ``ranks`` [groups] what ranks the groups."""
    groups = fields[GROUPS]
    width = len(scores) // groups
    bias = floats(fields[BIAS], len(scores))
    biased = fields[BIAS] != 0
    if groups > 1:
        for group in range(groups):
            begin = group * width
            ranks[group] = _rank_of_group(scores, bias, biased, begin, width, fields[BEST_OF_GROUP])
    found = 0
    for group in range(groups):
        if groups > 1 and not _is_kept(ranks, group, fields[TOP_GROUPS]):
            continue
        for expert in range(group * width, (group + 1) * width):
            rank = scores[expert] + bias[expert] if biased else scores[expert]
            found = _insert(chosen, gains, found, fields[TOP_K], expert, rank)


@inline
def _rank_of_group(scores, bias, biased, begin, width, best_of_group):
    """The rank of its best expert, or the sum of its best two."""
    best = np.float32(-np.inf)
    second = np.float32(-np.inf)
    for expert in range(begin, begin + width):
        rank = scores[expert] + bias[expert] if biased else scores[expert]
        if _beats(rank, best):
            best, second = rank, best
        elif _beats(rank, second):
            second = rank
    return best + second if best_of_group == 2 else best


@inline
def _is_kept(ranks, group, top_groups):
    """Whether fewer than ``top_groups`` groups come before this one."""
    before = 0
    for other in range(len(ranks)):
        if _beats(ranks[other], ranks[group]) or (other < group and not _beats(ranks[group], ranks[other])):
            before += 1
    return before < top_groups


@inline
def _insert(chosen, ranks, found, most, expert, rank):
    """Insert an expert into the ``found`` best, of which ``most`` stay. Returns how many are found now."""
    if found == most:
        if not _beats(rank, ranks[most - 1]):
            return found
        found -= 1
    place = found
    while place > 0 and _beats(rank, ranks[place - 1]):
        chosen[place], ranks[place] = chosen[place - 1], ranks[place - 1]
        place -= 1
    chosen[place], ranks[place] = expert, rank
    return found + 1


@inline
def _beats(rank, other):
    """Greater, where what is not a number is greater than any number, so that it shows in the result."""
    return rank > other or (rank != rank and other == other)
