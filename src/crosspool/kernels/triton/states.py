"""States of attention to parts of a context, and how they become results.

A state is what a query's head has of one block of positions on one device: best score, total of weights, sum
of values. States are merged in the order of devices within a block, and then of blocks, wherever they were
computed; a state of nothing changes no bit. So a context on several devices gives the same bits as on one, if
each block is on one of them. Where that would be too much to send, a device folds its states into one of
each query and head first: then the bits are those of any one device only for what is wholly there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.attend import NOTHING, AttentionShape, nothing_yet
from crosspool.kernels.triton.batch import BLOCK, NOT_SPECIAL, Pass, first_seen, position_of

_QUERIES: tl.constexpr = tl.constexpr(words.QUERIES)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)

BLOCKS_AT_ONCE = 16


class States(NamedTuple):
    """Room for states of P parts (devices), T queries, B blocks and N heads, float32 and contiguous:
    ``sums`` [P, T, B, N, width] and ``scores`` [P, T, B, N, 2], the best score and the total of weights."""

    sums: Tensor
    scores: Tensor

    @staticmethod
    def room(shape: AttentionShape, queries: int, context: int, parts: int, device: torch.device) -> States:
        """For up to ``queries`` queries of contexts of up to ``context`` tokens."""
        place = (parts, queries, -(-context // BLOCK), shape.heads)
        return States(
            torch.empty(*place, shape.width, dtype=torch.float32, device=device),
            torch.empty(*place, 2, dtype=torch.float32, device=device),
        )

    def part(self, part: int) -> States:
        """The states of one device, as a room of one part."""
        return States(self.sums[part : part + 1], self.scores[part : part + 1])

    @property
    def most_blocks(self) -> int:
        return self.sums.shape[2]


def merge_states(batch: Pass, states: States, window: int | None, attended: Tensor) -> None:
    """The results of all queries to ``attended`` [T, N, width] in model dtype, from the states of all parts:
    of the blocks that a query sees with this window, or with None of all that there is room for. Nothing is
    written for a row that does not live."""
    _launch(batch, states, window, attended, None)


def fold_states(batch: Pass, states: States, window: int | None, folded: States) -> None:
    """Likewise to one state of each query and head, in a room of one part and one block."""
    _launch(batch, states, window, folded.sums, folded.scores)


def _launch(batch: Pass, states: States, window: int | None, out: Tensor, out_scores: Tensor | None) -> None:
    parts, queries, blocks, heads, width = states.sums.shape
    _merge[(batch.most_queries, heads)](
        batch.lane,
        batch.starts,
        batch.firsts,
        batch.row_of,
        states.sums,
        states.scores,
        out,
        out_scores,
        window,
        queries * blocks * heads,
        blocks,
        HEADS=heads,
        WIDTH=width,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        PARTS=parts,
        AT_ONCE=BLOCKS_AT_ONCE,
        num_warps=4,
    )


@triton.jit
def store_state(
    sums,
    scores,
    token,
    block,
    blocks,
    head,
    mask,
    best,
    total,
    values,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """States of heads [m] of queries (one, or [m]) of a block, to where States has them."""
    place = (token.to(tl.int64) * blocks + block) * HEADS + head
    tl.store(scores + 2 * place, best, mask=mask)
    tl.store(scores + 2 * place + 1, total, mask=mask)
    at = tl.arange(0, WIDTH_BLOCK)
    wanted = mask[:, None] & (at < WIDTH)[None, :]
    tl.store(sums + place[:, None] * WIDTH + at[None, :], values, mask=wanted)


@triton.jit(do_not_specialize=[*NOT_SPECIAL, "part_stride", "blocks"])
def _merge(
    lane,
    starts,
    firsts,
    row_of,
    sums,
    scores,
    out,
    out_scores,
    window,
    part_stride,
    blocks,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Program (t, n): head n of query t. Blocks are taken ``AT_ONCE`` at a time."""
    query, head = tl.program_id(0), tl.program_id(1)
    if query >= tl.load(lane + _QUERIES):
        return
    position = position_of(starts, firsts, tl.load(row_of + query), query)
    if position < 0:
        return
    if window is None:
        first, end = 0, blocks
    else:
        first, end = first_seen(position, window) // _BLOCK, position // _BLOCK + 1
    at = tl.arange(0, WIDTH_BLOCK)[None, :]
    best, total, merged = nothing_yet(1, WIDTH_BLOCK)
    for begin in tl.range(first, end, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)
        real = block < end
        place = (query.to(tl.int64) * blocks + block) * HEADS + head
        block_best, block_total, block_sums = _load_state(sums, scores, place, real, at, WIDTH)
        for _ in tl.static_range(1, PARTS):
            place += part_stride
            other_best, other_total, other_sums = _load_state(sums, scores, place, real, at, WIDTH)
            new_best = tl.maximum(block_best, other_best)
            fade, weight = tl.exp2(block_best - new_best), tl.exp2(other_best - new_best)
            block_total = block_total * fade + other_total * weight
            block_sums = block_sums * fade[:, None] + other_sums * weight[:, None]
            block_best = new_best
        new_best = tl.maximum(best, tl.max(block_best, 0))
        fade, weight = tl.exp2(best - new_best), tl.exp2(block_best - new_best)
        total = total * fade + tl.sum(block_total * weight, 0)
        merged = merged * fade[:, None] + tl.sum(block_sums * weight[:, None], 0)[None, :]
        best = new_best
    place = query.to(tl.int64) * HEADS + head
    if out_scores is None:
        result = (merged / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place * WIDTH + at, result, mask=at < WIDTH)
    else:
        tl.store(out + place * WIDTH + at, merged, mask=at < WIDTH)
        one = tl.arange(0, 1)
        tl.store(out_scores + 2 * place + one, best)
        tl.store(out_scores + 2 * place + 1 + one, total)


@triton.jit
def _load_state(sums, scores, place, real, at, WIDTH: tl.constexpr):
    """States at ``place`` [n]; nothing of those that are not ``real``."""
    best = tl.load(scores + 2 * place, mask=real, other=NOTHING)
    total = tl.load(scores + 2 * place + 1, mask=real, other=0)
    values = tl.load(sums + place[:, None] * WIDTH + at, mask=real[:, None] & (at < WIDTH), other=0)
    return best, total, values
