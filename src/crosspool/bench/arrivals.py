"""When requests are sent: at random times (open loop), or when the one before has ended (closed loop)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeAlias

from crosspool.bench.client import Request

Send: TypeAlias = Callable[[Request, float | None], Awaitable[object]]
"""Sends a request that was due at a time of ``time.perf_counter``; None: it is due now."""


def poisson(rng: random.Random, rate: float) -> Iterator[float]:
    """Times of a Poisson process of ``rate`` a second, in seconds after its begin, without end."""
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


async def open_loop(arrivals: Iterable[float], requests: Iterable[Request], begin: float, send: Send) -> None:
    """Send each request at its time, whatever became of those before, and wait for all to end.

    Ends with the shorter of the two. A request is drawn before it is due.
    """
    async with asyncio.TaskGroup() as running:
        for arrival, request in zip(arrivals, requests, strict=False):
            due = begin + arrival
            await asyncio.sleep(due - time.perf_counter())
            running.create_task(_one(send, request, due))


async def closed_loop(streams: int, requests: Iterator[Request], until: float | None, send: Send) -> None:
    """So many streams, each with a request at all times, until there are none left or ``until`` is past.

    What was sent before ``until`` is waited for.
    """

    async def stream() -> None:
        while until is None or time.perf_counter() < until:
            request = next(requests, None)
            if request is None:
                return
            await send(request, None)

    async with asyncio.TaskGroup() as running:
        for _ in range(streams):
            running.create_task(stream())


async def _one(send: Send, request: Request, due: float) -> None:
    await send(request, due)
