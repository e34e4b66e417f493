from __future__ import annotations

import asyncio

import pytest

from crosspool.llm.arrivals import Arrivals

pytestmark = pytest.mark.unit


async def test_all_that_has_come_is_taken_at_once_and_in_order() -> None:
    arrivals: Arrivals[int] = Arrivals()
    for number in range(3):
        arrivals.put(number)
    assert await arrivals.take() == [0, 1, 2]
    waiting = asyncio.ensure_future(arrivals.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    arrivals.put(3)
    arrivals.put(4)
    assert await waiting == [3, 4]


async def test_a_reader_that_was_cancelled_takes_nothing_with_it() -> None:
    arrivals: Arrivals[int] = Arrivals()
    waiting = asyncio.ensure_future(arrivals.take())
    await asyncio.sleep(0)
    waiting.cancel()
    arrivals.put(1)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await arrivals.take() == [1]
