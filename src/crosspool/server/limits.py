"""Gate one: requests and bytes are counted before anything is rendered or tokenized."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosspool.core.errors import OverloadedError
from crosspool.server.config import LimitsConfig
from crosspool.server.errors import error_response

GRACE = 5.0

logger = logging.getLogger(__name__)


class Admission:
    """How many requests, with how many bytes of body, are in progress. ``close`` lets no more in."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._closed = False
        self.requests = 0
        self.bytes = 0

    def close(self) -> None:
        self._closed = True

    @property
    def closed(self) -> bool:
        return self._closed

    @contextmanager
    def request(self) -> Iterator[Admitted]:
        """One request, from its headers to the last byte of its answer. Raises OverloadedError."""
        if self._closed:
            raise OverloadedError("the server is shutting down")
        if self.requests >= self._limits.max_requests:
            raise OverloadedError(f"{self.requests} requests are in progress, which is the most")
        self.requests += 1
        admitted = Admitted(self, self._limits)
        try:
            yield admitted
        finally:
            self.requests -= 1
            self.bytes -= admitted.bytes


class Admitted:
    """One request's share of the bytes."""

    def __init__(self, admission: Admission, limits: LimitsConfig) -> None:
        self._admission = admission
        self._limits = limits
        self.bytes = 0

    def grow(self, size: int) -> None:
        """The body has at least ``size`` bytes. Raises HTTPException 413 or OverloadedError."""
        if size > self._limits.max_body_bytes:
            raise HTTPException(
                413, f"the body has more than {self._limits.max_body_bytes:,} bytes, which is the most"
            )
        more = max(size - self.bytes, 0)
        if self._admission.bytes + more > self._limits.max_admitted_bytes:
            raise OverloadedError(f"{self._admission.bytes:,} bytes of requests are in progress")
        self._admission.bytes += more
        self.bytes += more


class GateMiddleware:
    """Lets POST requests through the gate with their body read whole. Every request has an end."""

    def __init__(self, app: ASGIApp, admission: Admission, limits: LimitsConfig) -> None:
        self._app = app
        self._admission = admission
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] != "POST":
                await self._run(scope, receive, send)
                return
            with self._admission.request() as admitted:
                body = await self._read_body(scope, receive, admitted)
                if body is not None:
                    await self._run(scope, _replay(body, receive), send)
        except (OverloadedError, HTTPException) as error:
            await error_response(error, self._limits.retry_after)(scope, receive, send)

    async def _read_body(self, scope: Scope, receive: Receive, admitted: Admitted) -> bytes | None:
        """The whole body, None if the client left before its end."""
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal():
            admitted.grow(int(length))
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    admitted.grow(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not arrive within {self._limits.body_timeout:g} s"
            ) from None

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with an end even where the client does not read its answer."""
        answering = False

        async def note_and_send(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            async with asyncio.timeout(self._limits.total_timeout + GRACE) as limit:
                await self._app(scope, receive, note_and_send)
        except TimeoutError:
            if not limit.expired():
                raise
            if not answering:
                raise OverloadedError(
                    f"the request took longer than {self._limits.total_timeout:g} s"
                ) from None
            logger.warning("a client did not read its answer in time; its connection is closed")


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for an application behind the gate: the body in one piece, then the real thing."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
