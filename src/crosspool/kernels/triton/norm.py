"""Hidden states of the attention side: embeddings, and root-mean-square norms with the residual addition
before them. Meaning: kernels/reference/norm.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.table import lane_weights, layer_weights

_EMBEDDING: tl.constexpr = tl.constexpr(words.EMBEDDING)
_FINAL_NORM: tl.constexpr = tl.constexpr(words.FINAL_NORM)
_ROWS: tl.constexpr = tl.constexpr(words.ROWS)
_QUERIES: tl.constexpr = tl.constexpr(words.QUERIES)


def embed(batch: Pass, tokens: Tensor, hidden: Tensor) -> None:
    """Rows ``tokens`` (int32 or int64 [T]) of the lane's EMBEDDING to ``hidden`` [T, H]."""
    size = hidden.shape[1]
    options = _options(size)
    _embed[(batch.most_queries,)](batch.lane, tokens, hidden, SIZE=size, **options)


def layer_norm(
    batch: Pass,
    layer: int,
    word: int,
    hidden: Tensor,
    addend: Tensor | None,
    normed: Tensor,
    epsilon: float,
) -> None:
    """Add ``addend`` (what a half of a layer gave, None: nothing) to the residual stream ``hidden``, and norm
    the sum by the layer's weights at ``word`` (INPUT_NORM or FFN_NORM) to ``normed``. All are [T, H] in model
    dtype; ``addend`` and ``normed`` may be the same."""
    size = hidden.shape[1]
    arguments = {"hidden": hidden, "addend": addend, "out": normed, "epsilon": epsilon}
    _norm[(batch.most_queries,)](
        batch.lane, layer, batch.starts, **arguments, SIZE=size, WORD=word, FINAL=False, **_options(size)
    )


def final_norm(batch: Pass, hidden: Tensor, addend: Tensor | None, normed: Tensor, epsilon: float) -> None:
    """Norm ``hidden`` + ``addend``, both [T, H], of each row's last query by the lane's FINAL_NORM to
    ``normed`` [R, H]. Nothing is written for a row without queries."""
    size = hidden.shape[1]
    arguments = {"hidden": hidden, "addend": addend, "out": normed, "epsilon": epsilon}
    _norm[(batch.most_rows,)](
        batch.lane, 0, batch.starts, **arguments, SIZE=size, WORD=0, FINAL=True, **_options(size)
    )


def _options(size: int) -> dict[str, int]:
    """A program has a whole token, and a thread 16 of its elements."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@triton.jit
def _embed(lane, tokens, hidden, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    query = tl.program_id(0)
    if query >= tl.load(lane + _QUERIES):
        return
    table = lane_weights(lane, _EMBEDDING, hidden.dtype.element_ty)
    at = tl.arange(0, BLOCK)
    token = tl.load(tokens + query).to(tl.int64)
    values = tl.load(table + token * SIZE + at, mask=at < SIZE, other=0)
    tl.store(hidden + query.to(tl.int64) * SIZE + at, values, mask=at < SIZE)


@triton.jit(do_not_specialize=["layer"])
def _norm(
    lane,
    layer,
    starts,
    hidden,
    addend,
    out,
    epsilon,
    SIZE: tl.constexpr,
    WORD: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    query = place
    if FINAL:
        count = tl.load(lane + _ROWS)
        end = tl.load(starts + place + 1, mask=place < count, other=0)
        count = tl.where(end > tl.load(starts + place), count, 0)
        query = end - 1
        weights = lane_weights(lane, _FINAL_NORM, hidden.dtype.element_ty)
    else:
        count = tl.load(lane + _QUERIES)
        weights = layer_weights(lane, layer, WORD, hidden.dtype.element_ty)
    if place >= count:
        return
    at = tl.arange(0, BLOCK)
    stream = hidden + query.to(tl.int64) * SIZE + at
    values = tl.load(stream, mask=at < SIZE, other=0).to(tl.float32)
    if addend is not None:
        more = tl.load(addend + query.to(tl.int64) * SIZE + at, mask=at < SIZE, other=0).to(tl.float32)
        total = (values + more).to(hidden.dtype.element_ty)
        if not FINAL:
            tl.store(stream, total, mask=at < SIZE)
        values = total.to(tl.float32)
    normed = normed_by(values, tl.sum(values * values, 0), weights + at, at < SIZE, epsilon, SIZE)
    tl.store(out + place.to(tl.int64) * SIZE + at, normed, mask=at < SIZE)


@triton.jit
def normed_by(values, squares, weights, mask, epsilon, SIZE: tl.constexpr):
    """``values`` (float32) of a vector of ``SIZE`` elements whose squares' sum is ``squares``, normed and
    rounded to the type of ``weights`` before these multiply them; in that type."""
    dtype: tl.constexpr = weights.dtype.scalar.element_ty
    normed = (values * tl.rsqrt(squares / SIZE + epsilon)).to(dtype)
    weight = tl.load(weights, mask=mask, other=0)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(dtype)
