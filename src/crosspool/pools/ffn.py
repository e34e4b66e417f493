"""The weights pool's residency: which models' FFN weights are in memory, within one budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.core.errors import InvariantError, OutOfMemoryError
from crosspool.core.ids import ModelIndex
from crosspool.core.info import Residency


@dataclass(slots=True)
class _Holding:
    name: str
    bytes: int
    residency: Residency


class FfnPool:
    """Accounts for the FFN weights of all models. The tensors themselves are held by the workers.

    A model is cold (holds nothing), loading (its bytes are reserved), resident (may be evicted while it is
    idle) or pinned (never evicted).
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self._holdings: dict[ModelIndex, _Holding] = {}

    @property
    def used(self) -> int:
        return sum(holding.bytes for holding in self._holdings.values())

    @property
    def free(self) -> int:
        return self.budget - self.used

    @property
    def evictable(self) -> int:
        """Bytes of models that are resident but not pinned."""
        return sum(h.bytes for h in self._holdings.values() if h.residency is Residency.RESIDENT)

    def residency(self, model: ModelIndex) -> Residency:
        holding = self._holdings.get(model)
        return Residency.COLD if holding is None else holding.residency

    def begin_load(self, model: ModelIndex, name: str, bytes_by_layer: Sequence[int]) -> None:
        """Reserve the bytes of all layers, or raise OutOfMemoryError and reserve nothing."""
        if model in self._holdings:
            raise InvariantError(f"model {name} is {self.residency(model)} and cannot be loaded again")
        needed = sum(bytes_by_layer)
        if needed > self.free:
            raise OutOfMemoryError(
                f"FFN weights of model {name} do not fit the weights pool of {self.budget:,} bytes",
                needed=needed,
                free=self.free,
                evictable=self.evictable,
            )
        self._holdings[model] = _Holding(name, needed, Residency.LOADING)

    def finish_load(self, model: ModelIndex, pinned: bool) -> None:
        """The weights are in memory."""
        self._expect(model, Residency.LOADING).residency = Residency.PINNED if pinned else Residency.RESIDENT

    def fail_load(self, model: ModelIndex) -> None:
        """Give the reserved bytes back."""
        self._expect(model, Residency.LOADING)
        del self._holdings[model]

    def evict(self, model: ModelIndex) -> None:
        """The weights have left memory. Raises InvariantError for a model that is not evictable."""
        self._expect(model, Residency.RESIDENT)
        del self._holdings[model]

    def _expect(self, model: ModelIndex, residency: Residency) -> _Holding:
        holding = self._holdings.get(model)
        if holding is None or holding.residency is not residency:
            raise InvariantError(f"model {model} is {self.residency(model)}, not {residency}")
        return holding
