"""Products of latent attention with a matrix for each head: queries into latent space before attention, and
what was attended out of it afterwards (arXiv 2405.04434, section 2.1.2).

Weights are the left operand, of the rows that matrix units want, and queries the right one, as few as 16: so
a query's bits do not depend on how many there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.chip import stages
from crosspool.kernels.triton.table import layer_weights

_QUERIES: tl.constexpr = tl.constexpr(words.QUERIES)

COLUMNS, DEPTH = 64, 64
FEW_QUERIES, MOST_QUERIES = 16, 64


def queries_into_latents(batch: Pass, layer: int, projected: Tensor, nope: int, query: Tensor) -> None:
    """The first ``nope`` elements of each head of ``projected`` [T, N, nope + rotary], by the layer's
    EXPAND_KEY [N, nope, rank], to the first rank elements of ``query`` [T, N, rank + rotary]."""
    rank = query.shape[2] - (projected.shape[2] - nope)
    _launch(batch, layer, words.EXPAND_KEY, projected, query, nope, rank, along_out=True)


def latents_into_values(batch: Pass, layer: int, attended: Tensor, values: Tensor) -> None:
    """``attended`` [T, N, rank] by the layer's EXPAND_VALUE [N, value, rank] to ``values`` [T, N, value]."""
    rank, value = attended.shape[2], values.shape[2]
    _launch(batch, layer, words.EXPAND_VALUE, attended, values, rank, value, along_out=False)


def _launch(
    batch: Pass, layer: int, word: int, source: Tensor, out: Tensor, size: int, result: int, along_out: bool
) -> None:
    """From the first ``size`` elements of heads to the first ``result``; rows of the head's matrix are along
    the result, or else along what it is made of."""
    queries = min(max(triton.next_power_of_2(batch.most_queries), FEW_QUERIES), MOST_QUERIES)
    grid = (triton.cdiv(batch.most_queries, queries), out.shape[1], triton.cdiv(result, COLUMNS))
    _products[grid](
        batch.lane,
        layer,
        source,
        out,
        WORD=word,
        SIZE=size,
        RESULT=result,
        HEADS=out.shape[1],
        SOURCE_WIDTH=source.shape[2],
        OUT_WIDTH=out.shape[2],
        ALONG_OUT=along_out,
        QUERIES=queries,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        num_warps=4,
        num_stages=stages(4),
    )


@triton.jit(do_not_specialize=["layer"])
def _products(
    lane,
    layer,
    source,
    out,
    WORD: tl.constexpr,
    SIZE: tl.constexpr,
    RESULT: tl.constexpr,
    HEADS: tl.constexpr,
    SOURCE_WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    ALONG_OUT: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, n, j): ``COLUMNS`` elements of head n of ``QUERIES`` queries."""
    count = tl.load(lane + _QUERIES)
    if tl.program_id(0) * QUERIES >= count:
        return
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    live = (token < count)[None, :]
    exists = (column < RESULT)[:, None]
    place = (token.to(tl.int64) * HEADS + head)[None, :]
    depth_stride: tl.constexpr = RESULT if ALONG_OUT else 1
    column_stride: tl.constexpr = 1 if ALONG_OUT else SIZE
    matrix = layer_weights(lane, layer, WORD, source.dtype.element_ty) + head * (SIZE * RESULT)
    total = tl.zeros((COLUMNS, QUERIES), tl.float32)
    for begin in tl.range(0, SIZE, DEPTH):
        at = begin + tl.arange(0, DEPTH)
        weights = tl.load(
            matrix + column[:, None] * column_stride + at[None, :] * depth_stride,
            mask=exists & (at < SIZE)[None, :],
            other=0,
        )
        values = tl.load(
            source + place * SOURCE_WIDTH + at[:, None], mask=live & (at < SIZE)[:, None], other=0
        )
        total = tl.dot(weights, values, total, input_precision="ieee")
    target = out + place * OUT_WIDTH + column[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=live & exists)
