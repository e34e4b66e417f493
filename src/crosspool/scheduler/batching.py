"""Rows of a micro-batch: which sequences of one model travel together, and with how many tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial

from crosspool.core.batch import Phase, Row, TokenChoice
from crosspool.core.config import SchedulerConfig
from crosspool.scheduler.sequence import Sequence, State


def phase_of(sequence: Sequence) -> Phase:
    """A sequence with one token to compute that it made itself decodes; anything else reads known tokens."""
    return Phase.DECODE if sequence.state is State.DECODING else Phase.PREFILL


def choose_decodes(idle: Iterable[Sequence], limit: int) -> list[Sequence]:
    """Those whose last token is oldest, ``limit`` at most: with more sequences than rows they take turns."""
    return sorted(idle, key=lambda s: (s.last_token_at, s.order))[:limit]


def choose_chunks(
    idle: Iterable[Sequence], fits: Callable[[list[tuple[int, int]]], bool], config: SchedulerConfig
) -> list[tuple[Sequence, int]]:
    """Sequences and how many known tokens of each to compute, earliest deadline first.

    ``fits`` says whether a micro-batch of these (start, tokens) chunks is short enough; one quantum always
    is, so that prefill goes on. Every chunk but a sequence's last is a whole number of quanta.
    """
    chosen: list[tuple[Sequence, int]] = []
    rows: list[tuple[int, int]] = []
    budget = config.max_chunk_tokens
    for sequence in sorted(idle, key=lambda s: s.order)[: config.max_prefill_rows]:
        start, most = sequence.computed, min(sequence.pending, budget)
        if most < sequence.pending:
            most -= most % config.chunk_quantum
        tokens = _longest(partial(_fits_too, fits, rows, start), most, config.chunk_quantum)
        if not chosen:
            tokens = max(tokens, min(config.chunk_quantum, most))
        if tokens == 0:
            break
        rows.append((start, tokens))
        chosen.append((sequence, tokens))
        budget -= tokens
    return chosen


def _fits_too(
    fits: Callable[[list[tuple[int, int]]], bool], rows: list[tuple[int, int]], start: int, tokens: int
) -> bool:
    return fits([*rows, (start, tokens)])


def _longest(fits: Callable[[int], bool], most: int, quantum: int) -> int:
    """The most tokens, in whole quanta or ``most`` itself, that fit; fewer fit if more do."""
    quanta = range(1, -(-most // quantum) + 1)
    fitting = bisect_left(quanta, True, key=lambda n: not fits(min(n * quantum, most)))
    return min(fitting * quantum, most)


def decode_row(sequence: Sequence, steps: int) -> Row:
    """The newest token is the input; pages for ``steps`` tokens are already held."""
    return _row(sequence, sequence.computed + 1, steps)


def prefill_row(sequence: Sequence, tokens: int) -> Row:
    """The next ``tokens`` known tokens; the last of them all chooses the next token."""
    stop = sequence.computed + tokens
    return _row(sequence, stop, 1 if stop == sequence.known else 0)


def _row(sequence: Sequence, stop: int, steps: int) -> Row:
    assert sequence.table is not None
    return Row(
        request=sequence.request.id,
        start=sequence.computed,
        tokens=sequence.tokens(sequence.computed, stop),
        pages=sequence.table.snapshot(),
        choice=_choice(sequence) if steps else None,
        steps=steps,
    )


def _choice(sequence: Sequence) -> TokenChoice:
    request = sequence.request
    penalised = request.sampling.penalised
    return TokenChoice(
        params=request.sampling,
        seed=request.seed,
        output_index=len(sequence.output),
        remaining=sequence.remaining,
        stop_token_ids=request.stop_token_ids,
        prompt=request.prompt_token_ids if penalised else (),
        output=tuple(sequence.output) if penalised else (),
    )
