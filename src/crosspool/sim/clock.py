"""Time that moves only when it is told to."""

from __future__ import annotations

from crosspool.core.errors import InvariantError
from crosspool.core.ids import Nanoseconds


class VirtualClock:
    """A clock in simulated nanoseconds from 0."""

    def __init__(self) -> None:
        self._now = 0

    def now(self) -> Nanoseconds:
        return Nanoseconds(self._now)

    def advance_to(self, time: int) -> None:
        """Raises InvariantError for a time that has passed."""
        if time < self._now:
            raise InvariantError(f"time cannot go back from {self._now} to {time}")
        self._now = time
