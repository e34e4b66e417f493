"""A grant in device memory, as int64 words: what a lane needs to run its passes without the host.

The engine's thread writes the words once and copies them to the device. From then on only the lane's kernels
write there: a row's position, count and last token move on at the end of each pass. What the host may still
want to say is in FLAGS, in host memory that the device reads.

GRANT_WORDS words, the GRANT_ROWS rows of ROW_WORDS each, and then whatever these lead to.
"""

from __future__ import annotations

# -- a grant: behind the words of its model, which have the places that they have in a lane ------------------
GRANT_ROWS, GRANT_STEPS, GRANT_OVER, FLAGS, NUMBER = range(5, 10)
GRANT_WORDS = 16
"""GRANT_STEPS still to do. GRANT_OVER is set with the last record: whatever is still queued for this grant
does nothing. FLAGS is the address of int64 [FLAG_WORDS + GRANT_ROWS] in host memory: RECALLED; HELD, of which
loops make no pass when only so many of GRANT_STEPS are left; and from WANTED on whether each row is still
wanted. NUMBER says in records whose they are."""

RECALLED, HELD, WANTED = range(3)
FLAG_WORDS = WANTED

# -- a row --------------------------------------------------------------------------------------------------
FIRST, COUNT, INPUTS, TABLES, CHUNKS, CHOICE, ROW_STEPS, REMAINING = range(8)
MADE, DONE, NEXT, STOP_TOKENS, STOP_TOKEN_COUNT, STOPS_AFTER = range(8, 14)
ROW_WORDS = 16
"""The next pass reads COUNT tokens at positions from FIRST on: int32 at INPUTS in the row's first pass, and
afterwards the one token NEXT that it made. TABLES is the address of its page tables, int32 [groups, CHUNKS].
CHOICE is the address of how it chooses tokens (kernels/choice_fields.py), 0 if it chooses none. It has MADE
so many of ROW_STEPS tokens in this grant, and may make REMAINING in all. One of the STOP_TOKEN_COUNT int64
at STOP_TOKENS ends it once it has made more than STOPS_AFTER. DONE: it makes no more in this grant."""

# -- a record of a lane's ring -------------------------------------------------------------------------------
RECORD_SEQUENCE, RECORD_KIND, RECORD_GRANT, RECORD_ROW, RECORD_TOKEN, RECORD_MADE = range(6)
RECORD_WORDS = 8
TOKEN, END, FAILURE, SILENCE = 1, 2, 3, 4
"""int64 in pinned host memory. SEQUENCE counts a lane's records from 1 and never starts again; record s is at
place (s - 1) modulo the ring's length. After its records are written the lane releases how many there are.
TOKEN: row RECORD_ROW has made its token number RECORD_MADE (from 1) of this grant. END: the grant is over,
and nothing of it will touch a page any more. FAILURE: likewise, for a row's logits held no largest number.
SILENCE: likewise, for another device has not answered."""
