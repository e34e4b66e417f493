"""One pass of one micro-batch as kernels see it, and where the KV of one layer lies."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import triton
import triton.language as tl
from torch import Tensor, dtype

BLOCK = 256
"""Positions of a block of attention: cut at absolute positions, so that the result of a row depends on no
other row, nor on pages, devices or the number of programs."""


Pages = TypeVar("Pages", int, np.ndarray)


def elsewhere(page: Pages) -> Pages:
    """What page tables say instead of a page of another device, by its number in the pool; of NULL_PAGE it is
    NULL_PAGE. And the reverse."""
    return -2 - page


class Pass(NamedTuple):
    """A pass of up to T queries of up to R rows, in a lane: tensors on its device that stay where they are.

    ``lane`` int64 [LANE_WORDS]: its words ROWS and QUERIES say how many are real. Row r owns queries
    ``starts[r]`` to ``starts[r + 1] - 1``, the first of which is at absolute position ``firsts[r]``; query t
    belongs to row ``row_of[t]``. Nothing of a row whose ``firsts`` is negative is read or written in KV.
    ``starts`` [R + 1], ``firsts`` [R] and ``row_of`` [T] are int32. ``pages`` int32 [R, groups, chunks] are
    the page tables: entry i for positions ``i * tokens_per_page`` onwards; negative where the page was given
    back (NULL_PAGE), or is on another device (``elsewhere``).
    """

    lane: Tensor
    starts: Tensor
    firsts: Tensor
    row_of: Tensor
    pages: Tensor

    @property
    def most_rows(self) -> int:
        return len(self.firsts)

    @property
    def most_queries(self) -> int:
        return len(self.row_of)


class KvPlace(NamedTuple):
    """One layer's KV: in page p of ``arena`` (uint8, contiguous), its region begins at byte ``p * page_bytes
    + offset``; inside it is as in core/kv_layout.py. ``group`` says whose page tables to read, ``window`` is
    how many of the last positions a token sees (0: all). Bytes are whole elements of the model's type."""

    arena: Tensor
    page_bytes: int
    offset: int
    tokens_per_page: int
    group: int
    window: int


def table_arguments(batch: Pass, kv: KvPlace) -> dict[str, Tensor | int]:
    """What ``page_table`` takes."""
    groups, chunks = batch.pages.shape[1:]
    return {"pages": batch.pages, "pages_stride": groups * chunks, "pages_begin": kv.group * chunks}


def kv_arguments(kv: KvPlace, model: dtype) -> dict[str, Tensor | int]:
    """The arena in elements of the model's type, and what ``token_places`` takes."""
    return {
        "arena": kv.arena.view(-1).view(model),
        "page_stride": kv.page_bytes // model.itemsize,
        "region": kv.offset // model.itemsize,
        "TOKENS": kv.tokens_per_page,
    }


NOT_SPECIAL = ("layer", "pages_stride", "pages_begin", "window")
"""Arguments of kernels for whose values Triton shall not compile again."""


@triton.jit
def position_of(starts, firsts, row, query):
    """The absolute position of a row's query; negative if the row does not live."""
    first = tl.load(firsts + row)
    return tl.where(first < 0, -1, first + query - tl.load(starts + row))


@triton.jit
def first_seen(position, window):
    """The first position that a query at ``position`` sees."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def token_places(table, positions, there, page_stride, TOKENS: tl.constexpr, TOKEN_STRIDE: tl.constexpr):
    """Where tokens at ``positions`` [n] of a row begin, in elements (int64) from a layer's region in page 0,
    and which of them are there: those asked for whose page is on this device. ``table`` is the row's."""
    chunk = positions // TOKENS
    page = tl.load(table + chunk, mask=there, other=-1)
    slot = positions - chunk * TOKENS
    return page.to(tl.int64) * page_stride + slot * TOKEN_STRIDE, page >= 0


@triton.jit
def any_here(table, begin, end, SPAN: tl.constexpr, TOKENS: tl.constexpr):
    """Whether a page of positions ``begin`` to ``end - 1``, at most ``SPAN``, is on this device."""
    chunk = begin // TOKENS + tl.arange(0, triton.next_power_of_2(SPAN // TOKENS + 2))
    page = tl.load(table + chunk, mask=chunk <= (end - 1) // TOKENS, other=-1)
    return tl.max(page, 0) >= 0
