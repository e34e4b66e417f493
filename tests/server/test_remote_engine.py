from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from crosspool.core.errors import EngineDeadError, OverloadedError
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import EngineInfo, EngineStats
from crosspool.core.request import EngineOutput, FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.server import messages
from crosspool.server.remote_engine import RemoteEngine

pytestmark = pytest.mark.unit

INFO = EngineInfo((), ("cpu:0",), ("cpu:0",), 1, 2, 3, 4, 5)
STATS = EngineStats((), 1, 2, 3, 4, 5, 6)
ID = RequestId(3)
REQUEST = Request(ID, ModelIndex(0), (1,), SamplingParams(), 5, 0, frozenset(), Nanoseconds(0))


class RecordingChannel:
    def __init__(self) -> None:
        self.sent: list[messages.Command] = []

    def send(self, command: messages.Command) -> None:
        self.sent.append(command)


@pytest.fixture
def channel() -> RecordingChannel:
    return RecordingChannel()


@pytest.fixture
def engine(channel: RecordingChannel) -> RemoteEngine:
    engine = RemoteEngine()
    engine.attach(channel, INFO)
    return engine


def outputs(*tokens: int, finish: FinishReason | None = None, request: RequestId = ID) -> messages.Outputs:
    return messages.Outputs((EngineOutput(request, tokens, finish_reason=finish),))


async def collect(stream: AsyncIterator[EngineOutput]) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


async def started(coroutine: object) -> asyncio.Task:
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    return task


async def test_a_request_is_submitted_and_its_outputs_come_until_the_end(
    engine: RemoteEngine, channel: RecordingChannel
) -> None:
    task = await started(collect(engine.generate(REQUEST)))
    engine.deliver(outputs(1, 2))
    engine.deliver(outputs(9, request=RequestId(99)))
    engine.deliver(outputs(3, finish=FinishReason.STOP))
    assert await task == [1, 2, 3]
    assert channel.sent == [messages.Submit(REQUEST)]


async def test_closing_a_stream_early_aborts_the_request(
    engine: RemoteEngine, channel: RecordingChannel
) -> None:
    async with aclosing(engine.generate(REQUEST)) as stream:
        first = await started(anext(stream))
        engine.deliver(outputs(1))
        await first
    assert channel.sent == [messages.Submit(REQUEST), messages.Abort(ID)]
    engine.deliver(outputs(2))


async def test_cancelling_a_waiting_task_aborts_the_request(
    engine: RemoteEngine, channel: RecordingChannel
) -> None:
    task = await started(collect(engine.generate(REQUEST)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert channel.sent[-1] == messages.Abort(ID)


async def test_a_rejected_request_raises_and_is_not_aborted(
    engine: RemoteEngine, channel: RecordingChannel
) -> None:
    task = await started(collect(engine.generate(REQUEST)))
    engine.deliver(messages.Rejected(ID, "OverloadedError", "full"))
    with pytest.raises(OverloadedError, match="full"):
        await task
    assert channel.sent == [messages.Submit(REQUEST)]


async def test_finish_is_passed_on(engine: RemoteEngine, channel: RecordingChannel) -> None:
    engine.finish(ID, 4)
    assert channel.sent == [messages.Finish(ID, 4)]


async def test_stats_are_asked_for_and_answered_by_number(
    engine: RemoteEngine, channel: RecordingChannel
) -> None:
    first, second = await started(engine.stats()), await started(engine.stats())
    numbers = [query.query for query in channel.sent]
    engine.deliver(messages.Stats(numbers[1], STATS))
    assert await second == STATS
    assert not first.done()
    engine.deliver(messages.Stats(numbers[0], STATS))
    assert await first == STATS


async def test_when_the_cell_is_gone_everything_under_way_ends_with_an_error(engine: RemoteEngine) -> None:
    task, query = await started(collect(engine.generate(REQUEST))), await started(engine.stats())
    engine.deliver(outputs(1))
    engine.detach(EngineDeadError("killed"))
    for waiting in (task, query):
        with pytest.raises(EngineDeadError, match="killed"):
            await waiting


async def test_an_answer_that_is_complete_is_not_spoiled_by_the_cells_death(engine: RemoteEngine) -> None:
    task = await started(collect(engine.generate(REQUEST)))
    engine.deliver(outputs(1, finish=FinishReason.LENGTH))
    engine.detach(EngineDeadError("killed"))
    assert await task == [1]


async def test_without_a_cell_nothing_can_be_asked(engine: RemoteEngine, channel: RecordingChannel) -> None:
    engine.detach(EngineDeadError("killed"))
    with pytest.raises(EngineDeadError, match="not running"):
        await collect(engine.generate(REQUEST))
    with pytest.raises(EngineDeadError, match="not running"):
        await engine.stats()
    engine.abort(ID)
    engine.finish(ID, 1)
    assert channel.sent == []
    assert engine.info == INFO


async def test_info_is_known_from_the_first_time_it_is_ready() -> None:
    engine = RemoteEngine()
    with pytest.raises(EngineDeadError, match="loading"):
        _ = engine.info


async def test_close_ends_streams(engine: RemoteEngine) -> None:
    task = await started(collect(engine.generate(REQUEST)))
    await engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await task
