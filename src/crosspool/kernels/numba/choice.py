"""Token choice of one row by one thread: penalties, suppression, temperature, filters, draw, report.

The rules are those of kernels/reference/sampling.py: a row's token depends on its own logits, seed and index
alone, and among equals the lowest token id comes first, everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.exp_double import doubles
from crosspool.kernels.numba.intrinsics import floats, words
from crosspool.kernels.numba.largest import largest
from crosspool.kernels.numba.likely import keep_likely
from crosspool.kernels.numba.logprobs import TOP, read_words, report_token, report_words, weigh
from crosspool.kernels.numba.random_draw import draw, sums_floats, uniform

(
    SEED,
    FIRST,
    INDEX,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    REPETITION,
    PRESENCE,
    FREQUENCY,
    MIN_TOKENS,
    STOPS,
    STOP_COUNT,
    HISTORY,
    HISTORY_COUNT,
    LOGPROBS,
    REPORTS,
) = range(17)
CHOICE_WORDS = 17
"""FIRST is the index of the grant's first token and INDEX that of the next. TEMPERATURE, TOP_P, MIN_P and the
penalties are the bits of a float64. STOPS, HISTORY and REPORTS say at which word of the same array a list
begins: STOP_COUNT ids; HISTORY_COUNT pairs of a token that occurred and how often it did in the output
(HISTORY 0: no penalties); one report a token (logprobs.py) if LOGPROBS, the number of alternatives, is not
-1."""


def describe_choice(
    *,
    seed: int,
    index: int,
    steps: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    min_tokens: int = 0,
    stop_token_ids: Collection[int] = (),
    prompt: Iterable[int] = (),
    output: Iterable[int] = (),
    logprobs: int | None = None,
) -> np.ndarray:
    """How one row chooses up to ``steps`` tokens, of which the first is output number ``index``.

    One int64 array: CHOICE_WORDS fields, and all that they refer to. ``temperature`` 0 is greedy; ``top_k``
    below 1, ``top_p`` 1 and ``min_p`` 0 mean no limit. The stop tokens are not chosen before output number
    ``min_tokens``. ``prompt`` and ``output`` are the tokens so far; they matter for penalties only.
    """
    penalised = repetition != 1 or presence != 0 or frequency != 0
    counts = _output_counts(prompt, output) if penalised else {}
    stops = CHOICE_WORDS
    history = stops + len(stop_token_ids)
    reports = history + (2 * (len(counts) + steps) if penalised else 0)
    end = reports + (0 if logprobs is None else steps * report_words(logprobs))
    fields = np.zeros(end, np.int64)
    fields[SEED] = np.uint64(seed % 2**64).astype(np.int64)
    fields[FIRST] = fields[INDEX] = index
    fields[TOP_K], fields[MIN_TOKENS] = top_k, min_tokens
    reals = fields.view(np.float64)
    reals[TEMPERATURE], reals[TOP_P], reals[MIN_P] = temperature, top_p, min_p
    reals[REPETITION], reals[PRESENCE], reals[FREQUENCY] = repetition, presence, frequency
    fields[STOPS], fields[STOP_COUNT] = stops, len(stop_token_ids)
    fields[stops:history] = sorted(stop_token_ids)
    fields[HISTORY], fields[HISTORY_COUNT] = history if penalised else 0, len(counts)
    fields[history : history + 2 * len(counts)] = [part for entry in counts.items() for part in entry]
    fields[LOGPROBS], fields[REPORTS] = -1 if logprobs is None else logprobs, reports
    return fields


def _output_counts(prompt: Iterable[int], output: Iterable[int]) -> dict[int, int]:
    counts = dict.fromkeys(prompt, 0)
    for token in output:
        counts[token] = counts.get(token, 0) + 1
    return counts


def read_report(fields: np.ndarray, step: int) -> tuple[float, int, tuple[tuple[int, float], ...]]:
    """The log-probability and rank of the token that was number ``step`` (from 0) to be chosen, and the most
    likely tokens with theirs, best first. Only of rows that asked for them."""
    alternatives = int(fields[LOGPROBS])
    size = report_words(alternatives)
    begin = int(fields[REPORTS]) + step * size
    return read_words(fields[begin : begin + size], alternatives)


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
