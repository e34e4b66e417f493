"""How many pages of the KV pool each model is sure to get, and how many it may hold at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from crosspool.core.errors import InvariantError
from crosspool.core.ids import ModelIndex


@dataclass(frozen=True, slots=True)
class Quota:
    """One model's pages: ``floor`` are never lent to others, ``cap`` is never passed (None: no cap)."""

    floor: int = 0
    cap: int | None = None


class Quotas:
    """Counts the pages that each of the models which share some devices holds, against its quota.

    The floors must fit the pool. Where every model's floor is its cap, each has a pool of its own.
    """

    def __init__(self, quotas: Mapping[ModelIndex, Quota], total: int) -> None:
        self._floors = {model: quota.floor for model, quota in quotas.items()}
        self._caps = {
            model: total if quota.cap is None else min(quota.cap, total) for model, quota in quotas.items()
        }
        self._floored = [model for model, floor in self._floors.items() if floor]
        self._total = total
        self._held = dict.fromkeys(self._floors, 0)
        self._unclaimed = sum(self._floors.values())

    def __iter__(self) -> Iterator[ModelIndex]:
        """The models that share the pages."""
        return iter(self._held)

    def __contains__(self, model: ModelIndex) -> bool:
        return model in self._held

    @property
    def total(self) -> int:
        """All pages."""
        return self._total

    def held_by(self, model: ModelIndex) -> int:
        """Pages that this model's sequences hold now."""
        return self._held[model]

    def bounds(self, model: ModelIndex) -> tuple[int, int]:
        """The model's floor and cap."""
        return self._floors[model], self._caps[model]

    def floors_of_others(self, model: ModelIndex) -> int:
        """Pages that this model can never have."""
        return sum(self._floors[other] for other in self._floored if other != model)

    def never_kept(self, model: ModelIndex) -> int:
        """Pages of the pool that are in no floor, and within the model's cap."""
        return min(self._total - sum(self._floors.values()), self._caps[model])

    def most(self, model: ModelIndex) -> int:
        """The most pages that the model can hold, when no other holds more than its floor."""
        return min(self._caps[model], self._total - self.floors_of_others(model))

    def count(self, model: ModelIndex, pages: int) -> None:
        """The model has taken so many pages, or given them back if negative."""
        held, floor = self._held[model], self._floors[model]
        self._held[model] = held + pages
        if floor:
            self._unclaimed += max(0, floor - held - pages) - max(0, floor - held)

    def available(self, model: ModelIndex, free: int) -> int:
        """Of ``free`` pages in the pool, how many this model may take."""
        held = self._held[model]
        kept = self._unclaimed - max(0, self._floors[model] - held)
        return min(free - kept, self._caps[model] - held)

    def spare(self, model: ModelIndex, free: int, wanted: Mapping[ModelIndex, int]) -> int:
        """Of ``free`` pages, how many this model may take beside those that all models want. What a model
        wants comes out of its floor first, and never out of another's."""
        own = wanted.get(model, 0)
        others = sum(pages for other, pages in wanted.items() if other in self._held) - own
        others += sum(
            max(0, self._floors[other] - self._held[other] - wanted.get(other, 0))
            for other in self._floored
            if other != model
        )
        return min(max(free - others, self.room_below_floor(model)), self.room_below_cap(model)) - own

    def room_below_cap(self, model: ModelIndex) -> int:
        """Pages that the model may take before it is at its cap."""
        return self._caps[model] - self._held[model]

    def room_below_floor(self, model: ModelIndex) -> int:
        """Free pages that only this model may take."""
        return max(0, self._floors[model] - self._held[model])

    def gives(self, giver: ModelIndex, taker: ModelIndex, missing: int) -> bool:
        """Whether a page of the giver's brings the taker nearer to the ``missing`` pages it cannot have."""
        if giver == taker:
            return True
        return self._held[giver] > self._floors[giver] and missing <= self.room_below_cap(taker)

    def check(self, held: Mapping[ModelIndex, int], free: int) -> None:
        """Raise InvariantError unless ``held`` is what was counted, no cap is passed, and all floors that are
        not held are among the ``free`` pages."""
        if dict(held) != self._held:
            raise InvariantError(f"pages by model are {dict(held)}, but {self._held} was counted")
        for model, pages in self._held.items():
            if pages > self._caps[model]:
                raise InvariantError(f"model {model} holds {pages} pages, its cap is {self._caps[model]}")
        unclaimed = sum(self.room_below_floor(model) for model in self._floors)
        if unclaimed != self._unclaimed or unclaimed > free:
            raise InvariantError(
                f"{free} pages are free, but {unclaimed} are lacking up to floors, {self._unclaimed} counted"
            )
