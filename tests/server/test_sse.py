from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest
from pydantic import BaseModel
from starlette.types import Message

from crosspool.core.errors import OverloadedError
from crosspool.server.sse import EventStream, TextEvents, event
from helpers_sse import read_events

pytestmark = pytest.mark.unit

SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


class Thing(BaseModel):
    a: int | None = None
    b: int | None = None


class Named(BaseModel):
    name: str
    text: str
    end: str | None


class Source:
    """Numbers, the first of which is taken already, as the deltas of a stream that has begun."""

    def __init__(self, *items: int | Exception) -> None:
        self.closed = False
        self.items = self._generate(items)

    async def _generate(self, items: tuple[int | Exception, ...]) -> AsyncGenerator[list[int], None]:
        try:
            yield [0]
            for item in items:
                if isinstance(item, Exception):
                    raise item
                yield [item]
        finally:
            self.closed = True


class Numbers:
    """Writes numbers as events, 0 as none."""

    def events(self, deltas: Sequence[int]) -> bytes:
        return b"".join(event(Thing(a=number)) for number in deltas if number)

    def last(self) -> bytes:
        return event(Thing(b=0))


async def respond(source: Source, *, leave_after: int | None = None) -> str:
    """What is sent to a client that leaves after so many messages."""
    first = await anext(source.items)
    sent: list[Message] = []
    left = asyncio.Event()
    if leave_after == 0:
        left.set()

    async def receive() -> Message:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            left.set()
        await asyncio.sleep(0)

    await EventStream(Numbers(), first, source.items)(SCOPE, receive, send)
    return b"".join(message.get("body", b"") for message in sent).decode()


def test_only_fields_that_were_set_are_sent() -> None:
    assert event(Thing(a=None)) == b'data: {"a":null}\n\n'


def test_a_text_is_written_into_its_event_as_it_would_be_encoded_with_it() -> None:
    """Also where other fields look like the empty text."""
    texts = TextEvents(event(Named(name='""', text="", end=None)))
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for text in ("", '""', "a\nb", "".join(everything)):
        assert texts.event(text) == event(Named(name='""', text=text, end=None))


async def test_a_stream_that_comes_to_its_end_says_so() -> None:
    source = Source(1, 2)
    assert read_events(await respond(source)) == [{"a": 1}, {"a": 2}, {"b": 0}, "[DONE]"]
    assert source.closed


async def test_an_error_is_the_last_event_and_tells_no_more_than_it_may() -> None:
    for error, message in [(OverloadedError("full"), "full"), (KeyError("secret"), "internal error")]:
        first, last = read_events(await respond(Source(1, error)))
        assert first == {"a": 1}
        assert last["error"]["message"] == message


@pytest.mark.parametrize("messages", [0, 1, 2])
async def test_the_source_is_closed_whenever_the_client_leaves(messages: int) -> None:
    source = Source(*range(1000))
    await respond(source, leave_after=messages)
    assert source.closed
