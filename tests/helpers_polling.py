"""Waiting for something that another process does."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def wait_until(condition: Callable[[], Any | Awaitable[Any]], failure: str, seconds: float) -> Any:
    """The condition's value as soon as it is true; fails if it is not within ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"{failure} (waited {seconds:g} s)"
        await asyncio.sleep(0.02)
