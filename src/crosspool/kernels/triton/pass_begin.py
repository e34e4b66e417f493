"""The begin of a pass on the device: which rows go on, what they read, and where their pages are."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import grant_words, words
from crosspool.kernels.triton.batch import Pass

_LAYERS, _FREQUENCIES = tl.constexpr(words.LAYERS), tl.constexpr(words.FREQUENCIES)
_GRANT, _ROWS, _QUERIES = tl.constexpr(words.GRANT), tl.constexpr(words.ROWS), tl.constexpr(words.QUERIES)
_FAILED = tl.constexpr(words.FAILED)
_STEPS, _MODEL_WORDS = tl.constexpr(words.STEPS), tl.constexpr(words.MODEL_WORDS)
_GRANT_ROWS, _GRANT_STEPS = tl.constexpr(grant_words.GRANT_ROWS), tl.constexpr(grant_words.GRANT_STEPS)
_GRANT_OVER, _FLAGS = tl.constexpr(grant_words.GRANT_OVER), tl.constexpr(grant_words.FLAGS)
_GRANT_WORDS, _ROW_WORDS = tl.constexpr(grant_words.GRANT_WORDS), tl.constexpr(grant_words.ROW_WORDS)
_WANTED = tl.constexpr(grant_words.WANTED)
_FIRST, _COUNT = tl.constexpr(grant_words.FIRST), tl.constexpr(grant_words.COUNT)
_INPUTS, _TABLES = tl.constexpr(grant_words.INPUTS), tl.constexpr(grant_words.TABLES)
_CHUNKS, _CHOICE = tl.constexpr(grant_words.CHUNKS), tl.constexpr(grant_words.CHOICE)
_MADE, _DONE, _NEXT = (
    tl.constexpr(grant_words.MADE),
    tl.constexpr(grant_words.DONE),
    tl.constexpr(grant_words.NEXT),
)
_BLOCK = tl.constexpr(1024)


class PassRows(NamedTuple):
    """What the begin of a pass writes beside the Pass (batch.py): the ``tokens`` that its queries read, int32
    [T]; of each row, its number in the grant (``numbers`` int32 [R]) and how it chooses a token (``choices``
    int64 [R]: an address, 0 if it does not). Then ``chosen`` int64 [R] is what it has chosen."""

    tokens: Tensor
    numbers: Tensor
    choices: Tensor
    chosen: Tensor


def enter(lane: Tensor, grant: int) -> None:
    """The lane runs the grant whose words are at this address from now on, and has not failed."""
    _enter[(1,)](lane, grant, num_warps=1)


def lead(lane: Tensor, layers: int, frequencies: int = 0) -> None:
    """On a device that is not the grant's home: the model's layers' words are at this address from now on,
    and its frequencies, if it has the attention side too."""
    _lead[(1,)](lane, layers, frequencies, num_warps=1)


def find_pages(batch: Pass, first: int, count: int) -> None:
    """On another KV device than the home, whose ``count`` pages begin with page ``first`` of the pool: its
    page tables, made of the home's."""
    entries = batch.pages[0].numel()
    grid = (batch.most_rows, triton.cdiv(entries, _BLOCK.value))
    _find_pages[grid](batch.lane, batch.pages, first, count, entries)


def begin_pass(batch: Pass, rows: PassRows, most_rows: int) -> None:
    """The rows that go on of the grant that the lane runs make up the pass, in their order. Grants have up to
    ``most_rows`` rows; of these, ``batch.most_rows`` at most may go on."""
    most = max(2, triton.next_power_of_2(most_rows))
    _select[(1,)](batch.lane, batch.starts, batch.firsts, rows.numbers, rows.choices, MOST=most, num_warps=1)
    groups, chunks = batch.pages.shape[1:]
    _fill[(batch.most_rows,)](
        batch.lane, batch.starts, batch.row_of, batch.pages, rows.tokens, rows.numbers, groups, chunks
    )


@triton.jit
def grant_of(lane):
    """The words of the grant that the lane runs."""
    return tl.load(lane + _GRANT).to(tl.pointer_type(tl.int64))


@triton.jit
def row_of_grant(grant, number):
    """The words of rows of a grant."""
    return grant + _GRANT_WORDS + number.to(tl.int64) * _ROW_WORDS


@triton.jit
def wanted_rows(grant, number, mask):
    """What the host says now about rows of the grant."""
    flags = tl.load(grant + _FLAGS).to(tl.pointer_type(tl.int64))
    return tl.load(flags + _WANTED + number, mask, 0, volatile=True) != 0


@triton.jit(do_not_specialize=["grant"])
def _enter(lane, grant):
    tl.store(lane + _GRANT, grant)
    tl.store(lane + _FAILED, 0)
    words = grant.to(tl.pointer_type(tl.int64))
    for word in range(_MODEL_WORDS):
        tl.store(lane + word, tl.load(words + word))


@triton.jit(do_not_specialize=["layers", "frequencies"])
def _lead(lane, layers, frequencies):
    tl.store(lane + _LAYERS, layers)
    tl.store(lane + _FREQUENCIES, frequencies)


@triton.jit(do_not_specialize=["first", "count", "entries"])
def _find_pages(lane, pages, first, count, entries):
    """Program (r, i): some of row r's entries."""
    if tl.program_id(0) >= tl.load(lane + _ROWS):
        return
    at = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    own = pages + tl.program_id(0).to(tl.int64) * entries + at
    page = -2 - tl.load(own, at < entries, -1) - first
    tl.store(own, tl.where((page >= 0) & (page < count), page, -1), at < entries)


@triton.jit
def _select(lane, starts, firsts, numbers, choices, MOST: tl.constexpr):
    """The one place where the host is asked which rows it wants: whoever asked again might hear otherwise."""
    grant = grant_of(lane)
    number = tl.arange(0, MOST)
    there = (number < tl.load(grant + _GRANT_ROWS)) & (tl.load(grant + _GRANT_OVER) == 0)
    row = row_of_grant(grant, number)
    going = there & wanted_rows(grant, number, there) & (tl.load(row + _DONE, there, 1) == 0)
    place = tl.cumsum(going.to(tl.int32)) - 1
    count = tl.load(row + _COUNT, going, 0).to(tl.int32)
    tl.store(numbers + place, number, going)
    tl.store(starts + place, tl.cumsum(count) - count, going)
    tl.store(firsts + place, tl.load(row + _FIRST, going, 0).to(tl.int32), going)
    tl.store(choices + place, tl.load(row + _CHOICE, going, 0), going)
    rows, queries = tl.sum(going.to(tl.int32)), tl.sum(count)
    tl.store(starts + rows, queries)
    tl.store(lane + _ROWS, rows.to(tl.int64))
    tl.store(lane + _QUERIES, queries.to(tl.int64))
    tl.store(lane + _STEPS, tl.load(grant + _GRANT_STEPS))


@triton.jit(do_not_specialize=["groups", "most_chunks"])
def _fill(lane, starts, row_of, pages, tokens, numbers, groups, most_chunks):
    """One program a row: its page tables, and what its queries read."""
    place = tl.program_id(0)
    if place >= tl.load(lane + _ROWS):
        return
    row = row_of_grant(grant_of(lane), tl.load(numbers + place))
    at = tl.arange(0, _BLOCK)
    chunks = tl.load(row + _CHUNKS).to(tl.int32)
    tables = tl.load(row + _TABLES).to(tl.pointer_type(tl.int32))
    own = pages + place.to(tl.int64) * groups * most_chunks
    for group in range(groups):
        for begin in range(0, chunks, _BLOCK):
            inside = begin + at < chunks
            page = tl.load(tables + group * chunks + begin + at, inside, -1)
            tl.store(own + group * most_chunks + begin + at, page, inside)
    count, start = tl.load(row + _COUNT).to(tl.int32), tl.load(starts + place)
    inputs = tl.load(row + _INPUTS).to(tl.pointer_type(tl.int32))
    known = tl.load(row + _MADE) == 0
    last = tl.load(row + _NEXT).to(tl.int32)
    for begin in range(0, count, _BLOCK):
        inside = begin + at < count
        token = tl.where(known, tl.load(inputs + begin + at, inside & known, 0), last)
        tl.store(tokens + start + begin + at, token, inside)
        tl.store(row_of + start + begin + at, place, inside)
