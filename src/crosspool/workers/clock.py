"""The machine's clock."""

from __future__ import annotations

import time

from crosspool.core.ids import Nanoseconds


class MonotonicClock:
    """core.protocols.Clock over the operating system's monotonic clock."""

    def now(self) -> Nanoseconds:
        return Nanoseconds(time.monotonic_ns())
