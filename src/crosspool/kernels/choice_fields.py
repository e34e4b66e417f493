"""How one row chooses its tokens, and what it reports of them, as int64 words: the same for all compiled
kernels."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

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
(HISTORY 0: no penalties); one report a token (report_words) if LOGPROBS, the number of alternatives, is not
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


TOP_COUNT, LOGPROB, RANK, TOP = range(4)


def report_words(alternatives: int) -> int:
    """Int64 words of one token's report: the number of alternatives in it, the token's log-probability (bits
    of a float64), its rank, the alternatives' ids, best first, and from TOP + ``alternatives`` on their
    log-probabilities (bits again)."""
    return TOP + 2 * alternatives


def read_words(words: np.ndarray, alternatives: int) -> tuple[float, int, tuple[tuple[int, float], ...]]:
    """The log-probability, the rank and the alternatives (id, log-probability) of ``report_words`` words."""
    bits = words.view(np.float64)
    count = int(words[TOP_COUNT])
    ids = words[TOP : TOP + count].tolist()
    logprobs = bits[TOP + alternatives : TOP + alternatives + count].tolist()
    return float(bits[LOGPROB]), int(words[RANK]), tuple(zip(ids, logprobs, strict=True))
