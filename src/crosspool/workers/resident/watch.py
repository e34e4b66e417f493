"""Sees whether teams that have work get on with it."""

from __future__ import annotations

from collections.abc import Sequence

from crosspool.core.ids import Nanoseconds

LOOK_EVERY = 1_000_000_000
"""ns. Of a longer time between two looks only so much counts: then the whole process stood still, and says
nothing about its teams."""


class Watch:
    """Told how many tasks and waits each team has ended (control.py BEATS), how long has any been silent?

    A team beats after each task, and every second while it waits for one.
    """

    def __init__(self) -> None:
        self._looked: int | None = None
        self._beats: list[int] = []
        self._silent: list[int] = []

    def silence(self, beats: Sequence[int], now: Nanoseconds) -> int:
        """The longest time, in ns, for which some team has not beaten."""
        if self._looked is None:
            self._silent = [0] * len(beats)
        else:
            since = min(LOOK_EVERY, now - self._looked)
            pairs = zip(beats, self._beats, self._silent, strict=True)
            self._silent = [0 if new != old else silent + since for new, old, silent in pairs]
        self._looked, self._beats = now, list(beats)
        return max(self._silent)
