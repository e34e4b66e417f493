from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from crosspool.bench.client import Record, new_client, send
from crosspool.bench.dialect import Dialect, Fields, Prompt, completion
from crosspool.bench.prompts import Span
from crosspool.bench.sse import EventLines
from crosspool.core.errors import ConfigError
from helpers_stream_server import Behaviour, StreamServer, stream_server

pytestmark = pytest.mark.integration

EXACT = Dialect(Prompt.TOKEN_IDS, Fields.EXACT)


async def ask(server: StreamServer, *, dialect: Dialect = EXACT, timeout: float = 20) -> Record:
    request = dialect.request(random.Random(1), "a", 8, 6, Span(100, 200))
    return await send(new_client(server.url, "secret"), request, timeout=timeout)


@pytest.fixture(params=list(Prompt))
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return Dialect(request.param, Fields.EXACT)


async def test_every_event_with_text_has_its_time(dialect: Dialect) -> None:
    with stream_server(a=Behaviour(first=0.05, slow_gap=0.1)) as server:
        record = await ask(server, dialect=dialect)
    assert record.finished and record.failure is None
    assert (record.prompt_tokens, record.output_tokens, len(record.events)) == (8, 6, 6)
    assert record.events[0] - record.sent >= 0.05
    assert record.events[2] - record.sent >= 0.05 + 0.1
    assert len(record.gaps) == 5
    assert sum(record.gaps) == pytest.approx(record.events[-1] - record.events[0])
    assert record.events == sorted(record.events)
    assert record.ended is not None and record.ended >= record.events[-1]
    assert server.keys == {"Bearer secret"}
    assert server.models["a"].bodies[0]["ignore_eos"] is True


async def test_one_client_can_ask_several_servers() -> None:
    with stream_server(a=Behaviour()) as one, stream_server(a=Behaviour()) as other:
        for server in (one, other):
            record = await send(new_client(), completion("a", [5, 6, 7], 4, server=server.url), timeout=20)
            assert (record.prompt_tokens, record.output_tokens) == (3, 4)
    assert [len(server.models["a"].bodies) for server in (one, other)] == [1, 1]
    assert one.models["a"].bodies[0]["prompt"] == [5, 6, 7]


async def test_two_tokens_in_one_event() -> None:
    with stream_server(a=Behaviour(tokens_per_event=2)) as server:
        record = await ask(server)
    assert (len(record.events), record.output_tokens, record.tokens) == (3, 6, 6)


async def test_without_usage_events_are_counted() -> None:
    with stream_server(a=Behaviour(usage=False)) as server:
        record = await ask(server)
    assert record.finished
    assert (record.prompt_tokens, record.output_tokens, record.tokens) == (None, None, 6)


@pytest.mark.parametrize(
    ("behaviour", "kind", "message", "events"),
    [
        (Behaviour(status=429), "HTTP 429", "no answer from this one", 0),
        (Behaviour(error_after=4), "error event", "the engine process ended", 4),
        (Behaviour(hang_up_after=4), "cut off", "before the answer's end", 4),
    ],
)
async def test_a_failure_has_a_kind_and_what_came_before(
    behaviour: Behaviour, kind: str, message: str, events: int
) -> None:
    behaviour.bodies.append({})
    with stream_server(a=behaviour) as server:
        record = await ask(server)
    assert record.failure is not None and not record.finished
    assert record.failure.kind == kind
    assert message in record.failure.message
    assert (len(record.events), record.tokens) == (events, events)
    assert record.ended is not None


async def test_a_request_that_takes_too_long() -> None:
    with stream_server(a=Behaviour(slow_gap=30)) as server:
        record = await ask(server, timeout=0.3)
    assert record.failure is not None and record.failure.kind == "timeout"
    assert len(record.events) == 2


async def test_no_server() -> None:
    with stream_server() as gone:
        pass
    record = await ask(gone)
    assert record.failure is not None and record.failure.kind == "no connection"


async def answer(content: bytes) -> Record:
    """What ``send`` makes of these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + content)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        request = EXACT.request(random.Random(1), "a", 1, 1, Span(1, 1))
        return await send(new_client(f"http://127.0.0.1:{port}"), request, timeout=20)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"data: <html>\n\n", "not an OpenAI-compatible answer"),
        (b'data: {"greeting": 1}\n\n', "not an OpenAI-compatible answer"),
        (b'data: {"choices": [{"text": "a"}], "usage": {}}\n\n', "cut off"),
        (b"", "cut off"),
        (b'data: {"choices": []}\ndata: [DONE]\ndata: <html>\n', None),
    ],
)
async def test_other_kinds_of_answers(content: bytes, kind: str | None) -> None:
    record = await answer(content)
    assert (None if record.failure is None else record.failure.kind) == kind


async def test_who_cancels_has_what_came_until_then() -> None:
    with stream_server(a=Behaviour(slow_gap=30)) as server:
        request = EXACT.request(random.Random(1), "a", 8, 6, Span(100, 200))
        record = Record("a", 6, 0.0, 0.0)
        task = asyncio.create_task(send(new_client(server.url), request, record=record, due=1.0))
        await _until(lambda: len(record.events) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (len(record.events), record.ended, record.failure, record.due) == (2, None, None, 1.0)


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_lines_are_put_together_from_whatever_arrives() -> None:
    lines = EventLines()
    chunks = [b": hello\ndata: \xe2", b"\x80\xa8x\r", b"\n", b"\ndata:y\nda", b"ta: z"]
    assert [lines.feed(chunk) for chunk in chunks] == [[], [], ["\u2028x".encode()], [b"y"], []]
    assert lines.feed(b"\n") == [b"z"]


@pytest.mark.parametrize("key", ["é", "", "a\nb"])
def test_a_key_that_cannot_be_one(key: str) -> None:
    with pytest.raises(ConfigError, match="API key must be printable ASCII"):
        new_client("http://127.0.0.1", key)


def test_what_is_no_url() -> None:
    with pytest.raises(ConfigError, match="not a URL"):
        new_client("http://\n")
