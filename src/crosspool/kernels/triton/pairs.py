"""Pairs of a token and one of its experts, sorted by expert, so that tokens of an expert share its weights.

Each program has one expert: it counts everybody's pairs and so knows where its own begin, then writes them
down in order. Nothing is added up between programs, and nothing waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.words import QUERIES

_QUERIES: tl.constexpr = tl.constexpr(QUERIES)

AT_ONCE = 1024
BLOCK_FIELDS = 4


class Pairs(NamedTuple):
    """Pair ``token * top_k + choice`` of each place in ``order`` int32 [pairs], those of the lowest expert
    first and of one expert the lowest first. ``blocks`` int32 [.., BLOCK_FIELDS] cut them into what one tile
    of tokens takes: the expert, the first place and the place after the last (the fourth is unused);
    ``number`` int32 [1] says how many blocks there are."""

    order: Tensor
    blocks: Tensor
    number: Tensor


def most_blocks(pairs: int, experts: int, tokens: int) -> int:
    """The most blocks of up to ``tokens`` pairs of one expert that so many pairs can make."""
    begun = min(pairs, experts)
    return begun + (pairs - begun) // tokens


def pairs_room(capacity: int, experts: int, top_k: int, tokens: int, device: torch.device) -> Pairs:
    pairs = capacity * top_k
    shapes = ((pairs,), (most_blocks(pairs, experts, tokens), BLOCK_FIELDS), (1,))
    return Pairs(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))


def sort_pairs(chosen: Tensor, lane: Tensor, experts: int, tokens: int, out: Pairs) -> None:
    """``chosen`` int32 [T, top_k], of which the lane's QUERIES count, into ``out``; blocks of up to
    ``tokens``, a power of two."""
    top_k = chosen.shape[1]
    _sort_pairs[(experts,)](
        lane,
        chosen,
        *out,
        EXPERTS=experts,
        TOP_K=top_k,
        TOKENS=tokens,
        BINS=triton.next_power_of_2(max(experts, 32)),
        AT_ONCE=min(triton.next_power_of_2(max(chosen.numel(), 32)), AT_ONCE),
        FIELDS=BLOCK_FIELDS,
        num_warps=4,
    )


@triton.jit
def _sort_pairs(
    lane,
    chosen,
    order,
    blocks,
    number,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    mine = tl.program_id(0)
    pairs = tl.load(lane + _QUERIES).to(tl.int32) * TOP_K
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, pairs, AT_ONCE):
        pair = first + tl.arange(0, AT_ONCE)
        expert = tl.load(chosen + pair, mask=pair < pairs, other=0)
        counts += tl.histogram(expert, BINS, mask=pair < pairs)
    before = tl.arange(0, BINS) < mine
    full = (counts + TOKENS - 1) // TOKENS
    if mine == 0:
        tl.store(number, tl.sum(full))
    begin = tl.sum(tl.where(before, counts, 0))
    end = begin + tl.sum(tl.where(tl.arange(0, BINS) == mine, counts, 0))
    block = blocks + tl.sum(tl.where(before, full, 0)) * FIELDS
    for first in range(begin, end, TOKENS):
        tl.store(block, mine)
        tl.store(block + 1, first)
        tl.store(block + 2, tl.minimum(first + TOKENS, end))
        block += FIELDS
    if begin == end:
        return
    for first in range(0, pairs, AT_ONCE):
        pair = first + tl.arange(0, AT_ONCE)
        ours = (tl.load(chosen + pair, mask=pair < pairs, other=-1) == mine).to(tl.int32)
        tl.store(order + begin + tl.cumsum(ours, 0) - 1, pair, mask=ours != 0)
        begin += tl.sum(ours)
