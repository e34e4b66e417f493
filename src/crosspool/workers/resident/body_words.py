"""A micro-batch in memory, as compiled code finds its way in it (body.py makes it): header and rows."""

from __future__ import annotations

from crosspool.kernels.numba.compile import inline
from crosspool.kernels.numba.intrinsics import words

ROWS, GROUPS, ARENA, PAGE_BYTES, PARTS, ROW_TABLE, KV_PARTS, ROUNDS = range(8)
PASS_ROWS, PASS_QUERIES, PASS_CHOOSERS = range(8, 11)
ROW_NUMBERS, STARTS, FIRSTS, ROW_OF, TABLES, INPUTS, CHOOSERS, BLOCKS = range(12, 20)
COS, SIN, STREAM, NORMED, OUTPUTS, HALF_ROOM = range(20, 26)
BODY_WORDS = 32
"""ROW_NUMBERS are the rows of a pass; STARTS, FIRSTS, ROW_OF and TABLES as in kernels/numba/batch.py Pass;
INPUTS its token ids; CHOOSERS the last query of each of its rows that chooses a token. STREAM (the residual
stream), NORMED (what the next half reads) and OUTPUTS (what each of PARTS devices has made of it, one after
another) are [T, H] in model dtype. Of rows whose context KV_PARTS devices share (0: all is at home): BLOCKS
and ROUNDS as in kernels/numba/attention_spread.py Spread, and the HALF_ROOM that the pieces of a half
share."""

ALIVE, DONE, FIRST, COUNT, ROW_INPUTS, ROW_TABLES, CHOICE, STEPS = range(8)
MADE, REMAINING, STOPS, STOP_COUNT, STOPS_AFTER, NEXT, CHOICE_LENGTH, PIPED, ROW_BLOCKS = range(8, 17)
ROW_WORDS = 24
USED_UP, ENDED = 1, 2
"""The next pass reads COUNT tokens at ROW_INPUTS, at positions from FIRST on. ALIVE is cleared by the
engine's thread. DONE is set when the row has made its last token: USED_UP of this grant, ENDED of all.
CHOICE is the address of the CHOICE_LENGTH words of kernels/numba/choice.py, 0 if the row chooses nothing. A
stop token ends the row once it has MADE more than STOPS_AFTER tokens in this grant. NEXT is the token that it
made last. PIPED is its request while its tokens may go into the pipe, else NO_REQUEST. ROW_BLOCKS leads to
the row's part of BLOCKS, as ROW_TABLES to that of TABLES."""


@inline
def body_at(address):
    """The header's words."""
    return words(address, BODY_WORDS)


@inline
def row_at(body, row):
    """The words of a row."""
    return words(body[ROW_TABLE] + 8 * ROW_WORDS * row, ROW_WORDS)
