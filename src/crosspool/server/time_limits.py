"""The time limits of a request that runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from crosspool.core.errors import OverloadedError
from crosspool.server.config import LimitsConfig


@asynccontextmanager
async def in_time(limits: LimitsConfig, choices: int, arrival: float) -> AsyncGenerator[TimeLimit, None]:
    """Cancels what it encloses when a limit is passed, and raises OverloadedError.

    ``arrival`` is by the clock of the event loop.
    """
    limit: TimeLimit | None = None
    try:
        async with asyncio.timeout(None) as timeout:
            limit = TimeLimit(limits, choices, arrival, timeout)
            try:
                yield limit
            finally:
                limit.close()
    except TimeoutError:
        if limit is None or not timeout.expired():
            raise
        raise OverloadedError(limit.reason) from None


class TimeLimit:
    """When the next delta of a request must have come.

    Until every choice has begun, the next delta may be the first token of one that still waits. A limit that
    moves on with each token sets no timer each time: the one timer looks, when it rings, where the limit is.
    """

    def __init__(self, limits: LimitsConfig, choices: int, arrival: float, timeout: asyncio.Timeout) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._not_begun = set(range(choices))
        self._patience = limits.first_token_timeout
        self._end = arrival + limits.total_timeout
        self._limit = min(self._end, self._loop.time() + self._patience)
        self._timer = self._loop.call_at(self._limit, self._ring)

    def note(self, choice: int, now: float) -> None:
        """A delta of this choice has come."""
        if self._not_begun:
            self._not_begun.discard(choice)
            if not self._not_begun:
                self._patience = self._limits.token_timeout
                self._timer.cancel()
                self._timer = self._loop.call_at(min(self._end, now + self._patience), self._ring)
        self._limit = min(self._end, now + self._patience)

    @property
    def reason(self) -> str:
        """Which limit was passed."""
        if self._limit >= self._end:
            return f"the request took longer than {self._limits.total_timeout:g} s"
        what = "first token" if self._not_begun else "next token"
        return f"the {what} did not come within {self._patience:g} s"

    def close(self) -> None:
        self._timer.cancel()

    def _ring(self) -> None:
        now = self._loop.time()
        if now >= self._limit:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(self._limit, self._ring)
