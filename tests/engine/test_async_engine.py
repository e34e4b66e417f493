"""Streams of an engine that steps in its own thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from crosspool.core.errors import EngineDeadError, RequestTooLargeError
from crosspool.core.ids import RequestId
from crosspool.core.request import EngineOutput, FinishReason
from crosspool.engine.async_engine import AsyncEngine
from helpers_control_plane import World, make_request, make_world
from helpers_specs import gqa_spec

pytestmark = pytest.mark.unit

SPEC = gqa_spec(layers=4)


def world_of(pause: float = 0.0) -> World:
    """An engine whose executor's ``wait`` can be ended by ``wake``, as the protocol says.

    Simulated time is fast: with a ``pause`` (seconds) for each layer task, others get their turn meanwhile.
    """
    world = make_world([SPEC], page_bytes=16 * SPEC.kv_bytes_per_token, pages=40)
    woken = threading.Event()

    def wait(timeout: float) -> None:
        time.sleep(pause)
        if not world.executor.advance():
            woken.wait(timeout)
            woken.clear()

    world.executor.wait = wait  # type: ignore[method-assign]
    world.executor.wake = woken.set  # type: ignore[method-assign]
    return world


async def test_streams_are_separate_and_complete() -> None:
    world = world_of()
    engine = AsyncEngine(world.engine)

    async def tokens(identity: int) -> list[int]:
        request = make_request(identity, (identity, 2, 3), 20)
        world.requests[request.id] = request
        outputs = [output async for output in engine.generate(request)]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        return [token for output in outputs for token in output.token_ids]

    results = await asyncio.gather(*(tokens(identity) for identity in range(8)))
    for identity, result in enumerate(results):
        assert result == world.expected(world.requests[RequestId(identity)])
    assert (await engine.stats()).kv_pages_held == 0
    await engine.close()


async def test_closing_a_stream_early_aborts() -> None:
    world = world_of(pause=0.001)
    engine = AsyncEngine(world.engine)
    stream = engine.generate(make_request(0, (1, 2), 500))
    await anext(stream)
    await stream.aclose()
    while (stats := await engine.stats()).kv_pages_held:
        await asyncio.sleep(0.001)
    assert stats.models[0].finished == {"abort": 1}
    await engine.close()


async def test_finish_ends_the_stream_with_stop() -> None:
    engine = AsyncEngine(world_of(pause=0.001).engine)
    outputs = []
    async for output in engine.generate(make_request(0, (1, 2), 500)):
        outputs.append(output)
        if len(outputs) == 1:
            engine.finish(RequestId(0), 1)
    assert outputs[-1].finish_reason is FinishReason.STOP
    await engine.close()


async def test_a_refused_request_raises_in_its_own_stream() -> None:
    engine = AsyncEngine(world_of().engine)
    with pytest.raises(RequestTooLargeError):
        await anext(engine.generate(make_request(0, (1, 2), 50_000)))
    outputs = [output async for output in engine.generate(make_request(1, (1, 2), 2))]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    await engine.close()


async def test_a_failed_step_ends_every_stream(caplog: pytest.LogCaptureFixture) -> None:
    world = world_of()

    def fail() -> None:
        raise RuntimeError("a bug")

    world.executor.poll = fail  # type: ignore[assignment,method-assign]
    entered, go_on = threading.Event(), threading.Event()
    step = world.engine.step

    def step_when_told() -> list[EngineOutput]:
        entered.set()
        go_on.wait()
        return step()

    world.engine.step = step_when_told  # type: ignore[method-assign]
    engine = AsyncEngine(world.engine)
    await asyncio.to_thread(entered.wait)
    pending = asyncio.ensure_future(engine.stats())
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(EngineDeadError, match="the engine failed"):
        await anext(engine.generate(make_request(0, (1, 2), 5)))
    with pytest.raises(EngineDeadError, match="the engine failed"):
        await asyncio.wait_for(pending, 5)
    with pytest.raises(EngineDeadError):
        await engine.stats()
    await engine.close()
    assert "the engine's step failed" in caplog.text
