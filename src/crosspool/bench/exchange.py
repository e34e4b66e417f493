"""One HTTP exchange on a connection of its own, with little work for each piece: whoever measures a server on
the same machine takes its cores from it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping

import httptools
import httpx

Take = Callable[[int, bytes], None]
"""Called with the status and each piece of the body when it arrives; what it raises ends the exchange."""


async def post(url: httpx.URL, headers: Mapping[str, str], content: bytes, take: Take) -> int:
    """Post ``content``; return the status at the end of the answer's body.

    Raises OSError if no connection comes about, EndedEarlyError if it breaks, ValueError if ``url`` is not
    one of HTTP, and what ``take`` raises.
    """
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{str(url)!r} is not a URL of HTTP")
    secure = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if secure else 80)
    own = {"Host": url.netloc.decode(), "Content-Length": str(len(content)), "Connection": "close"}
    lines = [f"POST {url.raw_path.decode()} HTTP/1.1", *(f"{k}: {v}" for k, v in {**headers, **own}.items())]
    request = "\r\n".join([*lines, "", ""]).encode("ascii") + content
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()
    transport, _ = await loop.create_connection(
        lambda: _Exchange(request, take, ended), url.host, port, ssl=secure
    )
    try:
        return await ended
    finally:
        transport.abort()


class EndedEarlyError(Exception):
    """The connection was closed, or held something else than HTTP, before the answer's end."""


class _Exchange(asyncio.Protocol):
    """``on_body`` and ``on_message_complete`` are called by httptools' parser."""

    def __init__(self, request: bytes, take: Take, ended: asyncio.Future[int]) -> None:
        self._request = request
        self._take = take
        self._ended = ended
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._ended.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(EndedEarlyError(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(EndedEarlyError(str(error or "the connection was closed before the answer's end")))

    def on_body(self, body: bytes) -> None:
        self._take(self._parser.get_status_code(), body)

    def on_message_complete(self) -> None:
        if not self._ended.done():
            self._ended.set_result(self._parser.get_status_code())

    def _fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
