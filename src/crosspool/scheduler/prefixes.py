"""What sequences have in common is computed once: they share the chunks with which they begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from crosspool.core.ids import RequestId
from crosspool.pools.kv import KvPool
from crosspool.pools.prefix_cache import Found, next_key
from crosspool.scheduler.sequence import Sequence


class Prefixes:
    """Finds, takes over and publishes the chunks of sequences.

    Only whole chunks are shared, and the last known token is always computed, because its logits are needed:
    a sequence computes less than a chunk again of what it has in common with others.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._in_flight: dict[RequestId, bytes] = {}

    def find(self, sequence: Sequence) -> Found:
        """What the sequence would find of its known tokens. Chunks that some running sequence holds are pages
        that it takes from nobody."""
        if not self._pool.caches(sequence.request.model):
            return Found()
        return self._pool.find(self._keys(sequence, 0, self._most(sequence)))

    def found_tokens(self, sequence: Sequence) -> int:
        """Tokens that need not be computed."""
        return self.find(sequence).chunks * self._pool.layout(sequence.request.model).tokens_per_page

    def take_over(self, sequence: Sequence) -> None:
        """Hold what is there by now of an idle sequence's known tokens, and go on after it."""
        table = sequence.table
        if table is None or not self._pool.caches(table.model):
            return
        self._pool.share(table, self._keys(sequence, len(table.shared), self._most(sequence)))
        computed = len(table.shared) * table.layout.tokens_per_page
        if computed > sequence.computed:
            if not sequence.preemptions:
                sequence.cached_tokens += computed - sequence.computed
            sequence.computed = computed

    def publish(self, sequence: Sequence) -> bool:
        """Let others use what an idle sequence has computed. Returns whether a chunk is new."""
        table = sequence.table
        if table is None or not self._pool.caches(table.model):
            return False
        computed, shared = sequence.computed // table.layout.tokens_per_page, len(table.shared)
        if computed == shared:
            return False
        self._pool.publish(table, self._keys(sequence, shared, computed))
        return True

    # -- in flight ------------------------------------------------------------------------------------

    def choose(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those who may go on with their known tokens, in deadline order. Whoever would compute the same
        chunk as a micro-batch in flight, or as one before it here, waits for that, and then takes it over.

        Nobody waits for what is not in flight, so it does not matter what becomes of the other.
        """
        chosen: list[Sequence] = []
        taken = set(self._in_flight.values())
        for sequence in sorted(sequences, key=lambda s: s.order):
            self.take_over(sequence)
            chunk = self._next_chunk(sequence)
            if chunk is None:
                chosen.append(sequence)
            elif chunk not in taken:
                chosen.append(sequence)
                taken.add(chunk)
        return chosen

    def submitted(self, sequence: Sequence) -> None:
        """The sequence's next known tokens are being computed."""
        chunk = self._next_chunk(sequence)
        if chunk is not None:
            self._in_flight[sequence.request.id] = chunk

    def retired(self, sequence: Sequence) -> None:
        """No micro-batch in flight has a row of the sequence."""
        self._in_flight.pop(sequence.request.id, None)

    def _next_chunk(self, sequence: Sequence) -> bytes | None:
        """The key of what the sequence computes next, if others could take it over."""
        table = sequence.table
        if table is None or not self._pool.caches(table.model):
            return None
        index = len(table.shared)
        if index >= self._most(sequence):
            return None
        return next(self._keys(sequence, index, index + 1))

    def _most(self, sequence: Sequence) -> int:
        """Chunks that the sequence may take over."""
        return (sequence.known - 1) // self._pool.layout(sequence.request.model).tokens_per_page

    def _keys(self, sequence: Sequence, start: int, stop: int) -> Iterator[bytes]:
        """The keys of chunks start..stop-1, each made when it is first asked for."""
        keys, request = sequence.chunk_keys, sequence.request
        if not keys:
            keys.append(self._pool.root_key(request.model, request.tenant))
        size = self._pool.layout(request.model).tokens_per_page
        for index in range(start, stop):
            if len(keys) == index + 1:
                keys.append(next_key(keys[index], sequence.tokens(index * size, (index + 1) * size)))
            yield keys[index + 1]
