"""The sequences that hold pages: they grow, stall for want of a page, and preempt who is due later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from crosspool.core.ids import RequestId
from crosspool.pools.kv import KvPool
from crosspool.scheduler.sequence import Sequence, State


class RunningSequences:
    """Every sequence with a page table. ``preempt`` takes the pages of one for another: they are given back
    at once, or when what is in them has been copied to host memory."""

    def __init__(self, pool: KvPool, preempt: Callable[[Sequence], None]) -> None:
        self._pool = pool
        self._preempt = preempt
        self._sequences: dict[RequestId, Sequence] = {}
        self._stalled: dict[RequestId, int] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request.id in self._sequences

    def add(self, sequence: Sequence) -> None:
        """A sequence that has just been given its table."""
        self._sequences[sequence.request.id] = sequence

    def give_back(self, sequence: Sequence) -> None:
        """Free all that a sequence holds, if it holds anything."""
        if sequence.table is not None:
            self._pool.release(sequence.table)
            sequence.table = None
        self._sequences.pop(sequence.request.id, None)
        self._stalled.pop(sequence.request.id, None)

    @property
    def stalled(self) -> Collection[RequestId]:
        """Those who wait for pages."""
        return self._stalled.keys()

    def is_stalled(self, sequence: Sequence) -> bool:
        return sequence.request.id in self._stalled

    def stalls_before(self, sequence: Sequence) -> bool:
        """Whether a sequence that is due earlier waits for pages which this one could give it."""
        if not self._stalled or sequence.table is None:
            return False
        waiting = ((self._sequences[request], tokens) for request, tokens in self._stalled.items())
        return any(
            other.order < sequence.order and self._helps(sequence, other, tokens) for other, tokens in waiting
        )

    def hold_if_free(self, sequence: Sequence, tokens: int) -> bool:
        """Hold pages for ``tokens`` tokens if they are free, and disturb nobody."""
        return sequence.table is not None and sequence.idle and self._pool.grow(sequence.table, tokens)

    def hold(self, sequence: Sequence, tokens: int) -> bool:
        """Hold pages for ``tokens`` tokens, preempting the latest deadlines if the pool is short.

        A sequence for which there are none now stalls, and is served first next time. False also for one
        that an earlier member of the same micro-batch has just preempted.
        """
        if sequence.table is None or not sequence.idle:
            return False
        if self._secure(sequence, tokens):
            return True
        self._stalled[sequence.request.id] = tokens
        return False

    def serve_stalled(self) -> None:
        """Those who wait for pages, in deadline order, whatever else their model has in flight."""
        if not self._stalled:
            return
        for sequence in sorted((self._sequences[r] for r in self._stalled), key=lambda s: s.order):
            tokens = self._stalled.get(sequence.request.id)
            if tokens is not None and self._secure(sequence, tokens):
                self._stalled.pop(sequence.request.id, None)

    def _secure(self, sequence: Sequence, tokens: int) -> bool:
        assert sequence.table is not None
        while not self._pool.grow(sequence.table, tokens):
            if self._pages_are_coming(sequence, tokens):
                return False
            victim = self._latest_after(sequence, tokens)
            if victim is None:
                return False
            self._stalled.pop(victim.request.id, None)
            self._preempt(victim)
        return True

    def _pages_are_coming(self, sequence: Sequence, tokens: int) -> bool:
        """Whether pages that help are being copied to host memory. Copies follow one another, so that nobody
        else needs to be preempted before it is known that these are not enough."""
        return any(
            other.state is State.SPILLING and self._helps(other, sequence, tokens)
            for other in self._sequences.values()
        )

    def _latest_after(self, sequence: Sequence, tokens: int) -> Sequence | None:
        """The sequence of latest deadline that is not in flight, is due later, and holds pages that help."""
        later = (
            other
            for other in self._sequences.values()
            if other.idle and other.order > sequence.order and self._helps(other, sequence, tokens)
        )
        return max(later, key=lambda s: s.order, default=None)

    def _helps(self, giver: Sequence, taker: Sequence, tokens: int) -> bool:
        """Whether pages of ``giver`` are what ``taker`` lacks to hold ``tokens`` tokens: pages of devices
        within its reach, and that its model may have."""
        assert taker.table is not None
        model = taker.request.model
        if giver.table is None or not any(giver.table.held_on[device] for device in self._pool.reach(model)):
            return False
        missing = self._pool.missing(taker.table, tokens)
        if missing > self._pool.available_to(model):
            return self._pool.quotas(model).gives(giver.request.model, model, missing)
        return True
