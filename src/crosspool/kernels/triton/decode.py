"""Attention of few queries to long contexts: every query by itself, its context split over programs.

Contexts are cut in blocks of 256 positions, counted from 0. A program computes the states of some blocks one
after another, and states.py merges them: how many programs there are changes no bit of the result, so a graph
recorded with some number of them serves every context.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.attend import (
    AttentionShape,
    attend_tile,
    load_queries,
    nothing_yet,
    shape_arguments,
    tile_of,
)
from crosspool.kernels.triton.batch import (
    BLOCK,
    NOT_SPECIAL,
    KvPlace,
    Pass,
    any_here,
    first_seen,
    kv_arguments,
    position_of,
    table_arguments,
    token_places,
)
from crosspool.kernels.triton.chip import stages, warps
from crosspool.kernels.triton.states import States, merge_states, store_state

_QUERIES: tl.constexpr = tl.constexpr(words.QUERIES)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)

SPLITS = 32
"""States that attend_splits makes of each query and head. No property of the chip, for the order of sums
depends on it: one query of a model with few key-value heads then has a program on most multiprocessors."""

HEADS_AT_ONCE = 32
"""Most query heads that a program has; tensor cores want 16 at least, heads beyond a group's are padding."""


def decode_attention(
    batch: Pass,
    kv: KvPlace,
    shape: AttentionShape,
    query: Tensor,
    states: States,
    attended: Tensor,
    splits: int,
) -> None:
    """``query`` [T, N, width + rotary] to ``attended`` [T, N, width], over pages that hold this pass's KV.

    Meaning: kernels/interface.py, GqaAttention and MlaAttention. ``states`` has room for one part. Each
    key-value head of each query gets ``splits`` programs (or more, if it has many heads); with T x K x
    splits of about twice the multiprocessors, all of them are busy and few programs have nothing to do.
    """
    attend_blocks(batch, kv, shape, query, states, splits)
    merge_states(batch, states, kv.window, attended)


def attend_blocks(
    batch: Pass,
    kv: KvPlace,
    shape: AttentionShape,
    query: Tensor,
    states: States,
    splits: int,
    *,
    sparse: bool = False,
) -> None:
    """Only the states, of one part: of every block that a query sees, and what this device has of it. With
    ``sparse`` no time is lost with blocks of which it has nothing."""
    _launch(batch, kv, shape, query, states, splits, sparse=sparse, running=False)


def attend_splits(batch: Pass, kv: KvPlace, shape: AttentionShape, query: Tensor, states: States) -> None:
    """Likewise, but state s is of all blocks number s, s + S, s + 2 S and so on, where ``states`` has room
    for S: memory does not grow with the context, and one block has no state of its own."""
    _launch(batch, kv, shape, query, states, states.most_blocks, sparse=True, running=True)


def _launch(
    batch: Pass,
    kv: KvPlace,
    shape: AttentionShape,
    query: Tensor,
    states: States,
    splits: int,
    *,
    sparse: bool,
    running: bool,
) -> None:
    tile = tile_of(shape, query)
    at_once = min(max(triton.next_power_of_2(shape.group), 16), HEADS_AT_ONCE)
    head_parts = shape.kv_heads * triton.cdiv(shape.group, at_once)
    _attend_blocks[(batch.most_queries, head_parts, splits)](
        batch.lane,
        batch.starts,
        batch.firsts,
        batch.row_of,
        query=query,
        sums=states.sums,
        scores=states.scores,
        window=kv.window,
        blocks=states.most_blocks,
        **table_arguments(batch, kv),
        **kv_arguments(kv, query.dtype),
        **shape_arguments(shape),
        AT_ONCE=at_once,
        TILE=tile,
        SPARSE=sparse,
        RUNNING=running,
        num_warps=warps(8 if shape.width > 256 else 4),
        # With three, the compiler keeps a running state in fewer registers than it needs.
        num_stages=stages(2 if running else 3),
    )


@triton.jit(do_not_specialize=[*NOT_SPECIAL, "blocks"])
def _attend_blocks(
    lane,
    starts,
    firsts,
    row_of,
    query,
    sums,
    scores,
    window,
    blocks,
    pages,
    pages_stride,
    pages_begin,
    arena,
    page_stride,
    region,
    scale,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    ROTARY_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    SPARSE: tl.constexpr,
    RUNNING: tl.constexpr,
):
    """Program (t, i, s): of query t, some heads that share a key and value, and every block number s, s +
    splits, and so on. ``RUNNING``: one state of all of them, instead of one of each."""
    token, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if token >= tl.load(lane + _QUERIES):
        return
    row = tl.load(row_of + token)
    position = position_of(starts, firsts, row, token)
    if position < 0:
        return
    head_parts: tl.constexpr = (GROUP + AT_ONCE - 1) // AT_ONCE
    kv_head = part // head_parts
    member = part % head_parts * AT_ONCE + tl.arange(0, AT_ONCE)
    real = member < GROUP
    own = query + ((token.to(tl.int64) * KV_HEADS + kv_head) * GROUP + member) * (WIDTH + ROTARY)
    queries = load_queries(own, real, 0, WIDTH, WIDTH_BLOCK)
    rotary_queries = queries
    if ROTARY > 0:
        rotary_queries = load_queries(own, real, WIDTH, ROTARY, ROTARY_BLOCK)
    table = pages + row * pages_stride + pages_begin
    seen_from = first_seen(position, window)
    base = arena + region + kv_head * (WIDTH + ROTARY)
    token_stride: tl.constexpr = KV_HEADS * (WIDTH + ROTARY)
    values_offset: tl.constexpr = TOKENS * KV_HEADS * WIDTH
    head = kv_head * GROUP + member
    if RUNNING:
        best, total, values = nothing_yet(AT_ONCE, WIDTH_BLOCK)
    for block in range(seen_from // _BLOCK + split, position // _BLOCK + 1, tl.num_programs(2)):
        if not RUNNING:
            best, total, values = nothing_yet(AT_ONCE, WIDTH_BLOCK)
        stop = _BLOCK
        if SPARSE:
            end = tl.minimum((block + 1) * _BLOCK, position + 1)
            here = any_here(table, tl.maximum(block * _BLOCK, seen_from), end, _BLOCK, TOKENS)
            stop = tl.where(here, _BLOCK, 0)
        positions = block * _BLOCK + tl.arange(0, TILE)
        there = (positions >= seen_from) & (positions <= position)
        place, there = token_places(table, positions, there, page_stride, TOKENS, token_stride)
        for _ in tl.range(0, stop, TILE):
            # A tile's pages are looked up while the one before is computed.
            positions += TILE
            next_there = (positions >= seen_from) & (positions <= position)
            next_place, next_there = token_places(
                table, positions, next_there, page_stride, TOKENS, token_stride
            )
            best, total, values = attend_tile(
                best,
                total,
                values,
                queries,
                rotary_queries,
                base + place,
                values_offset,
                there,
                there[None, :],
                scale,
                WIDTH,
                ROTARY,
                WIDTH_BLOCK,
                ROTARY_BLOCK,
                True,
            )
            place, there = next_place, next_there
        if not RUNNING:
            store_state(
                sums,
                scores,
                token,
                block,
                blocks,
                head,
                real,
                best,
                total,
                values,
                KV_HEADS * GROUP,
                WIDTH,
                WIDTH_BLOCK,
            )
    if RUNNING:
        store_state(
            sums,
            scores,
            token,
            split,
            blocks,
            head,
            real,
            best,
            total,
            values,
            KV_HEADS * GROUP,
            WIDTH,
            WIDTH_BLOCK,
        )
