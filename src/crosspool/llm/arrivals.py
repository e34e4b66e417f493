"""What arrives for one task, taken all at once."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Arrivals(Generic[T]):
    """A queue without a limit, used in one event loop, whose one reader takes all that has come since."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._waiting is not None:
            if not self._waiting.done():
                self._waiting.set_result(None)
            self._waiting = None

    async def take(self) -> list[T]:
        """Everything that was put and not taken, oldest first; waits until there is something."""
        while not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        items, self._items = self._items, []
        return items
