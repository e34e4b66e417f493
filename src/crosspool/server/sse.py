"""Server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol, TypeVar

import msgspec
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from crosspool.core.errors import CrossPoolError
from crosspool.server.errors import error_event

T = TypeVar("T")
Contra = TypeVar("Contra", contravariant=True)

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

encode_text = msgspec.json.Encoder().encode

logger = logging.getLogger(__name__)


def event(content: BaseModel) -> bytes:
    """One event with the fields that were set."""
    return b"data: " + content.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class TextEvents:
    """Events that differ in one text alone: all the rest is encoded once.

    ``example`` is such an event whose text is empty, and is its last string that is.
    """

    def __init__(self, example: bytes) -> None:
        self._head, _, self._tail = example.rpartition(b'""')

    def event(self, text: str) -> bytes:
        return self._head + encode_text(text) + self._tail


class Chunks(Protocol[Contra]):
    """How the deltas of one answer are written as events."""

    def events(self, deltas: Sequence[Contra]) -> bytes:
        """The events of these deltas, in one piece; none where they have nothing to tell."""
        ...

    def last(self) -> bytes:
        """What comes after the last delta."""
        ...


class EventStream(StreamingResponse):
    """Sends events as they come, and ``[DONE]`` when they come to their end.

    An error is sent as an event of its own, without ``[DONE]``: no answer is cut off in silence. ``first``
    was taken from ``source`` already, which is closed at once when the client leaves, begun or not.
    """

    def __init__(
        self, chunks: Chunks[T], first: Sequence[T], source: AsyncGenerator[Sequence[T], None]
    ) -> None:
        self._source = source
        self._pieces = _pieces(chunks, first, source)
        super().__init__(self._pieces, media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()
            await self._source.aclose()


async def _pieces(
    chunks: Chunks[T], first: Sequence[T], source: AsyncGenerator[Sequence[T], None]
) -> AsyncGenerator[bytes, None]:
    try:
        if content := chunks.events(first):
            yield content
        async for deltas in source:
            if content := chunks.events(deltas):
                yield content
        yield chunks.last() + DONE
    except Exception as error:
        if not isinstance(error, CrossPoolError):
            logger.exception("a stream failed")
        yield error_event(error)
