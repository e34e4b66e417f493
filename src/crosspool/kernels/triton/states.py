"""States of attention to parts of a context, and how they become results.

A state is what a query's head has of one block of positions on one device: best score, total of weights, sum
of values. States are merged in the order of blocks, and of devices within a block, wherever they were
computed; a state of nothing changes no bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.attend import AttentionShape, nothing_yet
from crosspool.kernels.triton.batch import BLOCK, NOT_SPECIAL, Pass, first_seen, position_of

_QUERIES: tl.constexpr = tl.constexpr(words.QUERIES)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)

STATES_AT_ONCE = 16


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
    of the blocks that a query sees with this window, or with None of one block, which is all that it sees
    (prefill.attend_part). Nothing is written for a row that does not live."""
    parts, queries, blocks, heads, width = states.sums.shape
    _merge[(batch.most_queries, heads)](
        batch.lane,
        batch.starts,
        batch.firsts,
        batch.row_of,
        states.sums,
        states.scores,
        attended,
        window,
        queries * blocks * heads,
        blocks,
        HEADS=heads,
        WIDTH=width,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        PARTS=parts,
        AT_ONCE=STATES_AT_ONCE,
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
    attended,
    window,
    part_stride,
    blocks,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Program (t, n): head n of query t. States are taken ``AT_ONCE`` at a time from multiples of that."""
    query, head = tl.program_id(0), tl.program_id(1)
    if query >= tl.load(lane + _QUERIES):
        return
    position = position_of(starts, firsts, tl.load(row_of + query), query)
    if position < 0:
        return
    if window is None:
        first, end = 0, PARTS
    else:
        first = first_seen(position, window) // _BLOCK * PARTS
        end = (position // _BLOCK + 1) * PARTS
    at = tl.arange(0, WIDTH_BLOCK)[None, :]
    best, total, merged = nothing_yet(1, WIDTH_BLOCK)
    for begin in tl.range(first // AT_ONCE * AT_ONCE, end, AT_ONCE):
        number = begin + tl.arange(0, AT_ONCE)
        real = (number >= first) & (number < end)
        place = (query.to(tl.int64) * blocks + number // PARTS) * HEADS + head
        place += (number % PARTS).to(tl.int64) * part_stride
        own_best = tl.load(scores + 2 * place, mask=real, other=float("-inf"))
        own_total = tl.load(scores + 2 * place + 1, mask=real, other=0)
        wanted = real[:, None] & (at < WIDTH)
        own_sums = tl.load(sums + place[:, None] * WIDTH + at, mask=wanted, other=0)
        new_best = tl.maximum(best, tl.max(own_best, 0))
        fade, weight = tl.exp2(best - new_best), tl.exp2(own_best - new_best)
        total = total * fade + tl.sum(own_total * weight, 0)
        merged = merged * fade[:, None] + tl.sum(own_sums * weight[:, None], 0)[None, :]
        best = new_best
    result = (merged / total[:, None]).to(attended.dtype.element_ty)
    out = attended + (query.to(tl.int64) * HEADS + head) * WIDTH
    tl.store(out + at, result, mask=at < WIDTH)
