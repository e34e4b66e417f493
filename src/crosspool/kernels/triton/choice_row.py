"""How token choice on the device finds a row's fields (kernels/choice_fields.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels import choice_fields
from crosspool.kernels.triton.words import ROWS

_ROWS = tl.constexpr(ROWS)
_INDEX, _MIN_TOKENS = tl.constexpr(choice_fields.INDEX), tl.constexpr(choice_fields.MIN_TOKENS)
_STOP_COUNT, _LOGPROBS = tl.constexpr(choice_fields.STOP_COUNT), tl.constexpr(choice_fields.LOGPROBS)
_HISTORY_COUNT = tl.constexpr(choice_fields.HISTORY_COUNT)


@triton.jit
def chooses(lane, choices, row):
    """Whether there is such a row, and it chooses a token."""
    there = row < tl.load(lane + _ROWS)
    return there & (tl.load(choices + row) != 0)


@triton.jit
def fields_of(choices, row):
    """The fields of a row's choice."""
    return tl.load(choices + row).to(tl.pointer_type(tl.int64))


@triton.jit
def real(fields, FIELD: tl.constexpr):
    return tl.load(fields + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def suppresses_stops(fields):
    return (tl.load(fields + _STOP_COUNT) > 0) & (tl.load(fields + _INDEX) < tl.load(fields + _MIN_TOKENS))


@triton.jit
def source_of(fields, logits, altered, row, vocab):
    """The logits that the token is drawn from: those given, unless they are to be reported as they were."""
    changes = (tl.load(fields + _HISTORY_COUNT) > 0) | suppresses_stops(fields)
    source = logits + row.to(tl.int64) * vocab
    if changes & (tl.load(fields + _LOGPROBS) >= 0):
        source = altered + row.to(tl.int64) * vocab
    return source
