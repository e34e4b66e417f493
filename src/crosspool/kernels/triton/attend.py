"""Attention to one tile of positions, as every attention kernel does it, and the shapes of attention.

Latent attention in its absorbed form (arXiv 2405.04434, section 2.1.2) is grouped-query attention with one
key-value head: keys are a latent and a rotary part, and the latent is the value too. The sums of a softmax
are kept as in arXiv 1805.02867: the best score so far, the total of weights relative to it, and the weighted
sum of values. Scores are in units of log2.
"""

from __future__ import annotations

from math import log2
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

NOTHING: tl.constexpr = tl.constexpr(-1.0e30)
"""The best score before there is one: finite, so that it minus a masked score is never NaN."""

LOG2_E = log2(2.718281828459045)


class AttentionShape(NamedTuple):
    """``heads`` query heads share ``kv_heads`` keys and values of ``width``. ``rotary`` (0: grouped-query
    attention) makes it latent attention of one key-value head: ``width`` is the latent's, which is the value,
    and keys are the latent followed by ``rotary`` elements. ``scale`` multiplies products."""

    heads: int
    kv_heads: int
    width: int
    rotary: int
    scale: float

    @property
    def group(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.kv_heads

    @property
    def key_width(self) -> int:
        return self.width + self.rotary


def shape_arguments(shape: AttentionShape) -> dict[str, int | float]:
    """What kernels have to know of a shape."""
    return {
        "scale": shape.scale * LOG2_E,
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "WIDTH": shape.width,
        "ROTARY": shape.rotary,
        "WIDTH_BLOCK": max(triton.next_power_of_2(shape.width), 16),
        "ROTARY_BLOCK": max(triton.next_power_of_2(shape.rotary), 16) if shape.rotary else 0,
    }


def tile_of(shape: AttentionShape, query: Tensor) -> int:
    """Positions of a tile: so many that its keys have 16 KiB, or a latent's 32; 16 to 64."""
    room = (32 if shape.rotary else 16) * 1024
    width: int = triton.next_power_of_2(shape.width)
    return min(max(room // (width * query.itemsize), 16), 64)


@triton.jit
def load_queries(tokens, mask, begin, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """``WIDTH`` elements from element ``begin`` on, of heads at pointers ``tokens`` [m]: [m, WIDTH_BLOCK]."""
    at = tl.arange(0, WIDTH_BLOCK)
    wanted = mask[:, None] & (at < WIDTH)[None, :]
    return tl.load(tokens[:, None] + begin + at[None, :], mask=wanted, other=0)


@triton.jit
def nothing_yet(ROWS: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """Best scores [ROWS], totals [ROWS] and sums [ROWS, WIDTH_BLOCK] of no position."""
    best = tl.full((ROWS,), NOTHING, tl.float32)
    return best, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, WIDTH_BLOCK), tl.float32)


@triton.jit
def attend_tile(
    best,
    total,
    sums,
    query,
    rotary_query,
    tokens,
    values_offset,
    there,
    seen,
    scale,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    ROTARY_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add a tile of positions to the sums of ``query`` [m, WIDTH_BLOCK] and its rotary part.

    ``tokens`` [n] points to the positions' keys, and ``values_offset`` elements further are the values, if
    they are not the keys. Only tokens that are ``there`` [n] are read. With ``MASKED``, only those that are
    there and ``seen`` [m, n] count.
    """
    at = tl.arange(0, WIDTH_BLOCK)
    wanted = there[:, None] & (at < WIDTH)[None, :]
    keys = tl.load(tokens[:, None] + at[None, :], mask=wanted, other=0)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if ROTARY > 0:
        turned = load_queries(tokens, there, WIDTH, ROTARY, ROTARY_BLOCK)
        scores = tl.dot(rotary_query, tl.trans(turned), scores, input_precision="ieee")
        values = keys
    else:
        values = tl.load(tokens[:, None] + values_offset + at[None, :], mask=wanted, other=0)
    scores = scores * scale
    if MASKED:
        scores = tl.where(seen & there[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    fade = tl.exp2(best - new_best)
    total = total * fade + tl.sum(weights, 1)
    sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision="ieee")
    return new_best, total, sums
