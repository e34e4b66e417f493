"""Who may start: one line per model, earliest deadline first, if the pages it needs to start are there."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from crosspool.core.errors import OverloadedError
from crosspool.core.ids import KvDevice, ModelIndex, Nanoseconds
from crosspool.pools.kv import KvPool
from crosspool.pools.prefix_cache import Found
from crosspool.scheduler.prefixes import Prefixes
from crosspool.scheduler.risk import OutgrowthRisk
from crosspool.scheduler.sequence import Sequence

AGED_AFTER = 4
"""A head of line that has waited this many times its TTFT target lets only small requests pass it."""
PASSING_PART = 4
"""Those who pass an aged head of line hold together one in so many of the pages that it lacks at most."""


@dataclass(slots=True)
class _Demand:
    """Pages of one device that sequences which run there are sure to want soon, and how many these are."""

    free: int
    wanted: int = 0
    running: int = 0

    @property
    def spare(self) -> int:
        return self.free - self.wanted


@dataclass(slots=True)
class _Passing:
    """The pages of these devices which a head of line that has aged leaves to those who pass it."""

    devices: frozenset[KvDevice]
    pages: int


class Admission:
    """The lines of waiting requests. A preempted sequence comes back to its place in the line."""

    def __init__(
        self, pool: KvPool, prefixes: Prefixes, risk: OutgrowthRisk, *, max_waiting: int, max_running: int
    ) -> None:
        self._pool = pool
        self._prefixes = prefixes
        self._risk = risk
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

        Nor does a sequence start while the risk is too high that those which run outgrow the pool, unless it
        has aged. A head of line that has aged lets those of its devices pass it whose pages it could not
        have: those below the floor of another model, or all if its own model's cap is what it waits for. Of
        the pages that it waits for, those who start since then hold a small part of what it lacks. So
        requests of few pages need not wait for it, and it lacks ever less as those who run come to an end.
        """
        if not any(self._lines.values()) or self._blocked_at == self._pool.releases:
            return []
        running = list(running)
        demands, wanted = self._demands(running)
        forecast = self._risk.forecast(running, wanted.total())
        started: list[Sequence] = []
        blocked: set[ModelIndex] = set()
        passing: list[_Passing] = []
        while sequence := self._first(blocked):
            model = sequence.request.model
            reach = self._pool.reach(model)
            found = self._prefixes.find(sequence)
            needed = self._needs(sequence, found)
            left = [room for room in passing if not room.devices.isdisjoint(reach)]
            most = min((room.pages for room in left), default=None)
            device = self._place(model, found.home, needed, demands, wanted, most)
            aged, alone = now > _aged_at(sequence), not any(demands[d].running for d in reach)
            allowed = aged or alone or forecast.allows(sequence, self._held(model, found))
            if device is None or not allowed:
                if aged and not self._is_capped(model, needed, wanted):
                    lacking = needed - self._room(model, demands, wanted)
                    if lacking > 0:
                        passing.append(self._leave_room(sequence, lacking, running))
                blocked.add(model)
                continue
            for room in left:
                room.pages -= needed
            self.leave(sequence)
            sequence.admitted_at = now
            sequence.table = self._pool.open(model, device)
            self._prefixes.take_over(sequence)
            for other in self._pool.devices:
                demands[other].free = self._pool.available_on(other)
            wants = self._wants(sequence)
            demands[device].running += 1
            demands[device].wanted += wants
            wanted[model] += wants
            forecast.started(sequence)
            started.append(sequence)
        self._blocked_at = self._pool.releases
        return started

    def _first(self, blocked: set[ModelIndex]) -> Sequence | None:
        heads = [line[0] for model, line in self._lines.items() if line and model not in blocked]
        return min(heads, key=lambda s: s.order, default=None)

    def _demands(self, running: Iterable[Sequence]) -> tuple[list[_Demand], Counter[ModelIndex]]:
        """By device, and the pages wanted by model."""
        demands = [_Demand(self._pool.available_on(device)) for device in self._pool.devices]
        wanted: Counter[ModelIndex] = Counter()
        for sequence in running:
            if sequence.table is not None:
                wants = self._wants(sequence)
                demand = demands[sequence.table.device]
                demand.running += 1
                demand.wanted += wants
                wanted[sequence.request.model] += wants
        return demands, wanted

    def _place(
        self,
        model: ModelIndex,
        home: KvDevice | None,
        needed: int,
        demands: list[_Demand],
        wanted: Counter[ModelIndex],
        most: int | None,
    ) -> KvDevice | None:
        """The home of a sequence that needs so many pages, if it may start: of those within reach the device
        that has its prefix, ``home``, if there is room for the rest, or that with most pages to spare. With
        ``most`` it may take no more pages than that, but for those below its model's floor."""
        if sum(demand.running for demand in demands) >= self._max_running:
            return None
        reach = self._pool.reach(model)
        if most is not None and needed > max(most, self._own(model, wanted)):
            return None
        if any(demands[device].running for device in reach) and needed > self._room(model, demands, wanted):
            return None
        if home is not None and needed <= demands[home].spare:
            return home
        return max(reach, key=lambda device: (demands[device].spare, -device))

    def _room(self, model: ModelIndex, demands: list[_Demand], wanted: Counter[ModelIndex]) -> int:
        """Pages that a sequence of this model could start with beside those that run."""
        reach = self._pool.reach(model)
        free = sum(demands[device].free for device in reach)
        spare = max(sum(demands[device].spare for device in reach), min(self._own(model, wanted), free))
        return min(spare, self._pool.quotas(model).spare(model, free, wanted))

    def _own(self, model: ModelIndex, wanted: Counter[ModelIndex]) -> int:
        """Pages below the model's floor that its running sequences do not want."""
        return self._pool.quotas(model).room_below_floor(model) - wanted[model]

    def _leave_room(self, head: Sequence, lacking: int, running: Iterable[Sequence]) -> _Passing:
        """What an aged head of line that lacks so many pages leaves to others: part of what it would lack
        without those who have started since it aged, less what these hold."""
        devices, aged_at = frozenset(self._pool.reach(head.request.model)), _aged_at(head)
        held = sum(
            s.table.pages + self._wants(s)
            for s in running
            if s.table is not None and s.admitted_at > aged_at and s.table.device in devices
        )
        return _Passing(devices, (lacking - held) // PASSING_PART - held)

    def _is_capped(self, model: ModelIndex, needed: int, wanted: Counter[ModelIndex]) -> bool:
        """Whether who needs so many pages waits for others of its own model, whatever other models hold."""
        return needed + wanted[model] > self._pool.quotas(model).room_below_cap(model)

    def _needs(self, sequence: Sequence, found: Found) -> int:
        """Pages that nobody holds yet, for its known tokens and one more."""
        model = sequence.request.model
        return self._pool.pages_for(model, sequence.known + 1) - self._held(model, found)

    def _held(self, model: ModelIndex, found: Found) -> int:
        """Pages that some running sequence holds already."""
        return found.held * len(self._pool.layout(model).groups)

    def _wants(self, sequence: Sequence) -> int:
        """Pages still lacking for the known tokens, and one chunk to grow."""
        assert sequence.table is not None
        most = self._pool.pages_for(sequence.request.model, sequence.known) - sequence.table.pages
        lacking = min(max(0, most), self._pool.missing(sequence.table, sequence.known))
        return lacking + len(sequence.table.groups)


def _aged_at(sequence: Sequence) -> Nanoseconds:
    return Nanoseconds(sequence.due + (AGED_AFTER - 1) * (sequence.due - sequence.request.arrival))
