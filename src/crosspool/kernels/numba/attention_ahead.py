"""Asking memory for the keys and values that a thread needs next, a few cache lines at a time, while it
computes with those that are there.

Computing with a block takes about as long as reading it, so one after the other takes twice as long. A core
can wait for some 16 lines at once, and what asks for more waits itself: so requests are spread evenly.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import I8, I32, I64, VOID, declared, words

AHEAD_WORDS = 16
POSITION, END, SLOT, PLACE, LINE, VALUES, LINES, AT_ONCE = range(8)
TABLE, ARENA, PAGE_BYTES, TOKENS, TOKEN_BYTES, VALUE_OFFSET = range(8, 14)
"""What is asked for next, int64. The positions up to END of one row; the present one's SLOT of TOKENS in its
page, where the keys of slot 0 are at PLACE; the next of LINES cache lines of its keys, or of its values.
AT_ONCE of them are asked for at once. Of the row: its page table's address, and where its pages lie."""

LINE_BYTES = 64
MOST_AT_ONCE = 16


@intrinsic
def _fetch(typing: Any, address: Any, count: Any) -> Any:
    """Ask for ``count`` cache lines, to the core's own large cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        function = declared(builder, "llvm.prefetch.p0", VOID, [I8.as_pointer(), I32, I32, I32])
        with cgutils.for_range(builder, count) as loop:
            place = builder.add(address, builder.mul(loop.index, I64(LINE_BYTES)))
            builder.call(function, [builder.inttoptr(place, I8.as_pointer()), I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@inline
def look_ahead(shape, batch, kv, tile, begin, end, address):
    """From now on ``ask`` asks for the tile's keys and values from position ``begin`` to ``end - 1``; what it
    has to know is at ``address``."""
    ahead = words(address, AHEAD_WORDS)
    ahead[POSITION], ahead[END], ahead[LINE], ahead[VALUES] = begin, max(begin, end), 0, 0
    ahead[LINES] = -(-tile.kv_heads * shape.head_bytes // LINE_BYTES)
    ahead[AT_ONCE] = -(-ahead[LINES] // -(-ahead[LINES] // MOST_AT_ONCE))
    ahead[TABLE] = batch.tables[tile.row * batch.groups + kv.group]
    ahead[ARENA] = kv.arena + kv.offset + tile.kv_head * shape.head_bytes
    ahead[PAGE_BYTES], ahead[TOKENS] = kv.page_bytes, kv.tokens_per_page
    ahead[TOKEN_BYTES], ahead[VALUE_OFFSET] = shape.token_bytes, shape.value_offset
    if begin < end:
        ahead[SLOT] = begin % kv.tokens_per_page
        ahead[PLACE] = _page(ahead, begin)


@inline
def look_nowhere(address):
    """From now on ``ask`` asks for nothing."""
    ahead = words(address, AHEAD_WORDS)
    ahead[POSITION] = ahead[END] = 0


@inline
def asks_a_position(address):
    """How often ``ask`` must be called for each position."""
    ahead = words(address, AHEAD_WORDS)
    if ahead[POSITION] == ahead[END]:
        return 0
    return -(-ahead[LINES] // ahead[AT_ONCE]) * (2 if ahead[VALUE_OFFSET] != 0 else 1)


@inline
def _page(ahead, position):
    chunk = position // ahead[TOKENS]
    return ahead[ARENA] + words(ahead[TABLE], chunk + 1)[chunk] * ahead[PAGE_BYTES]


@kernel
def ask(address, times):
    """Ask for the next lines, ``times`` times AT_ONCE, as far as there are any."""
    ahead = words(address, AHEAD_WORDS)
    for _ in range(times):
        if ahead[POSITION] == ahead[END]:
            return
        place = ahead[PLACE] + ahead[SLOT] * ahead[TOKEN_BYTES] + ahead[VALUES] * ahead[VALUE_OFFSET]
        count = min(ahead[AT_ONCE], ahead[LINES] - ahead[LINE])
        _fetch(place + LINE_BYTES * ahead[LINE], count)
        ahead[LINE] += count
        if ahead[LINE] == ahead[LINES]:
            ahead[LINE] = 0
            if ahead[VALUES] == 0 and ahead[VALUE_OFFSET] != 0:
                ahead[VALUES] = 1
            else:
                _step(ahead)


@inline
def _step(ahead):
    """To the next position."""
    ahead[VALUES] = 0
    ahead[POSITION] += 1
    ahead[SLOT] += 1
    if ahead[SLOT] == ahead[TOKENS] and ahead[POSITION] < ahead[END]:
        ahead[SLOT] = 0
        ahead[PLACE] = _page(ahead, ahead[POSITION])
