"""Grouped-query attention between the projection and attention: heads are normed and rotated, queries go to
a buffer, keys and values into their pages. Meaning: models/layers.py, gqa."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import (
    NOT_SPECIAL,
    KvPlace,
    Pass,
    kv_arguments,
    position_of,
    table_arguments,
    token_places,
)
from crosspool.kernels.triton.norm import normed_by
from crosspool.kernels.triton.rope import cos_sin, load_pairs, store_turned
from crosspool.kernels.triton.table import layer_weights

_QUERIES: tl.constexpr = tl.constexpr(words.QUERIES)
_QUERY_NORM: tl.constexpr = tl.constexpr(words.QUERY_NORM)
_KEY_NORM: tl.constexpr = tl.constexpr(words.KEY_NORM)

ELEMENTS_AT_ONCE = 1024
"""Of the heads that one program has; more where a head has more."""


def gqa_write(
    batch: Pass,
    kv: KvPlace,
    layer: int,
    projected: Tensor,
    query: Tensor,
    kv_heads: int,
    rotary: int,
    *,
    interleaved: bool,
    gain: float,
    norm_epsilon: float | None,
) -> None:
    """From ``projected`` [T, (N + 2K) D] to ``query`` [T, N, D] and the pages, all in model dtype.

    The first ``rotary`` elements of each query and key are rotated, pairs being neighbours (``interleaved``)
    or halves; cosines and sines are multiplied with ``gain``. With ``norm_epsilon`` they are normed before,
    by the layer's QUERY_NORM and KEY_NORM.
    """
    heads, width = query.shape[1:]
    at_once = max(ELEMENTS_AT_ONCE // triton.next_power_of_2(width), 1)
    at_once = min(at_once, triton.next_power_of_2(heads))
    programs = triton.cdiv(heads, at_once) + triton.cdiv(kv_heads, at_once)
    rest = width - rotary
    _gqa_write[(batch.most_queries, programs)](
        batch.lane,
        layer,
        batch.starts,
        batch.firsts,
        batch.row_of,
        projected=projected,
        query=query,
        gain=gain,
        epsilon=norm_epsilon,
        **table_arguments(batch, kv),
        **kv_arguments(kv, query.dtype),
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        PAIRS=rotary // 2,
        INTERLEAVED=interleaved,
        AT_ONCE=at_once,
        PAIR_BLOCK=triton.next_power_of_2(rotary // 2),
        REST_BLOCK=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )


@triton.jit(do_not_specialize=NOT_SPECIAL)
def _gqa_write(
    lane,
    layer,
    starts,
    firsts,
    row_of,
    projected,
    query,
    gain,
    epsilon,
    pages,
    pages_stride,
    pages_begin,
    arena,
    page_stride,
    region,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Program (t, i): some of the heads of query t, those of keys and values after those of queries."""
    token, part = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(lane + _QUERIES):
        return
    row = tl.load(row_of + token)
    position = position_of(starts, firsts, row, token)
    if position < 0:
        return
    cos, sin = cos_sin(lane, position, gain, PAIRS, PAIR_BLOCK)
    dtype: tl.constexpr = query.dtype.element_ty
    source = projected + token.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * WIDTH)
    query_parts: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    if part < query_parts:
        head = part * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        target = query + token.to(tl.int64) * (HEADS * WIDTH) + head * WIDTH
        weights = source
        if epsilon is not None:
            weights = layer_weights(lane, layer, _QUERY_NORM, dtype)
        _turn(
            source + head * WIDTH,
            target,
            head < HEADS,
            weights,
            cos,
            sin,
            epsilon,
            WIDTH,
            PAIRS,
            INTERLEAVED,
            PAIR_BLOCK,
            REST_BLOCK,
        )
    else:
        head = (part - query_parts) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
        table = pages + row * pages_stride + pages_begin
        place, there = token_places(table, position, position >= 0, page_stride, TOKENS, KV_HEADS * WIDTH)
        target = arena + region + place + head * WIDTH
        mask = (head < KV_HEADS) & there
        weights = source
        if epsilon is not None:
            weights = layer_weights(lane, layer, _KEY_NORM, dtype)
        keys = source + (HEADS + head) * WIDTH
        _turn(
            keys, target, mask, weights, cos, sin, epsilon, WIDTH, PAIRS, INTERLEAVED, PAIR_BLOCK, REST_BLOCK
        )
        at = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
        values = tl.load(keys + KV_HEADS * WIDTH + at, mask=mask & (at < WIDTH), other=0)
        tl.store(target + TOKENS * KV_HEADS * WIDTH + at, values, mask=mask & (at < WIDTH))


@triton.jit
def _turn(
    source,
    target,
    mask,
    weights,
    cos,
    sin,
    epsilon,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Heads from pointers [n, 1] to others: normed if there is an epsilon, and rotated."""
    first, second = load_pairs(source, mask, PAIRS, PAIR_BLOCK, INTERLEAVED)
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if REST_BLOCK > 0:
        at = 2 * PAIRS + tl.arange(0, REST_BLOCK)[None, :]
        rest = tl.load(source + at, mask=mask & (at < WIDTH), other=0)
        if epsilon is not None:
            wide = rest.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            rest = normed_by(wide, squares[:, None], weights + at, at < WIDTH, epsilon, WIDTH)
        tl.store(target + at, rest, mask=mask & (at < WIDTH))
    if epsilon is not None:
        pair = tl.arange(0, PAIR_BLOCK)[None, :]
        begin = 2 * pair if INTERLEAVED else pair
        other = 1 if INTERLEAVED else PAIRS
        squares = squares[:, None]
        first = normed_by(first, squares, weights + begin, pair < PAIRS, epsilon, WIDTH).to(tl.float32)
        second = normed_by(second, squares, weights + other + begin, pair < PAIRS, epsilon, WIDTH)
        second = second.to(tl.float32)
    store_turned(target, mask, first, second, cos, sin, PAIRS, PAIR_BLOCK, INTERLEAVED)
