"""Who may start: one line per model, earliest deadline first, if the pages it needs to start are there."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from crosspool.core.errors import OverloadedError
from crosspool.core.ids import KvDevice, ModelIndex, Nanoseconds
from crosspool.pools.kv import KvPool
from crosspool.scheduler.prefixes import Prefixes
from crosspool.scheduler.sequence import Sequence, State

AGED_AFTER = 4
"""A head of line that has waited this many times its TTFT target lets nobody of another model pass it."""


@dataclass(slots=True)
class _Demand:
    """Pages of one device that sequences which run there are sure to want soon, and how many these are."""

    free: int
    wanted: int = 0
    running: int = 0

    @property
    def spare(self) -> int:
        return self.free - self.wanted


class Admission:
    """The lines of waiting requests. A preempted sequence comes back to its place in the line."""

    def __init__(self, pool: KvPool, prefixes: Prefixes, *, max_waiting: int, max_running: int) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._max_waiting = max_waiting
        self._max_running = max_running
        self._lines: dict[ModelIndex, list[Sequence]] = {}
        self._blocked_at: int | None = None

    def waiting(self, model: ModelIndex) -> int:
        return len(self._lines.get(model, ()))

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    def join(self, sequence: Sequence) -> None:
        """A new request. Raises OverloadedError if its model's line is full."""
        if self.waiting(sequence.request.model) >= self._max_waiting:
            raise OverloadedError(f"{self._max_waiting} requests are waiting for this model already")
        self.rejoin(sequence)

    def rejoin(self, sequence: Sequence) -> None:
        """A preempted sequence: the bound on the line does not apply to what was accepted once."""
        self._blocked_at = None
        insort(self._lines.setdefault(sequence.request.model, []), sequence, key=lambda s: s.order)

    def retry(self) -> None:
        """Somebody may need fewer pages of its own than before."""
        self._blocked_at = None

    def leave(self, sequence: Sequence) -> None:
        self._lines[sequence.request.model].remove(sequence)

    def admit(self, running: Iterable[Sequence], now: Nanoseconds) -> list[Sequence]:
        """Give a page table to every waiting sequence that may start now; it grows with the first chunk.

        A sequence may start if, beside all that running sequences still lack for their known tokens and one
        more chunk each, the pages of its own known tokens are free, on all devices within its reach together:
        where its home lacks some, it takes those of others. Those that it shares with a running sequence cost
        nothing, and cached pages count as free. The pages themselves are reserved chunk by chunk, but for
        those found in the prefix cache. Where nothing runs within its reach it may start in any case: it fits
        there, or it would have been refused. What running sequences take later has been counted here, so
        whoever did not fit is tried again only when pages have been given back or a prompt has been read
        further.
        """
        if not any(self._lines.values()) or self._blocked_at == self._pool.releases:
            return []
        demands = self._demands(running)
        started: list[Sequence] = []
        blocked: set[ModelIndex] = set()
        closed: set[KvDevice] = set()
        while sequence := self._first(blocked):
            reach = self._pool.reach(sequence.request.model)
            device = None if closed.intersection(reach) else self._place(sequence, demands)
            if device is None:
                if now > sequence.due + (AGED_AFTER - 1) * (sequence.due - sequence.request.arrival):
                    closed.update(reach)
                blocked.add(sequence.request.model)
                continue
            self.leave(sequence)
            sequence.table = self._pool.open(sequence.request.model, device)
            sequence.move(State.PREFILLING)
            self._prefixes.take_over(sequence)
            for other in self._pool.devices:
                demands[other].free = self._pool.available_on(other)
            demands[device].running += 1
            demands[device].wanted += self._wants(sequence)
            started.append(sequence)
        self._blocked_at = self._pool.releases
        return started

    def _first(self, blocked: set[ModelIndex]) -> Sequence | None:
        heads = [line[0] for model, line in self._lines.items() if line and model not in blocked]
        return min(heads, key=lambda s: s.order, default=None)

    def _demands(self, running: Iterable[Sequence]) -> list[_Demand]:
        demands = [_Demand(self._pool.available_on(device)) for device in self._pool.devices]
        for sequence in running:
            if sequence.table is not None:
                demand = demands[sequence.table.device]
                demand.running += 1
                demand.wanted += self._wants(sequence)
        return demands

    def _place(self, sequence: Sequence, demands: list[_Demand]) -> KvDevice | None:
        """Its home, if the sequence may start: of those within reach the device that has its prefix, if there
        is room for the rest, or that with most pages to spare."""
        if sum(demand.running for demand in demands) >= self._max_running:
            return None
        model = sequence.request.model
        reach, found = self._pool.reach(model), self._prefixes.find(sequence)
        running = sum(demands[device].running for device in reach)
        groups = len(self._pool.layout(model).groups)
        needed = self._pool.pages_for(model, sequence.known + 1) - found.held * groups
        if running and needed > sum(demands[device].spare for device in reach):
            return None
        if found.home is not None and needed <= demands[found.home].spare:
            return found.home
        return max(reach, key=lambda device: (demands[device].spare, -device))

    def _wants(self, sequence: Sequence) -> int:
        """Pages still lacking for the known tokens, and one chunk to grow."""
        assert sequence.table is not None
        most = self._pool.pages_for(sequence.request.model, sequence.known) - sequence.table.pages
        lacking = min(max(0, most), self._pool.missing(sequence.table, sequence.known))
        return lacking + len(sequence.table.groups)
