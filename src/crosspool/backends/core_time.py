"""How much of its time a core of this machine is idle."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
IDLE = 4
"""The field of a core's line in /proc/stat (proc_stat(5)), in ticks since the machine started."""

FREE = 0.75
"""So much of a free core's time is idle."""

LEAST_SPAN = 8
"""Ticks between two looks: less says nothing."""


class CoreWatch:
    """Says of one core after another whether it has been free since it was last asked about it."""

    def __init__(self, stat: Path = STAT, clock: Callable[[], float] = time.monotonic) -> None:
        self._stat, self._clock = stat, clock
        self._ticks_per_second = os.sysconf("SC_CLK_TCK")
        self._last: tuple[int, int, float] | None = None

    def is_free(self, core: int) -> bool:
        """False when it was another core that was last asked about, and where the system does not tell."""
        ticks, now = self._idle_ticks(core), self._clock()
        if ticks is None:
            return False
        if self._last is None or self._last[0] != core:
            self._last = core, ticks, now
            return False
        _, before, since = self._last
        span = (now - since) * self._ticks_per_second
        if span < LEAST_SPAN:
            return False
        self._last = core, ticks, now
        return ticks - before >= FREE * span

    def _idle_ticks(self, core: int) -> int | None:
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        for line in lines:
            name, *fields = line.split()
            if name == f"cpu{core}" and len(fields) >= IDLE:
                return int(fields[IDLE - 1])
        return None
