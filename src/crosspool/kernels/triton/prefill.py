"""Attention of many queries of each row, as in chunks of prompts: a program has a tile of queries and walks
over the positions they see.

Tiles of positions are cut at absolute positions, and a query's result does not depend on the queries beside
it, so it has the same bits whatever chunks its prompt is computed in.
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
    NOT_SPECIAL,
    KvPlace,
    Pass,
    any_here,
    first_seen,
    kv_arguments,
    table_arguments,
    token_places,
)
from crosspool.kernels.triton.chip import HOPPER, generation, stages, warps
from crosspool.kernels.triton.states import States, store_state

_ROWS: tl.constexpr = tl.constexpr(words.ROWS)
_SPAN: tl.constexpr = tl.constexpr(1024)


def prefill_attention(
    batch: Pass, kv: KvPlace, shape: AttentionShape, query: Tensor, attended: Tensor
) -> None:
    """``query`` [T, N, width + rotary] to ``attended`` [T, N, width], over pages that hold this pass's KV.

    Meaning: kernels/interface.py, GqaAttention and MlaAttention. The results of decode.py are the same but
    for rounding.
    """
    _launch(batch, kv, shape, query, attended, None)


def attend_part(batch: Pass, kv: KvPlace, shape: AttentionShape, query: Tensor, states: States) -> None:
    """Only the states, of one part, for rows whose contexts are on several devices: of what this device has,
    all of it one block (``states`` has room for one). Merged by states.merge_states. No time is lost with
    spans of _SPAN positions of which it has nothing."""
    _launch(batch, kv, shape, query, query, states)


def _launch(
    batch: Pass, kv: KvPlace, shape: AttentionShape, query: Tensor, attended: Tensor, states: States | None
) -> None:
    rows = _rows(shape, query)
    at_once = min(shape.group, rows)
    head_parts = shape.kv_heads * triton.cdiv(shape.group, at_once)
    queries = rows // at_once
    tiles = triton.cdiv(batch.most_queries, queries) + batch.most_rows - 1
    _prefill[(tiles, head_parts)](
        batch.lane,
        batch.starts,
        batch.firsts,
        query=query,
        attended=attended,
        sums=None if states is None else states.sums,
        scores=None if states is None else states.scores,
        window=kv.window,
        **table_arguments(batch, kv),
        **kv_arguments(kv, query.dtype),
        **shape_arguments(shape),
        AT_ONCE=at_once,
        ROWS=rows,
        TILE=min(tile_of(shape, query), 64 if generation() >= HOPPER else 32),
        ROWS_BLOCK=triton.next_power_of_2(batch.most_rows),
        num_warps=warps(8),
        num_stages=stages(3),
    )


def _rows(shape: AttentionShape, query: Tensor) -> int:
    """Rows of a program's products, heads of queries: as many as their sums leave in registers."""
    if shape.width > 256 or query.itemsize > 2:
        return 32
    return 64 if shape.width > 128 else 128


@triton.jit
def _tile_of(lane, starts, number, QUERIES: tl.constexpr, ROWS_BLOCK: tl.constexpr):
    """The row that tile ``number`` belongs to (ROWS or more: there is none), and which of its tiles it is.
    Tiles have up to ``QUERIES`` queries of one row."""
    row = tl.arange(0, ROWS_BLOCK)
    real = row < tl.load(lane + _ROWS)
    count = tl.load(starts + row + 1, mask=real, other=0) - tl.load(starts + row, mask=real, other=0)
    tiles = (count + QUERIES - 1) // QUERIES
    before = tl.cumsum(tiles, 0) - tiles
    own = tl.sum((real & (before + tiles <= number)).to(tl.int32), 0)
    return own, number - tl.sum(tl.where(row < own, tiles, 0), 0)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def _prefill(
    lane,
    starts,
    firsts,
    query,
    attended,
    sums,
    scores,
    window,
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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
):
    """Program (i, h): tile i of all rows' tiles of queries, and some heads that share a key and value. All
    heads of a query are rows of one product, query after query."""
    queries: tl.constexpr = ROWS // AT_ONCE
    row, tile = _tile_of(lane, starts, tl.program_id(0), queries, ROWS_BLOCK)
    if row >= tl.load(lane + _ROWS):
        return
    first = tl.load(firsts + row)
    if first < 0:
        return
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    head_parts: tl.constexpr = (GROUP + AT_ONCE - 1) // AT_ONCE
    kv_head = tl.program_id(1) // head_parts
    index = tile * queries + tl.arange(0, ROWS) // AT_ONCE
    member = tl.program_id(1) % head_parts * AT_ONCE + tl.arange(0, ROWS) % AT_ONCE
    real = (index < tl.minimum(count, (tile + 1) * queries)) & (member < GROUP)
    token = (start + index).to(tl.int64)
    head = kv_head * GROUP + member
    place = token * (KV_HEADS * GROUP) + head
    own = load_queries(query + place * (WIDTH + ROTARY), real, 0, WIDTH, WIDTH_BLOCK)
    own_rotary = own
    if ROTARY > 0:
        own_rotary = load_queries(query + place * (WIDTH + ROTARY), real, WIDTH, ROTARY, ROTARY_BLOCK)

    position = first + index
    earliest = first + tile * queries
    end = first + tl.minimum(count, (tile + 1) * queries)
    begin = first_seen(earliest, window) // TILE * TILE
    # Before this position every query of the tile sees everything that is there.
    plain_end = tl.where(window > 0, begin, (earliest + 1) // TILE * TILE)
    base = arena + region + kv_head * (WIDTH + ROTARY)
    table = pages + row * pages_stride + pages_begin
    best, total, values = nothing_yet(ROWS, WIDTH_BLOCK)
    if sums is None:
        best, total, values = _walk(
            best,
            total,
            values,
            own,
            own_rotary,
            position,
            begin,
            plain_end,
            end,
            window,
            base,
            table,
            scale,
            page_stride,
            TOKENS,
            KV_HEADS,
            WIDTH,
            ROTARY,
            WIDTH_BLOCK,
            ROTARY_BLOCK,
            TILE,
            False,
            False,
        )
    else:
        for span in tl.range(begin, plain_end, _SPAN):
            span_end = tl.minimum(span + _SPAN, plain_end)
            span_end = tl.where(any_here(table, span, span_end, _SPAN, TOKENS), span_end, span)
            best, total, values = _walk(
                best,
                total,
                values,
                own,
                own_rotary,
                position,
                span,
                span_end,
                end,
                window,
                base,
                table,
                scale,
                page_stride,
                TOKENS,
                KV_HEADS,
                WIDTH,
                ROTARY,
                WIDTH_BLOCK,
                ROTARY_BLOCK,
                TILE,
                True,
                False,
            )
    best, total, values = _walk(
        best,
        total,
        values,
        own,
        own_rotary,
        position,
        plain_end,
        end,
        end,
        window,
        base,
        table,
        scale,
        page_stride,
        TOKENS,
        KV_HEADS,
        WIDTH,
        ROTARY,
        WIDTH_BLOCK,
        ROTARY_BLOCK,
        TILE,
        True,
        True,
    )
    if sums is not None:
        store_state(
            sums, scores, token, 0, 1, head, real, best, total, values, KV_HEADS * GROUP, WIDTH, WIDTH_BLOCK
        )
    else:
        result = (values / total[:, None]).to(attended.dtype.element_ty)
        at = tl.arange(0, WIDTH_BLOCK)
        wanted = real[:, None] & (at < WIDTH)[None, :]
        tl.store(attended + place[:, None] * WIDTH + at[None, :], result, mask=wanted)


@triton.jit
def _walk(
    best,
    total,
    values,
    query,
    rotary_query,
    position,
    begin,
    end,
    context,
    window,
    base,
    table,
    scale,
    page_stride,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    ROTARY_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Add positions ``begin`` to ``end - 1`` to the sums of queries at ``position`` [m], of a context of
    ``context`` tokens. Without ``CAUSAL`` all queries see them all."""
    token_stride: tl.constexpr = KV_HEADS * (WIDTH + ROTARY)
    values_offset: tl.constexpr = TOKENS * KV_HEADS * WIDTH
    keys = begin + tl.arange(0, TILE)
    place, there = token_places(table, keys, keys < context, page_stride, TOKENS, token_stride)
    for _ in tl.range(begin, end, TILE):
        # A tile's pages are looked up while the one before is computed.
        next_place, next_there = token_places(
            table, keys + TILE, keys + TILE < context, page_stride, TOKENS, token_stride
        )
        seen = there[None, :]
        if CAUSAL:
            seen = keys[None, :] <= position[:, None]
            seen = seen & ((window <= 0) | (keys[None, :] > position[:, None] - window))
        best, total, values = attend_tile(
            best,
            total,
            values,
            query,
            rotary_query,
            base + place,
            values_offset,
            there,
            seen,
            scale,
            WIDTH,
            ROTARY,
            WIDTH_BLOCK,
            ROTARY_BLOCK,
            MASKED,
        )
        keys, place, there = keys + TILE, next_place, next_there
    return best, total, values
