"""The chance that running sequences outgrow the KV pool before enough of them end."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import inf, sqrt
from statistics import NormalDist

from crosspool.core.ids import ModelIndex, RequestId
from crosspool.pools.kv import KvPool
from crosspool.scheduler.output_lengths import OutputLengths
from crosspool.scheduler.sequence import Sequence

HORIZONS = (32, 128, 512, 2048)
"""How far ahead the pool is foreseen, in tokens of each sequence."""
RENEWED_AFTER = 32
"""A sequence's part of the forecast holds for so many tokens."""

_Outlook = tuple[tuple[float, float, float], ...]
"""At each horizon: expected pages, their variance, and the pages if the sequence has not ended."""


class OutgrowthRisk:
    """Foresees what running sequences will hold. ``risk`` 1 or above: everything is allowed."""

    def __init__(self, pool: KvPool, lengths: OutputLengths, risk: float) -> None:
        self._pool = pool
        self._lengths = lengths
        self._deviations = NormalDist().inv_cdf(1 - risk) if risk < 1 else -inf
        self._most_growth = max(pool.pages_for(model, HORIZONS[-1]) for model in pool.models) + 1
        self._known: dict[RequestId, tuple[int, _Outlook]] = {}

    def forecast(self, running: Collection[Sequence], wanted: int) -> Forecast:
        """Of the sequences that run now, which are sure to want so many pages more. Little is computed before
        it is asked for, and nothing while everybody could grow to the last horizon."""
        most = self._pool.held + wanted + len(running) * self._most_growth
        return Forecast(self, self._pool, running, self._deviations, most)

    def most_pages(self, sequence: Sequence) -> int:
        """No horizon sees more of a sequence that starts."""
        return self._pool.pages_for(sequence.request.model, sequence.known) + self._most_growth

    def renew(self, sequences: Iterable[Sequence]) -> list[tuple[ModelIndex, _Outlook]]:
        """The outlook of each of these, which are all that run: others are forgotten."""
        known, self._known = self._known, {}
        outlooks = []
        for sequence in sequences:
            request, age = sequence.request, sequence.known // RENEWED_AFTER
            entry = known.get(request.id)
            if entry is None or entry[0] != age:
                entry = (age, self.outlook(sequence))
            self._known[request.id] = entry
            outlooks.append((request.model, entry[1]))
        return outlooks

    def outlook(self, sequence: Sequence, shared: float | None = None) -> _Outlook:
        """A sequence either goes on and grows, or has ended and given everything back. ``shared``: the part
        of its pages that others hold anyway, if it has no table that says so."""
        model, made = sequence.request.model, len(sequence.output)
        if shared is None:
            shared = 0.0 if sequence.table is None else self._pool.shared_by_others(sequence.table)
        result = []
        for horizon in HORIZONS:
            more = min(horizon, sequence.remaining)
            alive = self._lengths.chance_of_more(model, made, more)
            pages = self._pool.settled_pages(model, sequence.known + more) - shared
            result.append((alive * pages, alive * (1 - alive) * pages * pages, pages))
        return tuple(result)


class Forecast:
    """What the pool will hold, as one pass of admission sees it.

    The pages that a model's sequences hold at a horizon are a sum of independent sequences, taken as normal
    and never more than if all go on. Of other models, what lies within their floor is theirs in any case, and
    they never pass their cap.
    """

    def __init__(
        self,
        risk: OutgrowthRisk,
        pool: KvPool,
        running: Iterable[Sequence],
        deviations: float,
        most: int,
    ) -> None:
        self._risk = risk
        self._pool = pool
        self._running = running
        self._deviations = deviations
        self._most = most
        self._started: list[Sequence] = []
        self._sums: dict[ModelIndex, list[list[float]]] | None = None

    def started(self, sequence: Sequence) -> None:
        """One more will run."""
        self._most += self._risk.most_pages(sequence)
        if self._sums is None:
            self._started.append(sequence)
        else:
            self._add(self._sums, sequence.request.model, self._risk.outlook(sequence))

    def allows(self, sequence: Sequence, shared: int = 0) -> bool:
        """Whether the risk is borne at every horizon if this sequence starts too, ``shared`` of whose pages
        others hold already."""
        if self._deviations == -inf or (
            self._most + self._risk.most_pages(sequence)
            <= self._pool.quotas(sequence.request.model).never_kept(sequence.request.model)
        ):
            return True
        if self._sums is None:
            self._sums = {}
            for model, outlook in self._risk.renew([*self._running, *self._started]):
                self._add(self._sums, model, outlook)
        outlook = self._risk.outlook(sequence, shared)
        return all(self._fits(sequence.request.model, index, own) for index, own in enumerate(outlook))

    def _add(self, sums: dict[ModelIndex, list[list[float]]], model: ModelIndex, outlook: _Outlook) -> None:
        of_model = sums.setdefault(model, [[0.0, 0.0, 0.0] for _ in HORIZONS])
        for parts, sequence in zip(of_model, outlook, strict=True):
            for part in range(3):
                parts[part] += sequence[part]

    def _fits(self, model: ModelIndex, index: int, own: tuple[float, float, float]) -> bool:
        """Whether the risk is borne at one horizon, by the model's cap and by the pool."""
        assert self._sums is not None
        quotas, deviations = self._pool.quotas(model), self._deviations
        mean, variance, most = (
            a + b for a, b in zip(own, self._sums.get(model, [[0.0] * 3] * len(HORIZONS))[index], strict=True)
        )
        if min(mean + deviations * sqrt(variance), most) > quotas.bounds(model)[1]:
            return False
        room: float = quotas.total - quotas.floors_of_others(model)
        for other, parts in self._sums.items():
            if other == model or other not in quotas:
                continue
            expected, spread, all_go_on = parts[index]
            floor, cap = quotas.bounds(other)
            if floor < expected < cap:
                room += floor
                mean += expected
                variance += spread
                most += all_go_on
            elif expected >= cap:
                room += floor - cap
        return min(mean + deviations * sqrt(variance), most) <= room
