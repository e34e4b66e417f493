"""The order rule (pick.py) over micro-batches as objects: its columns, and what counts as having passed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from crosspool.core.batch import Grant, Phase
from crosspool.core.pick import delays, pick


class InOrder(Protocol):
    """A micro-batch in flight; ``start_by`` and ``passed`` as in pick.py."""

    grant: Grant
    start_by: int
    passed: int


def pick_one(ready: Sequence[int], batches: Sequence[InOrder], now: int) -> int:
    """The index of the micro-batch, of those that are ready, whose next work runs now, or NOTHING."""
    return pick(
        ready,
        [batch.grant.phase for batch in batches],
        [batch.start_by for batch in batches],
        [batch.grant.id for batch in batches],
        [batch.grant.layer_cost for batch in batches],
        [batch.passed for batch in batches],
        now,
    )


def note_chunk(chunk: Grant, batches: Iterable[InOrder], now: int) -> int:
    """A layer task of a prompt chunk begins: it passes the decodes whose slack it takes. Returns when it is
    expected to end."""
    for batch in batches:
        if batch.grant.phase is Phase.DECODE and delays(batch.start_by, chunk.layer_cost, now):
            batch.passed += 1
    return now + chunk.layer_cost


def already_passed(batch: InOrder, chunk_ends: Iterable[int]) -> int:
    """Whether a layer task of a chunk that runs now, and is expected to end at one of these times, makes the
    token that begins wait."""
    decoding = batch.grant.phase is Phase.DECODE
    return int(decoding and any(delays(batch.start_by, 0, end) for end in chunk_ends))
