"""Copies between KV pages and host memory in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from crosspool.core.copies import CopiedEvent, PageCopy
from crosspool.core.ids import Nanoseconds
from crosspool.sim.clock import VirtualClock


class VirtualCopier:
    """Copies one after another, each to its end; ``time_of`` says how long one takes."""

    def __init__(self, clock: VirtualClock, time_of: Callable[[PageCopy], int]) -> None:
        self._clock = clock
        self._time_of = time_of
        self._copies: deque[tuple[int, int, PageCopy]] = deque()

    def begin(self, copy: PageCopy) -> None:
        """It begins when those before it are over."""
        begin = max(self._clock.now(), self._copies[-1][1] if self._copies else 0)
        self._copies.append((begin, begin + self._time_of(copy), copy))

    @property
    def next_end(self) -> int | None:
        """When the next copy is over."""
        return self._copies[0][1] if self._copies else None

    def end(self) -> tuple[PageCopy, CopiedEvent]:
        """The next copy is over."""
        begin, end, copy = self._copies.popleft()
        return copy, CopiedEvent(copy.id, Nanoseconds(end - begin))

    def close(self) -> None:
        self._copies.clear()
