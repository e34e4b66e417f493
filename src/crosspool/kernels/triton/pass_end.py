"""The end of a pass on the device: stop checks, the next input, and the records that the host reads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import grant_words, words
from crosspool.kernels.triton.pass_again import store_again
from crosspool.kernels.triton.pass_begin import PassRows, grant_of, row_of_grant, wanted_rows

_ROWS, _RECORDS = tl.constexpr(words.ROWS), tl.constexpr(words.RECORDS)
_FAILED = tl.constexpr(words.FAILED)
_GRANT_STEPS, _GRANT_OVER = tl.constexpr(grant_words.GRANT_STEPS), tl.constexpr(grant_words.GRANT_OVER)
_FLAGS, _NUMBER = tl.constexpr(grant_words.FLAGS), tl.constexpr(grant_words.NUMBER)
_RECALLED = tl.constexpr(grant_words.RECALLED)
_FIRST, _COUNT = tl.constexpr(grant_words.FIRST), tl.constexpr(grant_words.COUNT)
_CHOICE, _ROW_STEPS = tl.constexpr(grant_words.CHOICE), tl.constexpr(grant_words.ROW_STEPS)
_REMAINING, _MADE = tl.constexpr(grant_words.REMAINING), tl.constexpr(grant_words.MADE)
_DONE, _NEXT = tl.constexpr(grant_words.DONE), tl.constexpr(grant_words.NEXT)
_STOP_TOKENS = tl.constexpr(grant_words.STOP_TOKENS)
_STOP_TOKEN_COUNT = tl.constexpr(grant_words.STOP_TOKEN_COUNT)
_STOPS_AFTER = tl.constexpr(grant_words.STOPS_AFTER)
_RECORD_WORDS = tl.constexpr(grant_words.RECORD_WORDS)
_SEQUENCE, _KIND = tl.constexpr(grant_words.RECORD_SEQUENCE), tl.constexpr(grant_words.RECORD_KIND)
_OF_GRANT, _OF_ROW = tl.constexpr(grant_words.RECORD_GRANT), tl.constexpr(grant_words.RECORD_ROW)
_OF_TOKEN, _OF_MADE = tl.constexpr(grant_words.RECORD_TOKEN), tl.constexpr(grant_words.RECORD_MADE)
_TOKEN, _END = tl.constexpr(grant_words.TOKEN), tl.constexpr(grant_words.END)
_FAILURE, _SILENCE = tl.constexpr(grant_words.FAILURE), tl.constexpr(grant_words.SILENCE)


def end_pass(lane: Tensor, rows: PassRows, most_rows: int, records: Tensor, written: Tensor) -> None:
    """Every row that chooses has its token, or -1: then the grant fails, as it does if the lane has. What
    follows from a token is as in core/batch.py row_after.

    ``records`` int64 [ring, RECORD_WORDS] and ``written`` int64 [1] are in host memory. The ring has room:
    who launches sees to it that the host has read what is there.
    """
    _end_pass[(1,)](
        lane,
        rows.numbers,
        rows.chosen,
        records,
        written,
        RING=len(records),
        MOST=max(2, triton.next_power_of_2(most_rows)),
        num_warps=1,
    )


@triton.jit
def _end_pass(lane, numbers, chosen, records, written, RING: tl.constexpr, MOST: tl.constexpr):
    grant = grant_of(lane)
    if tl.load(grant + _GRANT_OVER) != 0:
        return
    place = tl.arange(0, MOST)
    there = place < tl.load(lane + _ROWS)
    number = tl.load(numbers + place, there, 0)
    row = row_of_grant(grant, number)
    chooses = there & (tl.load(row + _CHOICE, there, 0) != 0)
    token = tl.load(chosen + place, chooses, 0)
    silent = tl.load(lane + _FAILED) != 0
    failed = silent | (tl.sum((chooses & (token < 0)).to(tl.int32)) > 0)
    made = tl.load(row + _MADE, there, 0) + chooses.to(tl.int64)
    done = _step_rows(row, there, chooses, token, made)
    wanted = wanted_rows(grant, number, there)
    steps = tl.load(grant + _GRANT_STEPS) - 1
    tl.store(grant + _GRANT_STEPS, steps)
    flags = tl.load(grant + _FLAGS).to(tl.pointer_type(tl.int64))
    recalled = tl.load(flags + _RECALLED, volatile=True) != 0
    going = tl.sum((there & wanted & (done == 0)).to(tl.int32))
    over = failed | recalled | (steps == 0) | (going == 0)
    tl.store(grant + _GRANT_OVER, over.to(tl.int64))
    store_again(lane, grant, steps, over.to(tl.int64))
    told = chooses & wanted & (not failed)
    kind = tl.where(silent, _SILENCE, tl.where(failed, _FAILURE, _END)).to(tl.int64)
    _tell(lane, grant, number, told, token, made, over, kind, records, written, RING)


@triton.jit
def _step_rows(row, there, chooses, token, made):
    """Move the rows of the pass on to their next input. Returns which of them make no more."""
    tl.store(row + _FIRST, tl.load(row + _FIRST, there, 0) + tl.load(row + _COUNT, there, 0), there)
    tl.store(row + _COUNT, tl.full(row.shape, 1, tl.int64), there)
    tl.store(row + _NEXT, token, chooses)
    tl.store(row + _MADE, made, there)
    stops = tl.load(row + _STOP_TOKENS, chooses, 0).to(tl.pointer_type(tl.int64))
    count = tl.load(row + _STOP_TOKEN_COUNT, chooses, 0)
    stopped = token < -1
    for i in range(tl.max(count)):
        stopped = stopped | ((i < count) & (tl.load(stops + i, i < count, -1) == token))
    stopped = stopped & (made > tl.load(row + _STOPS_AFTER, chooses, 0))
    used_up = made == tl.load(row + _ROW_STEPS, chooses, 0)
    ended = stopped | used_up | (made == tl.load(row + _REMAINING, chooses, 0))
    done = ((not chooses) | ended).to(tl.int64)
    tl.store(row + _DONE, done, there)
    return done


@triton.jit
def _tell(lane, grant, number, told, token, made, over, kind, records, written, RING: tl.constexpr):
    """Write a record for each token and for the end, and then release how many there are."""
    begin, whose = tl.load(lane + _RECORDS), tl.load(grant + _NUMBER)
    order = tl.cumsum(told.to(tl.int32)).to(tl.int64)
    record = records + (begin + order - 1) % RING * _RECORD_WORDS
    tl.store(record + _SEQUENCE, begin + order, told)
    tl.store(record + _KIND, tl.full(record.shape, _TOKEN, tl.int64), told)
    tl.store(record + _OF_GRANT, tl.zeros(record.shape, tl.int64) + whose, told)
    tl.store(record + _OF_ROW, number.to(tl.int64), told)
    tl.store(record + _OF_TOKEN, token, told)
    tl.store(record + _OF_MADE, made, told)
    end = begin + tl.sum(told.to(tl.int64))
    last = records + end % RING * _RECORD_WORDS
    if over:
        tl.store(last + _SEQUENCE, end + 1)
        tl.store(last + _KIND, kind)
        tl.store(last + _OF_GRANT, whose)
        end += 1
    tl.store(lane + _RECORDS, end)
    tl.debug_barrier()
    tl.atomic_xchg(written, end, sem="release", scope="sys")
