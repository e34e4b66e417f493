from __future__ import annotations

import asyncio
import random
import time
from itertools import count, islice, repeat

import pytest

from crosspool.bench.arrivals import closed_loop, open_loop, poisson
from crosspool.bench.client import Request

pytestmark = pytest.mark.unit

REQUEST = Request("a", "/v1/completions", b"{}", 1)


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = list(islice(poisson(random.Random(1), 5.0), 20_000))
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert min(gaps) > 0
    assert mean == pytest.approx(1 / 5, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(1 / 25, rel=0.06)
    assert times == list(islice(poisson(random.Random(1), 5.0), 20_000))


async def test_an_open_loop_sends_whatever_became_of_those_before() -> None:
    begin, sent, ended, last = time.perf_counter(), [], 0, asyncio.Event()

    async def send(request: Request, due: float | None) -> None:
        nonlocal ended
        assert due is not None
        sent.append((due - begin, time.perf_counter() - begin))
        if len(sent) == 3:
            last.set()
        await last.wait()
        ended += 1

    await open_loop([0.0, 0.01, 0.02], repeat(REQUEST), begin, send)
    assert [round(due, 9) for due, _ in sent] == [0.0, 0.01, 0.02]
    assert all(at >= due for due, at in sent)
    assert ended == 3


async def test_an_open_loop_ends_with_its_requests() -> None:
    sent = []

    async def send(request: Request, due: float | None) -> None:
        sent.append(request)

    await open_loop(poisson(random.Random(1), 1e6), repeat(REQUEST, 5), time.perf_counter(), send)
    assert len(sent) == 5


async def test_a_closed_loop_always_has_so_many() -> None:
    numbers, running, seen = count(), 0, []

    async def send(request: Request, due: float | None) -> None:
        nonlocal running
        assert due is None
        running += 1
        await asyncio.sleep(0.001 * (next(numbers) % 3))
        seen.append(running)
        running -= 1

    await closed_loop(3, iter([REQUEST] * 10), None, send)
    assert len(seen) == 10
    assert max(seen) == 3
    assert seen[:8] == [3] * 8


async def test_a_closed_loop_ends_at_its_time_and_waits_for_what_runs() -> None:
    begin, ended = time.perf_counter(), []

    async def send(request: Request, due: float | None) -> None:
        await asyncio.sleep(0.06)
        ended.append(time.perf_counter() - begin)

    await closed_loop(2, repeat(REQUEST), begin + 0.05, send)
    assert len(ended) == 2
    assert min(ended) >= 0.06
