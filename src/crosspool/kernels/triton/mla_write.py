"""Latent attention between its projections and attention: latents are normed and go into their pages with
the rotated key, queries are rotated. Meaning: models/layers.py, mla."""

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
_LATENT_NORM: tl.constexpr = tl.constexpr(words.LATENT_NORM)

HEADS_AT_ONCE = 16


def mla_write(
    batch: Pass,
    kv: KvPlace,
    layer: int,
    down: Tensor,
    query_latent: Tensor | None,
    rotary: int,
    *,
    interleaved: bool,
    gain: float,
    norm_epsilon: float,
) -> None:
    """From ``down`` [T, (Q +) rank + rotary] into the pages, and to ``query_latent`` [T, Q] where queries
    have a latent, all in model dtype. Latents are normed by LATENT_NORM and QUERY_NORM; the key is rotated,
    pairs being neighbours (``interleaved``) or halves, with cosines and sines times ``gain``."""
    query_rank = 0 if query_latent is None else query_latent.shape[1]
    rank = down.shape[1] - query_rank - rotary
    _mla_write[(batch.most_queries, 1 if query_latent is None else 2)](
        batch.lane,
        layer,
        batch.starts,
        batch.firsts,
        batch.row_of,
        down=down,
        query_latent=query_latent,
        gain=gain,
        epsilon=norm_epsilon,
        **table_arguments(batch, kv),
        **kv_arguments(kv, down.dtype),
        QUERY_RANK=query_rank,
        RANK=rank,
        PAIRS=rotary // 2,
        INTERLEAVED=interleaved,
        QUERY_BLOCK=triton.next_power_of_2(query_rank) if query_rank else 1,
        RANK_BLOCK=triton.next_power_of_2(rank),
        PAIR_BLOCK=triton.next_power_of_2(rotary // 2),
        num_warps=4,
    )


def rotate_queries(
    batch: Pass, projected: Tensor, query: Tensor, rotary: int, *, interleaved: bool, gain: float
) -> None:
    """The last ``rotary`` elements of each head of ``projected`` [T, N, nope + rotary], rotated, to the last
    ones of ``query`` [T, N, rank + rotary], both in model dtype; see mla_write. latents.py makes the rest."""
    heads, width = query.shape[1:]
    at_once = min(HEADS_AT_ONCE, triton.next_power_of_2(heads))
    _rotate_queries[(batch.most_queries, triton.cdiv(heads, at_once))](
        batch.lane,
        batch.starts,
        batch.firsts,
        batch.row_of,
        projected,
        query,
        gain,
        HEADS=heads,
        PROJECTED_WIDTH=projected.shape[2],
        WIDTH=width,
        PAIRS=rotary // 2,
        INTERLEAVED=interleaved,
        AT_ONCE=at_once,
        PAIR_BLOCK=triton.next_power_of_2(rotary // 2),
        num_warps=4,
    )


@triton.jit(do_not_specialize=NOT_SPECIAL)
def _mla_write(
    lane,
    layer,
    starts,
    firsts,
    row_of,
    down,
    query_latent,
    gain,
    epsilon,
    pages,
    pages_stride,
    pages_begin,
    arena,
    page_stride,
    region,
    TOKENS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Program (t, 0): query t's KV. Program (t, 1): its query's latent."""
    token = tl.program_id(0)
    if token >= tl.load(lane + _QUERIES):
        return
    row = tl.load(row_of + token)
    position = position_of(starts, firsts, row, token)
    if position < 0:
        return
    dtype: tl.constexpr = down.dtype.element_ty
    source = down + token.to(tl.int64) * (QUERY_RANK + RANK + 2 * PAIRS)
    if tl.program_id(1) == 0:
        table = pages + row * pages_stride + pages_begin
        place, there = token_places(table, position, position >= 0, page_stride, TOKENS, RANK + 2 * PAIRS)
        target = arena + region + place
        weights = layer_weights(lane, layer, _LATENT_NORM, dtype)
        _norm_latent(source + QUERY_RANK, target, there, weights, epsilon, RANK, RANK_BLOCK)
        cos, sin = cos_sin(lane, position, gain, PAIRS, PAIR_BLOCK)
        one = tl.arange(0, 1)[:, None]
        mask = there & (one == 0)
        first, second = load_pairs(source + QUERY_RANK + RANK + one, mask, PAIRS, PAIR_BLOCK, INTERLEAVED)
        store_turned(target + RANK + one, mask, first, second, cos, sin, PAIRS, PAIR_BLOCK, INTERLEAVED)
    elif QUERY_RANK > 0:
        weights = layer_weights(lane, layer, _QUERY_NORM, dtype)
        target = query_latent + token.to(tl.int64) * QUERY_RANK
        _norm_latent(source, target, position >= 0, weights, epsilon, QUERY_RANK, QUERY_BLOCK)


@triton.jit
def _norm_latent(source, target, mask, weights, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Norm a vector of ``SIZE`` elements from one pointer to another."""
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < SIZE, other=0).to(tl.float32)
    normed = normed_by(values, tl.sum(values * values, 0), weights + at, at < SIZE, epsilon, SIZE)
    tl.store(target + at, normed, mask=mask & (at < SIZE))


@triton.jit
def _rotate_queries(
    lane,
    starts,
    firsts,
    row_of,
    projected,
    query,
    gain,
    HEADS: tl.constexpr,
    PROJECTED_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Program (t, i): some heads of query t."""
    token = tl.program_id(0)
    if token >= tl.load(lane + _QUERIES):
        return
    position = position_of(starts, firsts, tl.load(row_of + token), token)
    if position < 0:
        return
    cos, sin = cos_sin(lane, position, gain, PAIRS, PAIR_BLOCK)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    place = token.to(tl.int64) * HEADS + head
    source = projected + place * PROJECTED_WIDTH + (PROJECTED_WIDTH - 2 * PAIRS)
    target = query + place * WIDTH + (WIDTH - 2 * PAIRS)
    first, second = load_pairs(source, head < HEADS, PAIRS, PAIR_BLOCK, INTERLEAVED)
    store_turned(target, head < HEADS, first, second, cos, sin, PAIRS, PAIR_BLOCK, INTERLEAVED)
