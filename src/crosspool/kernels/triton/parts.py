"""The sum of what several devices have made of an FFN half."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton.words import QUERIES

_QUERIES = tl.constexpr(QUERIES)
_BLOCK = tl.constexpr(1024)


def add_parts(lane: Tensor, parts: Tensor, out: Tensor) -> None:
    """``parts`` [P, T, H] to ``out`` [T, H], both in model dtype: added in float32, in their order, and
    rounded once."""
    number, queries, hidden = parts.shape
    _add_parts[(queries, triton.cdiv(hidden, 1024))](
        lane, parts, out, queries * hidden, PARTS=number, HIDDEN=hidden, num_warps=4
    )


@triton.jit(do_not_specialize=["stride"])
def _add_parts(lane, parts, out, stride, PARTS: tl.constexpr, HIDDEN: tl.constexpr):
    query = tl.program_id(0)
    if query >= tl.load(lane + _QUERIES):
        return
    at = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    place = query.to(tl.int64) * HIDDEN + at
    total = tl.load(parts + place, at < HIDDEN, 0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        more = tl.load(parts + part * stride.to(tl.int64) + place, at < HIDDEN, 0.0)
        total += more.to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), at < HIDDEN)
