"""Token choice of one row by one thread: penalties, suppression, temperature, filters, draw, report.

The rules are those of kernels/reference/sampling.py: a row's token depends on its own logits, seed and index
alone, and among equals the lowest token id comes first, everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspool.kernels.choice_fields import (
    FIRST,
    FREQUENCY,
    HISTORY,
    HISTORY_COUNT,
    INDEX,
    LOGPROBS,
    MIN_P,
    MIN_TOKENS,
    PRESENCE,
    REPETITION,
    REPORTS,
    SEED,
    STOP_COUNT,
    STOPS,
    TEMPERATURE,
    TOP,
    TOP_K,
    TOP_P,
)
from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.exp_double import doubles
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.largest import largest
from crosspool.kernels.numba.likely import keep_likely
from crosspool.kernels.numba.logprobs import report_token, weigh
from crosspool.kernels.numba.random_draw import draw, sums_floats, uniform


class Scratch(NamedTuple):
    """What one thread needs for a vocabulary of V: ``weights`` and ``heap`` float64 [V], ``ids`` int64 [V],
    ``sums`` as for ``draw``, and ``row`` the address of float32 [V]."""

    weights: np.ndarray
    heap: np.ndarray
    ids: np.ndarray
    sums: np.ndarray
    row: int


def choice_mine_bytes(vocab: int) -> int:
    """Scratch of each thread, at a multiple of 8."""
    return 28 * vocab + 8 * sums_floats(vocab)


_sums_floats = inline(sums_floats)


@inline
def _scratch(mine, vocab):
    sums = mine + 24 * vocab
    size = _sums_floats(vocab)
    return Scratch(
        doubles(mine, vocab),
        doubles(mine + 8 * vocab, vocab),
        words(mine + 16 * vocab, vocab),
        doubles(sums, size),
        sums + 8 * size,
    )


@kernel
def choose(fields, logits, vocab, mine):
    """Choose the row's next token from the logits at an address (float32 [vocab], may be overwritten).

    Returns -1 if there is none, and leaves ``fields`` as they were: NaN or infinity is among the logits,
    every token is suppressed, or one that was to be penalised is none of the vocabulary. To be called
    ``steps`` times at most. ``mine`` is the address of ``choice_mine_bytes``.
    """
    highest = largest(logits, vocab)
    if highest < 0:
        return highest
    scratch = _scratch(mine, vocab)
    token, row = highest, logits
    if fields[HISTORY_COUNT] > 0 or _suppresses(fields):
        if fields[LOGPROBS] >= 0:
            row = scratch.row
            _copy(logits, row, vocab)
        token = _change(fields, row, vocab)
        if token < 0:
            return token
    if fields.view(np.float64)[TEMPERATURE] > 0:
        token = _draw(fields, floats(row, vocab), vocab, token, scratch)
    if fields[LOGPROBS] >= 0:
        size = TOP + 2 * fields[LOGPROBS]
        at = fields[REPORTS] + (fields[INDEX] - fields[FIRST]) * size
        report_token(floats(logits, vocab), vocab, highest, token, fields[LOGPROBS], fields, at, scratch)
    if fields[HISTORY] > 0:
        _remember(fields, token)
    fields[INDEX] += 1
    return token


@inline
def _copy(source, target, count):
    given, copied = floats(source, count), floats(target, count)
    for i in range(count):
        copied[i] = given[i]


@inline
def _suppresses(fields):
    return fields[STOP_COUNT] > 0 and fields[INDEX] < fields[MIN_TOKENS]


@kernel
def _change(fields, row, vocab):
    """Penalise and suppress in the logits at address ``row``; the largest of what they are then, or -1."""
    logits = floats(row, vocab)
    reals = fields.view(np.float64)
    repetition, presence = np.float32(reals[REPETITION]), np.float32(reals[PRESENCE])
    frequency = np.float32(reals[FREQUENCY])
    for entry in range(fields[HISTORY_COUNT]):
        place = fields[HISTORY] + 2 * entry
        token, count = fields[place], fields[place + 1]
        if token < 0 or token >= vocab:
            return -1
        value = logits[token]
        value = value / repetition if value > 0 else value * repetition
        if count > 0:
            value = value - presence - frequency * np.float32(count)
        logits[token] = value
    if _suppresses(fields):
        for i in range(fields[STOPS], fields[STOPS] + fields[STOP_COUNT]):
            if 0 <= fields[i] < vocab:
                logits[fields[i]] = np.float32(-np.inf)
    return largest(row, vocab)


@kernel
def _draw(fields, row, vocab, best, scratch):
    """Draw from the logits ``row``, whose largest is at ``best``."""
    reals = fields.view(np.float64)
    weigh(row, vocab, row[best], reals[TEMPERATURE], scratch.weights)
    min_p, top_k, top_p = reals[MIN_P], fields[TOP_K], reals[TOP_P]
    keep_likely(scratch.weights, vocab, min_p, top_k, top_p, scratch.heap, scratch.ids, scratch.sums)
    u = uniform(fields[SEED], fields[INDEX])
    return draw(scratch.weights, vocab, u, scratch.sums)


@inline
def _remember(fields, token):
    """Count one more output token in the history."""
    end = fields[HISTORY] + 2 * fields[HISTORY_COUNT]
    place = fields[HISTORY]
    while place < end and fields[place] != token:
        place += 2
    if place == end:
        fields[place], fields[place + 1] = token, 0
        fields[HISTORY_COUNT] += 1
    fields[place + 1] += 1
