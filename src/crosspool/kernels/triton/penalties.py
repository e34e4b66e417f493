"""Penalties and suppression on the device, before a token is chosen, and the history that penalties see."""

from __future__ import annotations

import triton
import triton.language as tl

from crosspool.kernels import choice_fields
from crosspool.kernels.triton.choice_row import chooses, fields_of, real, source_of, suppresses_stops

_COPIED = tl.constexpr(1024)
_LISTED = tl.constexpr(256)
"""Entries of a history, or stop tokens, that are looked at together."""

_INDEX = tl.constexpr(choice_fields.INDEX)
_REPETITION, _PRESENCE = tl.constexpr(choice_fields.REPETITION), tl.constexpr(choice_fields.PRESENCE)
_FREQUENCY, _LOGPROBS = tl.constexpr(choice_fields.FREQUENCY), tl.constexpr(choice_fields.LOGPROBS)
_STOPS, _STOP_COUNT = tl.constexpr(choice_fields.STOPS), tl.constexpr(choice_fields.STOP_COUNT)
_HISTORY, _HISTORY_COUNT = tl.constexpr(choice_fields.HISTORY), tl.constexpr(choice_fields.HISTORY_COUNT)
_INFINITY = tl.constexpr(float("inf"))
_NO_ENTRY = tl.constexpr(2**31 - 1)


@triton.jit
def change(lane, choices, logits, altered, vocab):
    """Penalise and suppress. One program a row. What refuses the row makes its first logit no number."""
    row = tl.program_id(0)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    history_count, suppresses = tl.load(fields + _HISTORY_COUNT), suppresses_stops(fields)
    if (history_count == 0) & (not suppresses):
        return
    source = source_of(fields, logits, altered, row, vocab)
    at = tl.arange(0, _COPIED)
    if tl.load(fields + _LOGPROBS) >= 0:
        given = logits + row.to(tl.int64) * vocab
        for begin in range(0, vocab, _COPIED):
            inside = begin + at < vocab
            tl.store(source + begin + at, tl.load(given + begin + at, inside, 0.0), inside)
        tl.debug_barrier()
    broken = _penalise(fields, source, history_count, vocab)
    if suppresses:
        tl.debug_barrier()
        broken += _suppress(fields, source, vocab)
    if broken > 0:
        tl.debug_barrier()
        tl.store(source, float("nan"))


@triton.jit
def _penalise(fields, source, history_count, vocab):
    """Returns how many tokens are none of the vocabulary."""
    repetition = real(fields, _REPETITION).to(tl.float32)
    presence, frequency = real(fields, _PRESENCE).to(tl.float32), real(fields, _FREQUENCY).to(tl.float32)
    history = fields + tl.load(fields + _HISTORY)
    at = tl.arange(0, _LISTED)
    strangers = 0
    for begin in range(0, history_count, _LISTED):
        known = begin + at < history_count
        token = tl.load(history + 2 * (begin + at), known, 0)
        count = tl.load(history + 2 * (begin + at) + 1, known, 0)
        own = known & (token >= 0) & (token < vocab)
        strangers += tl.sum((known & (~own)).to(tl.int32))
        value = tl.load(source + token, own, 0.0)
        value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = tl.where(count > 0, value - presence - frequency * count.to(tl.float32), value)
        tl.store(source + token, value, own)
    return strangers


@triton.jit
def _suppress(fields, source, vocab):
    """Returns how many of the logits that are taken away were infinite or no numbers."""
    stop_count = tl.load(fields + _STOP_COUNT)
    stops = fields + tl.load(fields + _STOPS)
    at = tl.arange(0, _LISTED)
    broken = 0
    for begin in range(0, stop_count, _LISTED):
        token = tl.load(stops + begin + at, begin + at < stop_count, -1)
        own = (token >= 0) & (token < vocab)
        value = tl.load(source + token, own, 0.0)
        broken += tl.sum(((value != value) | (value == _INFINITY)).to(tl.int32))
        tl.store(source + token, -_INFINITY, own)
    return broken


@triton.jit
def remember(fields, token):
    """Count one more output token in the history, if there is one, and step the index."""
    tl.store(fields + _INDEX, tl.load(fields + _INDEX) + 1)
    place = tl.load(fields + _HISTORY)
    if place > 0:
        history, count = fields + place, tl.load(fields + _HISTORY_COUNT)
        at = tl.arange(0, _LISTED)
        own, made = count, tl.full((), 0, tl.int64)
        for begin in range(0, count, _LISTED):
            entry = history + 2 * (begin + at)
            same = (begin + at < count) & (tl.load(entry, begin + at < count, -1) == token)
            own = tl.minimum(own, tl.min(tl.where(same, begin + at, _NO_ENTRY)).to(tl.int64))
            made += tl.sum(tl.load(entry + 1, same, 0))
        tl.store(history + 2 * own, token.to(tl.int64))
        tl.store(history + 2 * own + 1, made + 1)
        tl.store(fields + _HISTORY_COUNT, tl.maximum(count, own + 1))
