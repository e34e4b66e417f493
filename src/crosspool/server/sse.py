"""Server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from crosspool.core.errors import CrossPoolError
from crosspool.server.errors import error_event

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

logger = logging.getLogger(__name__)


def event(content: BaseModel) -> bytes:
    """One event with the fields that were set."""
    return b"data: " + content.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events as they come, and ``[DONE]`` if they come to their end.

    An error is sent as an event of its own, without ``[DONE]``: no answer is cut off in silence. ``source``
    is what the events are made from; it is closed at once when the client leaves, begun or not.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]) -> None:
        self._events = _with_end(events)
        self._source = source
        super().__init__(self._events, media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._source.aclose()


async def _with_end(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for content in events:
                yield content
            yield DONE
        except Exception as error:
            if not isinstance(error, CrossPoolError):
                logger.exception("a stream failed")
            yield error_event(error)
