"""Which preempted sequences are copied to host memory, because that costs less than to compute them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain, count

from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.errors import InvariantError
from crosspool.core.ids import CopyId, HostPage, ModelIndex, PageId
from crosspool.costs.copies import CopyCosts
from crosspool.pools.kv import KvPool
from crosspool.pools.page_table import PageTable
from crosspool.pools.spill import SpillStore
from crosspool.scheduler.pipeline import Pipeline
from crosspool.scheduler.sequence import Sequence


class Spilling:
    """Copies between the KV pool and the spill store.

    Where the store has no room, a sequence computes its tokens again: a copy that has been paid for is not
    given up for one that is still to be made. ``sequences`` and ``bytes`` count what was copied to its end.
    """

    def __init__(self, pool: KvPool, store: SpillStore, pipeline: Pipeline, costs: CopyCosts) -> None:
        self._pool = pool
        self._store = store
        self._pipeline = pipeline
        self._costs = costs
        self._in_flight: dict[CopyId, tuple[PageCopy, Sequence]] = {}
        self._new: list[PageCopy] = []
        self._ids = count()
        self.sequences: Counter[tuple[ModelIndex, Direction]] = Counter()
        self.bytes: Counter[tuple[ModelIndex, Direction]] = Counter()

    @property
    def store(self) -> SpillStore:
        return self._store

    def spill(self, sequence: Sequence) -> bool:
        """Begin to copy out what an idle sequence has computed, if that is cheaper and there is room. It
        keeps its pages until the copy is over."""
        table, tokens = sequence.table, sequence.computed
        assert table is not None
        pages = table.written(tokens)
        if not self._is_cheaper(sequence, table, sum(map(len, pages))):
            return False
        spilled = self._store.take(tokens, table.kept_from, list(map(len, pages)))
        if spilled is None:
            return False
        sequence.spilled = spilled
        self._begin(sequence, Direction.OUT, pages, spilled.since(0))
        return True

    def bring_back(self, sequence: Sequence) -> bool:
        """Begin to copy back what a sequence that has just been admitted has in the store, but for what it
        shares. Returns False if there is nothing that it would lack."""
        table, spilled = sequence.table, sequence.spilled
        assert table is not None
        if spilled is None:
            return False
        shared = len(table.shared)
        if table.tokens >= spilled.tokens:
            self.give_back(sequence)
            return False
        if not self._pool.restore(table, spilled.tokens, spilled.kept_from):
            raise InvariantError(f"request {sequence.request.id} was admitted, but its pages are not there")
        self._begin(sequence, Direction.IN, table.written(spilled.tokens, shared), spilled.since(shared))
        return True

    def new_copies(self) -> list[PageCopy]:
        """What has begun since the last call."""
        new, self._new = self._new, []
        return new

    def copied(self, event: CopiedEvent) -> Sequence:
        """A copy is over. Returns its sequence, whose state has yet to change. What was brought back counts
        as computed, and is no longer in the store, unless the copy has failed."""
        copy, sequence = self._in_flight.pop(event.copy)
        sequence.copy = None
        if sequence.finish is not None or event.error is not None:
            return sequence
        self._costs.learn(copy.direction, copy.size, event.time)
        key = (sequence.request.model, copy.direction)
        self.sequences[key] += 1
        self.bytes[key] += copy.size
        if copy.direction is Direction.IN:
            assert sequence.spilled is not None
            sequence.computed = sequence.spilled.tokens
            self.give_back(sequence)
        return sequence

    def give_back(self, sequence: Sequence) -> None:
        """Free what a sequence has in the store, if it has anything. None of it is being copied."""
        if sequence.spilled is not None:
            self._store.give_back(sequence.spilled)
            sequence.spilled = None

    def _is_cheaper(self, sequence: Sequence, table: PageTable, pages: int) -> bool:
        """Whether copying out and back takes less time than computing again.

        Of either, what other sequences hold too need not be done when this one comes back: that stays in the
        prefix cache. What only this one holds will most likely be gone, because pages are short.
        """
        lasting = self._pool.chunks_of_others(table)
        kept, model = lasting * table.layout.tokens_per_page, sequence.request.model
        if sequence.computed <= kept:
            return False
        page_bytes, time = table.layout.page_bytes, self._costs.time
        out = time(Direction.OUT, pages * page_bytes)
        back = time(Direction.IN, (pages - lasting * len(table.groups)) * page_bytes)
        return out + back < self._pipeline.prompt_time(model, sequence.computed - kept, kept)

    def _begin(
        self,
        sequence: Sequence,
        direction: Direction,
        pages: Iterable[Iterable[PageId]],
        host_pages: Iterable[Iterable[HostPage]],
    ) -> None:
        assert sequence.table is not None
        flat = tuple(chain.from_iterable(pages))
        copy = PageCopy(
            CopyId(next(self._ids)),
            sequence.request.id,
            direction,
            flat,
            tuple(chain.from_iterable(host_pages)),
            len(flat) * sequence.table.layout.page_bytes,
        )
        sequence.copy = copy.id
        self._in_flight[copy.id] = (copy, sequence)
        self._new.append(copy)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise InvariantError unless the store holds exactly what these sequences have in it, and every copy
        in flight is between pages and host pages that its sequence holds."""
        self._store.check(s.spilled for s in sequences if s.spilled is not None)
        for copy, sequence in self._in_flight.values():
            table, spilled = sequence.table, sequence.spilled
            if (
                sequence.copy != copy.id
                or table is None
                or spilled is None
                or not set(table.held()).issuperset(copy.pages)
                or not set(spilled.pages).issuperset(copy.host_pages)
                or len(copy.pages) != len(copy.host_pages)
            ):
                raise InvariantError(f"copy {copy.id} of request {copy.request} is of pages it does not hold")
