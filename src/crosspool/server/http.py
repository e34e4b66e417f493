"""The listening socket, and uvicorn with a time limit for headers and without its signal handlers."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from crosspool.core.errors import ConfigError
from crosspool.server.config import LimitsConfig

BACKLOG = 2048
KEEP_ALIVE = 30
CLOSE_TIMEOUT = 5.0


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError if the address cannot be had, a port in use above all."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use by another process") from None
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


class TimedTransport:
    """A transport that is closed some time after ``close``, even if the client reads nothing more."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self.write = transport.write

    def close(self) -> None:
        if not self._transport.is_closing():
            self._loop.call_later(CLOSE_TIMEOUT, self._transport.abort)
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose client must send the headers of a request within ``header_timeout`` seconds.

    As much time is left for the rest of a body that was answered before its end.
    """

    def __init__(self, *, header_timeout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._header_timeout = header_timeout
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, TimedTransport(transport, self.loop)))
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            self._start_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and not self._answered_early():
            self._stop_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answered_early():
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _answered_early(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._header_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the server drains first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_http_server(app: ASGIApp, limits: LimitsConfig, flush_timeout: int) -> HttpServer:
    """A server for ``app``. When it is told to exit, answers have ``flush_timeout`` seconds to leave."""
    protocol = partial(TimedProtocol, header_timeout=limits.header_timeout)
    return HttpServer(
        uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], protocol),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=flush_timeout,
            h11_max_incomplete_event_size=limits.max_header_bytes,
        )
    )
